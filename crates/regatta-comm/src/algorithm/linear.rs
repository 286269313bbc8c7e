//! To and from one rank directly: n-1 messages at the root at once, nothing on the way. Cost for B bytes in all: one
//! step, (n-1)/n * B bytes through the root's link, which no algorithm can do without.

use super::schedule::{Schedule, What};
use crate::algorithm::session::Place;
use std::ops::Range;

/// Everyone's `own` numbers into the root's `segment`s.
pub(crate) fn gather(
    place: Place,
    root: usize,
    own: Range<usize>,
    segment: &dyn Fn(usize) -> Range<usize>,
) -> Schedule {
    let mut schedule = place.schedule();
    if place.rank != root {
        schedule.add(root, What::SendInput, own, None);
        return schedule;
    }
    for peer in place.others() {
        schedule.add(peer, What::Copy, segment(peer), None);
    }
    schedule
}

/// The root's `segment`s into everyone's `own` numbers.
pub(crate) fn scatter(
    place: Place,
    root: usize,
    own: Range<usize>,
    segment: &dyn Fn(usize) -> Range<usize>,
) -> Schedule {
    let mut schedule = place.schedule();
    if place.rank != root {
        schedule.add(root, What::Copy, own, None);
        return schedule;
    }
    for peer in place.others() {
        schedule.add(peer, What::SendInput, segment(peer), None);
    }
    schedule
}
