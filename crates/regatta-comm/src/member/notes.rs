//! What ranks tell each other beside the data path, through the job's directory: what they wait for when they wait
//! long, and what they call when some have joined.

use crate::error::Result;
use crate::member::call::{Call, ENCODED, digest};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A small key/value store that all ranks of a job reach.
pub(crate) trait Directory: Send + Sync {
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;
    /// The value of `key`, waiting for it until `until`.
    fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>>;
    /// Adds to a number, which begins at 0, and returns the sum.
    fn add(&self, key: &str, amount: u64) -> Result<u64>;
    /// All entries whose key begins with `prefix`.
    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>>;
    /// Whether it cannot be reached any longer; if so, a rank on its host, where that is another host.
    fn lost(&self) -> Option<Option<usize>>;
    /// Tells all ranks at once that one has joined: what it has joined, and after which operation.
    fn announce(&self, token: u64, sequence: u32) -> Result<()>;
}

/// What a rank that waits long says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Note {
    /// Rank of the world.
    pub rank: usize,
    pub call: Call,
    /// The rank of the world that it waits for.
    pub waits_for: usize,
    /// How often it has said so: a rank that does not get its turn on a busy host says nothing new.
    pub beat: u32,
}

/// An operation that joined ranks have to take part in, or the end of it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invitation {
    Call(Call),
    /// All have joined; this rank was the last.
    End {
        rank: usize,
    },
}

/// One rank's pen and eyes in one group.
pub(crate) struct Notes {
    directory: Option<Arc<dyn Directory>>,
    group: u64,
    /// This rank in the world.
    rank: usize,
    /// A note of ours is there.
    said: AtomicBool,
    /// Notes of this rank so far.
    beats: AtomicU32,
    /// The last circle of waiting ranks that this rank has seen.
    circle: Mutex<Vec<Note>>,
}

impl Notes {
    pub(crate) fn new(directory: Option<Arc<dyn Directory>>, group: u64, rank: usize) -> Self {
        let (said, beats, circle) = Default::default();
        Self { directory, group, rank, said, beats, circle }
    }

    fn prefix(&self) -> String {
        format!("note/{:x}/", self.group)
    }

    /// Says that this rank has waited long for `waits_for` in `call`.
    pub(crate) fn say(&self, call: Call, waits_for: usize) {
        let Some(directory) = &self.directory else { return };
        let beat = self.beats.fetch_add(1, Ordering::Relaxed);
        let value = encode(&call, waits_for as u32, beat);
        // Without a directory there is nobody to tell; the wait goes on all the same.
        let _ = directory.set(&format!("{}{}", self.prefix(), self.rank), &value);
        self.said.store(true, Ordering::Relaxed);
    }

    /// Takes back what this rank has said.
    pub(crate) fn clear(&self) {
        if let Some(directory) = &self.directory
            && self.said.swap(false, Ordering::Relaxed)
        {
            let _ = directory.set(&format!("{}{}", self.prefix(), self.rank), b"");
        }
    }

    /// What all ranks of the group say at the moment.
    fn read(&self) -> Vec<Note> {
        let Some(directory) = &self.directory else { return vec![] };
        let prefix = self.prefix();
        let entries = directory.list(&prefix).unwrap_or_default();
        entries.iter().filter_map(|(key, value)| parse(key.strip_prefix(&prefix)?, value)).collect()
    }

    /// The rank at the end of the chain of those who wait for one another, beginning with `peer`: it waits for
    /// nobody. `peer` itself where there is no such end. Where the directory is cut off, so are the ranks beside it.
    pub(crate) fn culprit(&self, peer: usize) -> usize {
        let notes = self.read();
        if let Some(Some(rank)) = self.directory.as_ref().and_then(|directory| directory.lost()) {
            return rank;
        }
        let mut seen = vec![self.rank];
        let mut at = peer;
        while !seen.contains(&at) {
            seen.push(at);
            match notes.iter().find(|note| note.rank == at) {
                Some(note) => at = note.waits_for,
                None => return at,
            }
        }
        peer
    }

