//! The table of notes, against a list of all notes that every rank reads whole.

use super::*;
use crate::member::call::{Call, Kind};
use crate::numbers::element::DType;
use proptest::prelude::*;

/// A note in the list, with how often its rank has said something.
#[derive(Clone, Copy, PartialEq)]
struct Listed {
    note: Note,
    beat: u32,
}

/// The first note in the list, of a collective call, that is another than this rank's call of the same number.
fn numbered(list: &[Listed], own: &Note, earlier: &dyn Fn(u32) -> Option<Call>) -> Option<(Call, Note)> {
    let others = list.iter().map(|listed| listed.note).filter(|note| note.rank != own.rank);
    for note in others.filter(|note| note.call.is_collective()) {
        let mine = match note.call.sequence {
            sequence if own.call.is_collective() && sequence == own.call.sequence => Some(own.call),
            sequence => earlier(sequence),
        };
        if let Some(mine) = mine.filter(|mine| !same(mine, &note.call)) {
            return Some((mine, note));
        }
    }
    None
}

/// The first note that is apart in a circle that this rank has `seen` before, and that all in it have said again.
fn circle(list: &[Listed], own: &Note, seen: &mut Vec<Listed>) -> Option<Note> {
    let mut circle: Vec<Listed> = vec![];
    let mut at = own.waits_for;
    while at != own.rank {
        match list.iter().find(|listed| listed.note.rank == at) {
            Some(listed) if !circle.contains(listed) => circle.push(*listed),
            _ => {
                circle.clear();
                break;
            }
        }
        at = circle[circle.len() - 1].note.waits_for;
    }
    let before = std::mem::replace(seen, circle.clone());
    let again = |(now, before): (&Listed, &Listed)| now.note == before.note && now.beat != before.beat;
    if circle.len() != before.len() || !circle.iter().zip(&before).all(again) {
        return None;
    }
    let both = |note: &Note| note.call.is_collective() && own.call.is_collective();
    circle.into_iter().map(|listed| listed.note).find(|note| !same(&note.call, &own.call) && !both(note))
}

fn chain_end(list: &[Listed], rank: usize, peer: usize) -> usize {
    let mut seen = vec![rank];
    let mut at = peer;
    while !seen.contains(&at) {
        seen.push(at);
        match list.iter().find(|listed| listed.note.rank == at) {
            Some(listed) => at = listed.note.waits_for,
            None => return at,
        }
    }
    peer
}

/// The call number `code`: two collective calls under each of three numbers, and two messages.
fn call(code: u8) -> Call {
    match code % 8 {
        code @ 6.. => Call { sequence: u32::from(code), ..Call::new(Kind::Send, DType::F32, 8) },
        code => Call {
            sequence: u32::from(code / 2),
            ..Call::new(Kind::AllReduce, DType::F32, 8 + usize::from(code % 2))
        },
    }
}

/// Ranks say, and take back, what they like; each looks as it speaks.
fn play(steps: &[(u8, u8, u8, u8)]) {
    const RANKS: usize = 5;
    let mut waits = Waits::default();
    let mut list: Vec<Listed> = vec![];
    let mut beats = [0; RANKS];
    let mut seen: [(u64, Vec<Listed>); RANKS] = Default::default();
    // Who has said something else, or nothing, since each rank's last look.
    let mut changed = [[false; RANKS]; RANKS];
    for &(who, what, code, other) in steps {
        let rank = usize::from(who) % RANKS;
        let note = Note { rank, call: call(code), waits_for: usize::from(other) % (RANKS + 1) };
        let at = list.iter().position(|listed| listed.note.rank == rank);
        if what == 0 {
            waits.unsay(7, rank);
            list.retain(|listed| listed.note.rank != rank);
            changed.iter_mut().for_each(|changed| changed[rank] = true);
            assert_eq!(waits.len(), list.len());
            continue;
        }
        // Often what it has said before.
        let note = if what < 12 { at.map_or(note, |at| list[at].note) } else { note };
        if at.is_none_or(|at| list[at].note != note) {
            changed.iter_mut().for_each(|changed| changed[rank] = true);
        }
        beats[rank] += 1;
        list.retain(|listed| listed.note.rank != rank);
        list.push(Listed { note, beat: beats[rank] });
        list.sort_by_key(|listed| listed.note.rank);
        let heard = waits.say(7, &note, seen[rank].0);
        assert_eq!(waits.len(), list.len());
        // The rank has made the first of the two calls under each number.
        let earlier = |sequence: u32| (sequence < 2).then(|| call(2 * sequence as u8));
        let without_circle = Heard { circle: None, ..heard.clone() };
        assert_eq!(without_circle.conflict(note.call, &earlier), numbered(&list, &note, &earlier));
        // Who has changed its word since the last look, or taken it back, has begun anew.
        let begun_anew =
            changed[rank][rank] || seen[rank].1.iter().any(|listed| changed[rank][listed.note.rank]);
        let expected = circle(&list, &note, &mut seen[rank].1);
        if heard.circle.is_some() || !begun_anew {
            assert_eq!(heard.circle, expected);
        }
        seen[rank].0 = heard.version;
        changed[rank] = [false; RANKS];
        for peer in 0..=RANKS {
            assert_eq!(waits.chain_end(7, rank, peer), chain_end(&list, rank, peer));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_rank_is_told_what_it_would_find_in_the_list(
        steps in prop::collection::vec((any::<u8>(), 0u8..16, any::<u8>(), any::<u8>()), 1..60)
    ) {
        play(&steps);
    }

    /// Messages alone: circles in different calls.
    #[test]
    fn circles_are_found_as_in_the_list(
        steps in prop::collection::vec((0u8..3, 0u8..14, 4u8..8, 0u8..3), 1..60)
    ) {
        play(&steps);
    }
}
