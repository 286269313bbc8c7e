//! Dropout (Srivastava et al. 2014), whose masks are drawn again in backward and never kept.

use crate::parallel::for_chunks;
use crate::random::Stream;
use crate::simd::vectorized;

/// Which elements are dropped: a function of the stream and of an element's number.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The random numbers.
    pub noise: Stream,
    /// The probability of being dropped, 0 to below 1.
    pub rate: f32,
}

const CHUNK: usize = 1 << 13;

vectorized! {
    fn drop_run(noise: Stream, rate: f32, keep: f32, first: u64, values: &mut [f32]) {
        for (number, x) in (first..).zip(values) {
            *x *= if noise.uniform(number) < rate { 0.0 } else { keep };
        }
    }
}

impl Dropout {
    /// What an element is multiplied by: 0, or one over the probability of being kept.
    #[inline(always)]
    pub fn factor(&self, number: u64) -> f32 {
        if self.noise.uniform(number) < self.rate { 0.0 } else { 1.0 / (1.0 - self.rate) }
    }

    /// Drops elements of `values`, which are numbered from `first` on; in place. Backward is the same with gradients.
    pub fn apply(&self, first: u64, values: &mut [f32]) {
        let keep = 1.0 / (1.0 - self.rate);
        for_chunks(values, CHUNK, |index, values| {
            drop_run(self.noise, self.rate, keep, first + (index * CHUNK) as u64, values);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_by_number_alone() {
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