    /// A rank that will never come because it is in another call than this rank's, and this rank's: one with the same
    /// number, also where this rank has come further (`earlier` knows what it called), or one that waits, along a chain,
    /// for this rank.
    pub(crate) fn quarrel(
        &self,
        call: Call,
        waits_for: usize,
        earlier: &dyn Fn(u32) -> Option<Call>,
    ) -> Option<(Call, Note)> {
        let notes = self.read();
        let others = || notes.iter().filter(|note| note.rank != self.rank);
        for note in others().filter(|note| note.call.is_collective()) {
            let own = match note.call.sequence {
                sequence if call.is_collective() && sequence == call.sequence => Some(call),
                sequence => earlier(sequence),
            };
            if let Some(own) = own.filter(|own| !same(own, &note.call)) {
                return Some((own, *note));
            }
        }
        // A circle of waiting ranks never ends; one in it is in another call. Collective operations are compared above,
        // by their numbers: one with another number is only further on or behind.
        let circle = self.circle_from(waits_for, &notes);
        let seen = std::mem::replace(
            &mut *self.circle.lock().unwrap_or_else(PoisonError::into_inner),
            circle.clone(),
        );
        // What a rank wrote before it got what it waits for is no proof: all in the circle have to say it again.
        let again = |(now, before): (&Note, &Note)| {
            (now.rank, now.waits_for) == (before.rank, before.waits_for)
                && now.call == before.call
                && now.beat != before.beat
        };
        if circle.len() != seen.len() || !circle.iter().zip(&seen).all(again) {
            return None;
        }
        let both = |note: &Note| note.call.is_collective() && call.is_collective();
        let apart = |note: &Note| !same(&note.call, &call) && !both(note);
        circle.into_iter().find(apart).map(|note| (call, note))
    }

    /// The ranks that wait for one another, from `peer` on, where the last of them waits for this one; else nobody.
    fn circle_from(&self, peer: usize, notes: &[Note]) -> Vec<Note> {
        let mut circle: Vec<Note> = vec![];
        let mut at = peer;
        while at != self.rank {
            match notes.iter().find(|note| note.rank == at) {
                Some(note) if !circle.contains(note) => circle.push(*note),
                _ => return vec![],
            }
            at = circle[circle.len() - 1].waits_for;
        }
        circle
    }

    /// What names the `epoch`-th joining of the group.
    pub(crate) fn token(&self, epoch: u64) -> u64 {
        digest(self.group, [epoch])
    }

    /// Says that this rank has joined; the number of ranks that have.
    pub(crate) fn join(&self, token: u64, sequence: u32) -> Result<u64> {
        let Some(directory) = &self.directory else { return Ok(1) };
        let joined = directory.add(&format!("joined/{token:x}"), 1)?;
        directory.set(&format!("joined/{token:x}/{}", self.rank), b"")?;
        directory.announce(token, sequence)?;
        Ok(joined)
    }

    /// The ranks of the world that have joined.
    pub(crate) fn joined(&self, token: u64) -> Vec<usize> {
        let Some(directory) = &self.directory else { return vec![] };
        let prefix = format!("joined/{token:x}/");
        let entries = directory.list(&prefix).unwrap_or_default();
        entries.iter().filter_map(|(key, _)| key.strip_prefix(&prefix)?.parse().ok()).collect()
    }

    /// Tells joined ranks what the `sequence`-th operation is.
    pub(crate) fn invite(&self, token: u64, sequence: u32, invitation: Invitation) -> Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let value = match invitation {
            Invitation::Call(call) => call.to_bytes().to_vec(),
            Invitation::End { rank } => (rank as u32).to_le_bytes().to_vec(),
        };
        directory.set(&format!("join/{token:x}/{sequence}"), &value)
    }

    /// What the `sequence`-th operation is, as soon as somebody says it; none when nobody does until `until`.
    pub(crate) fn invited(&self, token: u64, sequence: u32, until: Instant) -> Result<Option<Invitation>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let value = directory.try_get(&format!("join/{token:x}/{sequence}"), until)?;
        Ok(value.and_then(|value| parse_invitation(&value)))
    }
}

