//! Recursive doubling: in log2 n steps partners exchange everything they have and both reduce it. Cost per rank for B
//! bytes: log2 n steps and log2 n * B bytes sent; for small messages, where steps are what costs. Other numbers of ranks
//! than powers of two fold first, as in [`halving_doubling`](super::halving_doubling): two more steps.

use super::schedule::{Schedule, What};
use crate::algorithm::session::Place;

/// Leaves the reduction of `len` numbers in everyone's.
pub(crate) fn all_reduce(place: Place, len: usize) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    let players = 1usize << size.ilog2();
    let pairs = size - players;
    if rank < 2 * pairs && rank.is_multiple_of(2) {
        schedule.add(rank + 1, What::Send, 0..len, None);
        schedule.add(rank + 1, What::Copy, 0..len, None);
        return schedule;
    }
    let folded = rank < 2 * pairs;
    let own = if folded { rank / 2 } else { rank - pairs };
    let rank_of = |place: usize| if place < pairs { 2 * place + 1 } else { place + pairs };
    let mut last = folded.then(|| schedule.add(rank - 1, What::Reduce, 0..len, None));
    let mut distance = 1;
    while distance < players {
        let partner = rank_of(own ^ distance);
        let what = if 2 * distance == players { What::Finish } else { What::Reduce };
        // Both send what they had before they reduce.
        let sent = schedule.add(partner, What::Send, 0..len, last.as_ref());
        last = Some(schedule.add(partner, what, 0..len, Some(&sent)));
        distance *= 2;
    }
    if folded {
        schedule.add(rank - 1, What::Send, 0..len, last.as_ref());
    }
    schedule
}
