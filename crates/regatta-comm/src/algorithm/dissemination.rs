//! Dissemination barrier (Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization"): ceil(log2 n)
//! steps, in each of which a rank tells the one 2^k places to its right that it and all it has heard of are there.

use super::schedule::{Schedule, What};
use crate::algorithm::session::Place;

/// Completes when all ranks have begun.
pub(crate) fn barrier(place: Place) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    let (mut distance, mut last) = (1, None);
    while distance < size {
        let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
        schedule.add(to, What::Send, 0..0, last.as_ref());
        last = Some(schedule.add(from, What::Copy, 0..0, last.as_ref()));
        distance *= 2;
    }
    schedule
}