/// Whether two calls are the same but for what only concerns one pair of ranks.
fn same(a: &Call, b: &Call) -> bool {
    a == b || !(a.is_collective() || b.is_collective())
}

fn encode(call: &Call, waits_for: u32, beat: u32) -> Vec<u8> {
    [call.to_bytes().as_slice(), &waits_for.to_le_bytes(), &beat.to_le_bytes()].concat()
}

fn parse(rank: &str, value: &[u8]) -> Option<Note> {
    let (call, rest) = value.split_first_chunk::<ENCODED>()?;
    let (waits_for, beat) = rest.split_first_chunk::<4>()?;
    let waits_for = u32::from_le_bytes(*waits_for) as usize;
    let beat = u32::from_le_bytes(beat.try_into().ok()?);
    Some(Note { rank: rank.parse().ok()?, call: Call::from_bytes(call)?, waits_for, beat })
}

fn parse_invitation(value: &[u8]) -> Option<Invitation> {
    if let Ok(rank) = value.try_into().map(u32::from_le_bytes) {
        return Some(Invitation::End { rank: rank as usize });
    }
    Some(Invitation::Call(Call::from_bytes(value.try_into().ok()?)?))
}

/// Reads `value` as whatever it may be.
#[cfg(fuzzing)]
pub(crate) fn parsed(value: &[u8]) {
    if let Some(note) = parse("7", value) {
        assert_eq!(encode(&note.call, note.waits_for as u32, note.beat), value);
    }
    match parse_invitation(value) {
        Some(Invitation::Call(call)) => assert_eq!(call.to_bytes(), value),
        Some(Invitation::End { rank }) => assert_eq!((rank as u32).to_le_bytes(), value),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::Kind;
    use crate::numbers::element::DType;
    use crate::transport::thread::Hub;
    use proptest::prelude::*;

    /// Rank 0, which waits for rank 1, who has said that it waits for rank 0.
    fn two(own: Call, theirs: Call) -> (impl Fn() -> bool, Notes) {
        let hub: Arc<dyn Directory> = Arc::new(Hub::default());
        let (mine, other) = (Notes::new(Some(hub.clone()), 7, 0), Notes::new(Some(hub), 7, 1));
        other.say(theirs, 0);
        (move || mine.quarrel(own, 1, &|_| Some(theirs)).is_some(), other)
    }

    #[test]
    fn a_circle_is_believed_when_all_in_it_say_it_again() {
        let own = Call { sequence: 2, ..Call::new(Kind::AllReduce, DType::F32, 8) };
        let theirs = Call { sequence: 1, ..Call::new(Kind::Send, DType::F32, 8) };
        let (quarrels, other) = two(own, theirs);
        // The note may be older than what rank 0 has sent.
        assert!(!quarrels() && !quarrels() && !quarrels());
        other.say(theirs, 0);
        assert!(quarrels());
        other.say(theirs, 5);
        assert!(!quarrels());
    }

    #[test]
    fn who_is_behind_in_the_same_operations_is_no_quarrel() {
        let call = |sequence| Call { sequence, ..Call::new(Kind::AllReduce, DType::F32, 8) };
        for theirs in [98, 100] {
            let (quarrels, other) = two(call(99), call(theirs));
            for _ in 0..3 {
                assert!(!quarrels());
                other.say(call(theirs), 0);
            }
        }
    }

    proptest! {
        #[test]
        fn any_note_is_read_without_panic(rank in ".{0,6}", value in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&rank, &value);
            let _ = parse_invitation(&value);
        }
    }
}
