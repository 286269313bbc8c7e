//! How a whole is divided among ranks.

use std::ops::Range;

/// Where each rank's part of a whole lies.
pub(crate) struct Parts(Vec<Range<usize>>);

impl Parts {
    /// No parts: the operation is on the whole.
    pub(crate) const NONE: Self = Self(vec![]);

    /// One after the other, as long as `counts` says.
    pub(crate) fn of(counts: &[usize]) -> Self {
        let mut end = 0;
        let next = |&count: &usize| {
            end += count;
            end - count..end
        };
        Self(counts.iter().map(next).collect())
    }

    /// `size` parts of `each`.
    pub(crate) fn even(size: usize, each: usize) -> Self {
        Self((0..size).map(|index| index * each..(index + 1) * each).collect())
    }

    pub(crate) fn get(&self, index: usize) -> Range<usize> {
        self.0[index].clone()
    }

    /// The length of all together.
    pub(crate) fn total(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    /// The length of the longest.
    pub(crate) fn longest(&self) -> usize {
        self.0.iter().map(Range::len).max().unwrap_or(0)
    }
}
