//! Ring algorithms (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
//! workstations").
//!
//! The data is cut into n segments. In n-1 steps each rank sends one segment to its right neighbour while it
//! receives another from its left and adds its own numbers; then in n-1 more steps the finished segments go
//! around. Cost per rank for B bytes: all-reduce 2(n-1) steps and 2(n-1)/n * B bytes sent; reduce-scatter and
//! all-gather, its halves, half of that; broadcast and reduce (chains) n-1 steps and B bytes.
//!
//! What a rank sends in one step is what it received in the step before, chunk by chunk: no step waits for a whole
//! segment.

use super::schedule::{Run, Schedule, What};
use crate::algorithm::session::Place;
use std::ops::Range;

/// `reducing` steps that reduce, then steps that overwrite, up to `steps` in all. In step 0 the segment `first` is
/// sent; each later step sends the one before.
fn around(
    place: Place,
    segment: &dyn Fn(usize) -> Range<usize>,
    first: usize,
    (reducing, steps): (usize, usize),
) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let mut last: Option<Run> = None;
    for step in 0..steps {
        let sent = segment((first + steps * size - step) % size);
        let received = segment((first + (steps + 1) * size - step - 1) % size);
        let what = match step {
            step if step + 1 == reducing => What::Finish,
            step if step < reducing => What::Reduce,
            _ => What::Copy,
        };
        schedule.add(right, What::Send, sent, last.as_ref());
        last = Some(schedule.add(left, what, received, None));
    }
    schedule
}

/// Leaves the reduction in everyone's working numbers, which are cut into `segment`s.
pub(crate) fn all_reduce(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    let steps = place.size - 1;
    around(place, segment, place.rank, (steps, 2 * steps))
}

/// Leaves the reduction of everyone's `rank`-th segment in that segment; the others are overwritten.
pub(crate) fn reduce_scatter(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    let Place { rank, size, .. } = place;
    around(place, segment, (rank + size - 1) % size, (size - 1, size - 1))
}

/// Gathers everyone's own segment.
pub(crate) fn all_gather(place: Place, segment: &dyn Fn(usize) -> Range<usize>) -> Schedule {
    around(place, segment, place.rank, (0, place.size - 1))
}

/// Along a chain that begins at the root.
pub(crate) fn broadcast(place: Place, root: usize, len: usize) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let came = (rank != root).then(|| schedule.add(left, What::Copy, 0..len, None));
    if right != root {
        schedule.add(right, What::Send, 0..len, came.as_ref());
    }
    schedule
}

/// Along a chain that ends at the root.
pub(crate) fn reduce(place: Place, root: usize, len: usize) -> Schedule {
    let Place { rank, size, .. } = place;
    let mut schedule = place.schedule();
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let what = if rank == root { What::Finish } else { What::Reduce };
    let came = (left != root).then(|| schedule.add(left, what, 0..len, None));
    if rank != root {
        schedule.add(right, What::Send, 0..len, came.as_ref());
    }
    schedule
}
