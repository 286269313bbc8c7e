//! Counter-based random numbers: number `n` of a stream is a function of the seed, the stream and `n` only.
//!
//! So initial weights depend on a parameter's path and not on how the model is split. Dropout masks depend on the
//! step and not on what ran before, so a resumed run draws the same ones. Ranks that are threads share no state.
//!
//! ```
//! use regatta_kernel::random::Stream;
//! let stream = Stream::new(1).named("layers.0.weight").at(7);
//! // Part of a tensor has the same numbers as the whole.
//! let mut part = [0.0; 2];
//! stream.fill_normal(3, 0.02, &mut part);
//! assert_eq!(part, stream.normal(8, 0.02)[3..5]);
//! ```

/// 2^64 divided by the golden ratio, the increment of SplitMix64.
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators").
#[inline(always)]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of random numbers.
#[derive(Debug, Clone, Copy)]
pub struct Stream(u64);

impl Stream {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(INCREMENT)))
    }

    /// An independent stream for a number, such as a step, a rank or a layer.
    pub fn at(self, number: u64) -> Self {
        Self(mix(self.0 ^ mix(number.wrapping_add(INCREMENT))))
    }

    /// An independent stream for a name.
    pub fn named(self, name: &str) -> Self {
        name.bytes().fold(self, |stream, byte| Self(mix(stream.0 ^ (u64::from(byte) + 1))))
    }

    /// Number `n`, uniform over all values of `u64`.
    #[inline(always)]
    pub fn bits(self, n: u64) -> u64 {
        mix(self.0.wrapping_add((n + 1).wrapping_mul(INCREMENT)))
    }

    /// Number `n`, uniform in `[0, 1)`.
    pub fn uniform(self, n: u64) -> f32 {
        (self.bits(n) >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// The first `len` numbers of the normal distribution with mean 0 and standard deviation `deviation`.
    pub fn normal(self, len: usize, deviation: f32) -> Vec<f32> {
        let mut out = vec![0.0; len];
        self.fill_normal(0, deviation, &mut out);
        out
    }

    /// Fills `out` with numbers of the normal distribution with mean 0 and standard deviation `deviation`: number
    /// `first` and those after it. So part of a tensor can be drawn without the rest.
    pub fn fill_normal(self, first: u64, deviation: f32, out: &mut [f32]) {
        let odd = usize::from(first % 2 == 1 && !out.is_empty());
        let (before, rest) = out.split_at_mut(odd);
        before.iter_mut().for_each(|x| *x = self.normal_pair(first / 2, deviation)[1]);
        let begin = first.div_ceil(2);
        for (pair, two) in rest.chunks_mut(2).enumerate() {
            let drawn = self.normal_pair(begin + pair as u64, deviation);
            two.copy_from_slice(&drawn[..two.len()]);
        }
    }

    /// Numbers `2 * pair` and `2 * pair + 1` of the normal distribution (Box & Muller 1958).
    fn normal_pair(self, pair: u64, deviation: f32) -> [f32; 2] {
        let bits = self.bits(pair);
        // In (0, 1], so that the logarithm is finite.
        let u = ((bits >> 40) + 1) as f32 * (1.0 / (1u64 << 24) as f32);
        let angle = (bits & 0xff_ffff) as f32 * (std::f32::consts::TAU / (1u64 << 24) as f32);
        let radius = (-2.0 * u.ln()).sqrt() * deviation;
        let (sin, cos) = angle.sin_cos();
        [radius * cos, radius * sin]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_the_distributions() {
        let stream = Stream::new(1).named("weights").at(3);
        let n = 100_000;
        let normal = stream.normal(n, 2.0);
        let mean = normal.iter().sum::<f32>() / n as f32;
        let variance = normal.iter().map(|x| x * x).sum::<f32>() / n as f32;
        assert!(mean.abs() < 0.03 && (variance - 4.0).abs() < 0.1, "mean {mean}, variance {variance}");
        let uniform = (0..n as u64).map(|i| stream.uniform(i)).sum::<f32>() / n as f32;
        assert!((uniform - 0.5).abs() < 0.01, "{uniform}");
    }

    #[test]
    fn parts_have_the_numbers_of_the_whole() {
        let stream = Stream::new(5);
        let whole = stream.normal(41, 1.5);
        for first in 0..41 {
            for end in first..=41 {
                let mut part = vec![0.0; end - first];
                stream.fill_normal(first as u64, 1.5, &mut part);
                assert_eq!(part, whole[first..end]);
            }
        }
    }

    #[test]
    fn streams_differ_and_repeat() {
        let stream = Stream::new(7);
        assert_eq!(stream.at(1).bits(5), Stream::new(7).at(1).bits(5));
        assert_ne!(stream.at(1).bits(5), stream.at(2).bits(5));
        assert_ne!(stream.named("a").bits(0), stream.named("b").bits(0));
        assert_ne!(stream.bits(0), Stream::new(8).bits(0));
    }
}
