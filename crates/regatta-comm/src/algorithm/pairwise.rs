//! Pairwise exchange for all-to-all: in step k a rank sends to the one k places to its right and receives from the
//! one k places to its left. Cost per rank for B bytes: n-1 steps and (n-1)/n * B bytes sent, the least possible.

use super::schedule::{Schedule, What};
use crate::algorithm::session::Place;
use std::ops::Range;

/// From the input's segments `sent` (by receiver) into the working segments `received` (by sender).
pub(crate) fn all_to_all(
    place: Place,
    sent: &dyn Fn(usize) -> Range<usize>,
    received: &dyn Fn(usize) -> Range<usize>,
) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    for step in 1..size {
        let (to, from) = ((rank + step) % size, (rank + size - step) % size);
        schedule.add(to, What::SendInput, sent(to), None);
        schedule.add(from, What::Copy, received(from), None);
    }
    schedule
}
