//! Dropout (Srivastava et al. 2014). Masks are not stored: backward draws the same mask again.

use crate::parallel::for_chunks;
use crate::random::Stream;
use crate::simd::vectorized;

/// Decides which elements are dropped, as a function of the stream and of the element's number.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The stream of random numbers; number `n` of it decides about element `n`.
    pub noise: Stream,
    /// The probability that an element is dropped, at least 0 and below 1.
    pub rate: f32,
}

/// Which samples of the global batch are the rows of a micro-batch: row `i` is sample `first + i * stride`. Masks are
/// drawn per sample, so they do not depend on how samples are assigned to workers and micro-batches.
///
/// ```
/// use regatta_kernel::dropout::SampleRows;
/// // The second of three workers has every third sample.
/// let rows = SampleRows { first: 1, stride: 3 };
/// assert_eq!((rows.sample(0), rows.sample(2)), (1, 7));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleRows {
    /// The sample of row 0.
    pub first: usize,
    /// Samples from one row to the next.
    pub stride: usize,
}

impl SampleRows {
    /// Row `i` is sample `i`.
    pub const ALL: Self = Self { first: 0, stride: 1 };

    /// The sample at row `row`.
    #[inline(always)]
    pub fn sample(self, row: usize) -> usize {
        self.first + row * self.stride
    }

    /// The rows `rows` of these rows: row `i` of the result is row `rows.sample(i)` of `self`.
    #[must_use]
    pub fn of(self, rows: Self) -> Self {
        Self { first: self.sample(rows.first), stride: self.stride * rows.stride }
    }
}

/// The random numbers of one operation in a model, for the rows of a micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    /// The stream of random numbers for all samples of the global batch.
    pub stream: Stream,
    /// Which samples are the rows.
    pub rows: SampleRows,
}

/// Elements that one task processes.
const CHUNK: usize = 1 << 13;

vectorized! {
    fn drop_elements(noise: Stream, rate: f32, scale: f32, first: u64, values: &mut [f32]) {
        for (number, x) in (first..).zip(values) {
            *x *= if noise.uniform(number) < rate { 0.0 } else { scale };
        }
    }
}

impl Dropout {
    /// The factor of element `number`: 0 if it is dropped, else `1 / (1 - rate)`.
    #[inline(always)]
    pub fn factor(&self, number: u64) -> f32 {
        if self.noise.uniform(number) < self.rate { 0.0 } else { 1.0 / (1.0 - self.rate) }
    }

    /// Drops elements of `values` in place and scales the others. The elements are numbered from `first` on. Backward
    /// is the same call with the gradients.
    pub fn apply(&self, first: u64, values: &mut [f32]) {
        let scale = 1.0 / (1.0 - self.rate);
        for_chunks(values, CHUNK, |index, values| {
            drop_elements(self.noise, self.rate, scale, first + (index * CHUNK) as u64, values);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_depend_only_on_the_element_number() {
        let dropout = Dropout { noise: Stream::new(3), rate: 0.25 };
        let mut all = vec![1.0; 40_000];
        dropout.apply(7, &mut all);
        let kept = all.iter().filter(|x| **x > 0.0).count();
        assert!(all.iter().all(|x| *x == 0.0 || *x == 1.0 / 0.75), "an element is dropped or scaled");
        assert!((kept as f64 / all.len() as f64 - 0.75).abs() < 0.02, "{kept}");
        let mut part = vec![1.0; 100];
        dropout.apply(7 + 20_000, &mut part);
        assert_eq!(part, all[20_000..20_100]);
        assert!((0..100).all(|i| part[i] == dropout.factor(20_007 + i as u64)));
    }
}
