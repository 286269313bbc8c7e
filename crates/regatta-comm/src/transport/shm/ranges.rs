//! Which ranges of a segment are free.

use std::ops::Range;

/// Free ranges, sorted; neighbours are joined.
#[derive(Default)]
pub(super) struct Ranges(Vec<Range<usize>>);

impl Ranges {
    /// Takes `len` bytes from the first range that is long enough; returns where they begin.
    pub(super) fn take(&mut self, len: usize) -> Option<usize> {
        let index = self.0.iter().position(|range| range.len() >= len)?;
        let start = self.0[index].start;
        if self.0[index].len() == len {
            self.0.remove(index);
        } else {
            self.0[index].start += len;
        }
        Some(start)
    }

    /// Makes `range` free again.
    pub(super) fn give(&mut self, mut range: Range<usize>) {
        let mut index = self.0.partition_point(|free| free.start < range.start);
        if self.0.get(index).is_some_and(|next| next.start == range.end) {
            range.end = self.0.remove(index).end;
        }
        if index > 0 && self.0[index - 1].end == range.start {
            index -= 1;
            range.start = self.0.remove(index).start;
        }
        self.0.insert(index, range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_one_range_again() {
        for order in [[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]] {
            let mut ranges = Ranges::default();
            ranges.give(100..400);
            let taken: Vec<_> = (0..3).map(|_| ranges.take(100).unwrap()).collect();
            assert_eq!((taken.as_slice(), ranges.take(1)), ([100, 200, 300].as_slice(), None));
            for index in order {
                ranges.give(taken[index]..taken[index] + 100);
            }
            assert_eq!((ranges.take(301), ranges.take(300)), (None, Some(100)));
        }
    }

    #[test]
    fn the_first_range_that_is_long_enough_is_taken_from() {
        let mut ranges = Ranges::default();
        for range in [0..10, 20..50, 60..100] {
            ranges.give(range);
        }
        assert_eq!((ranges.take(20), ranges.take(10), ranges.take(41)), (Some(20), Some(0), None));
        assert_eq!(ranges.0, [40..50, 60..100]);
    }
}
