//! How a whole is divided among ranks.

use std::ops::Range;

/// Where each rank's part of a whole lies.
pub(crate) struct Parts {
    /// Where each part begins, and where the last ends.
    starts: Vec<usize>,
}

impl Parts {
    /// No parts: the operation is on the whole.
    pub(crate) const NONE: Self = Self { starts: vec![] };

    /// As long as `counts` says.
    pub(crate) fn of(counts: &[usize]) -> Self {
        let mut starts = vec![0; counts.len() + 1];
        for (index, count) in counts.iter().enumerate() {
            starts[index + 1] = starts[index] + count;
        }
        Self { starts }
    }

    /// `size` parts of `each`.
    pub(crate) fn even(size: usize, each: usize) -> Self {
        Self { starts: (0..=size).map(|index| index * each).collect() }
    }

    pub(crate) fn get(&self, index: usize) -> Range<usize> {
        self.starts[index]..self.starts[index + 1]
    }

    /// The length of all together.
    pub(crate) fn total(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The length of the longest.
    pub(crate) fn longest(&self) -> usize {
        self.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }
}
