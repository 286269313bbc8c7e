//! Recursive halving and doubling (Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication
//! operations in MPICH").
//!
//! Reduce-scatter by halving: in each of log2 n steps a rank exchanges the half of its range that it gives up, with a
//! partner half as far away as before. All-gather by doubling is the same backwards. Cost per rank for B bytes:
//! all-reduce 2 log2 n steps and 2(n-1)/n * B bytes sent. Any number of ranks: the first 2(n - p) ranks, p being the
//! largest power of two in n, first fold in pairs, one of which waits for the result; that costs B more bytes.

use super::schedule::{Run, Schedule, What};
use crate::algorithm::session::Place;
use std::ops::Range;

/// The ranks that take part after folding.
struct Fold {
    /// A power of two.
    players: usize,
    /// Pairs of ranks that play as one.
    pairs: usize,
}

enum Role {
    /// Gives its numbers to the rank and waits.
    Waits { player: usize },
    /// Plays in this place, for that rank too.
    Plays { place: usize, partner: Option<usize> },
}

impl Fold {
    fn new(size: usize) -> Self {
        let players = 1 << size.ilog2();
        Self { players, pairs: size - players }
    }

    fn role(&self, rank: usize) -> Role {
        match rank {
            rank if rank >= 2 * self.pairs => Role::Plays { place: rank - self.pairs, partner: None },
            rank if rank.is_multiple_of(2) => Role::Waits { player: rank + 1 },
            rank => Role::Plays { place: rank / 2, partner: Some(rank - 1) },
        }
    }

    /// The rank that plays in `place`.
    fn rank(&self, place: usize) -> usize {
        if place < self.pairs { 2 * place + 1 } else { place + self.pairs }
    }

    /// The elements of the segments of all ranks that play in `places`.
    fn range(&self, segment: &dyn Fn(usize) -> Range<usize>, places: Range<usize>) -> Range<usize> {
        let first = |place: usize| if place < self.pairs { 2 * place } else { place + self.pairs };
        segment(first(places.start)).start..segment(first(places.end) - 1).end
    }
}

/// Halving: leaves the reduction of `places` that are this rank's alone. Returns the last run of it.
fn halve(
    schedule: &mut Schedule,
    fold: &Fold,
    segment: &dyn Fn(usize) -> Range<usize>,
    (place, mut last): (usize, Option<Run>),
) -> Option<Run> {
    let (mut places, mut distance) = (0..fold.players, fold.players / 2);
    while distance > 0 {
        let partner = fold.rank(place ^ distance);
        let middle = places.start + distance;
        let (kept, given) = match place & distance {
            0 => (places.start..middle, middle..places.end),
            _ => (middle..places.end, places.start..middle),
        };
        let what = if distance == 1 { What::Finish } else { What::Reduce };
        schedule.add(partner, What::Send, fold.range(segment, given), last.as_ref());
        last = Some(schedule.add(partner, what, fold.range(segment, kept.clone()), last.as_ref()));
        places = kept;
        distance /= 2;
    }
    last
}

/// Doubling: gathers what all players have. `last` brings what this rank has at first; with what is returned,
/// everything is there.
fn double(
    schedule: &mut Schedule,
    fold: &Fold,
    segment: &dyn Fn(usize) -> Range<usize>,
    (place, mut last): (usize, Option<Run>),
) -> Option<Run> {
    let (mut places, mut distance) = (place..place + 1, 1);
    while distance < fold.players {
        let partner = fold.rank(place ^ distance);
        let theirs = match place & distance {
            0 => places.end..places.end + distance,
            _ => places.start - distance..places.start,
        };
        let before = last.as_ref().map(Run::whole);
        schedule.add(partner, What::Send, fold.range(segment, places.clone()), before.as_ref());
        last = Some(schedule.add(partner, What::Copy, fold.range(segment, theirs.clone()), before.as_ref()));
        places = places.start.min(theirs.start)..places.end.max(theirs.end);
        distance *= 2;
    }
    last.as_ref().map(Run::whole)
}

/// Longer all-reduces are done in blocks of so many chunks (4 MiB), one after the other: what one step has received is
/// still in the cache when the next one sends it. The order of the sums is the same for every number, so blocks change no
/// bit.
pub(crate) const BLOCK: usize = 16;

/// Leaves the reduction in everyone's working numbers.
pub(crate) fn all_reduce(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    let fold = Fold::new(place.size);
    let mut schedule = place.schedule();
    let whole = fold.range(segment, 0..fold.players);
    match fold.role(place.rank) {
        Role::Waits { player } => {
            schedule.add(player, What::Send, whole.clone(), None);
            schedule.add(player, What::Copy, whole, None);
        }
        Role::Plays { place, partner } => {
            let folded = partner.map(|partner| schedule.add(partner, What::Reduce, whole.clone(), None));
            let last = halve(&mut schedule, &fold, segment, (place, folded));
            let last = double(&mut schedule, &fold, segment, (place, last));
            if let Some(partner) = partner {
                schedule.add(partner, What::Send, whole, last.as_ref());
            }
        }
    }
    schedule
}

/// Leaves the reduction of everyone's `rank`-th segment in that segment; the others are overwritten.
pub(crate) fn reduce_scatter(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    let fold = Fold::new(place.size);
    let mut schedule = place.schedule();
    let whole = fold.range(segment, 0..fold.players);
    match fold.role(place.rank) {
        Role::Waits { player } => {
            schedule.add(player, What::Send, whole, None);
            schedule.add(player, What::Copy, segment(place.rank), None);
        }
        Role::Plays { place, partner } => {
            let folded = partner.map(|partner| schedule.add(partner, What::Reduce, whole, None));
            let last = halve(&mut schedule, &fold, segment, (place, folded));
            if let Some(partner) = partner {
                schedule.add(partner, What::Send, segment(partner), last.as_ref());
            }
        }
    }
    schedule
}

/// Gathers everyone's own segment.
pub(crate) fn all_gather(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    let fold = Fold::new(place.size);
    let mut schedule = place.schedule();
    match fold.role(place.rank) {
        Role::Waits { player } => {
            schedule.add(player, What::Send, segment(place.rank), None);
            schedule.add(player, What::Copy, fold.range(segment, 0..fold.players), None);
        }
        Role::Plays { place, partner } => {
            // With its partner's segment, which comes first, a player has one range.
            let came = partner.map(|partner| schedule.add(partner, What::Copy, segment(partner), None));
            let last = double(&mut schedule, &fold, segment, (place, came));
            if let Some(partner) = partner {
                schedule.add(partner, What::Send, fold.range(segment, 0..fold.players), last.as_ref());
            }
        }
    }
    schedule
}
