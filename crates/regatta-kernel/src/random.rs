//! Counter-based random numbers: the n-th number of a stream is a function of (seed, stream, n) alone.
//!
//! So initial weights depend on a parameter's path and not on how the model is cut, dropout masks on the step
//! and not on what ran before (which makes resuming exact), and ranks that are threads do not share a state.

/// SplitMix64's finaliser (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators").
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
        Self(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)))
    }

    /// An independent stream for a number, as a step, a rank or a layer.
    pub fn at(self, number: u64) -> Self {
        Self(mix(self.0 ^ mix(number.wrapping_add(0x9e37_79b9_7f4a_7c15))))
    }

    /// An independent stream for a name.
    pub fn named(self, name: &str) -> Self {
        name.bytes().fold(self, |stream, byte| Self(mix(stream.0 ^ (u64::from(byte) + 1))))
    }

    /// The n-th number, uniform over all of u64.
    #[inline(always)]
    pub fn bits(self, n: u64) -> u64 {
        mix(self.0.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// The n-th number, uniform in [0, 1).
    pub fn uniform(self, n: u64) -> f32 {
        (self.bits(n) >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// `len` numbers from the normal distribution (Box & Muller 1958), mean 0.
    pub fn normal(self, len: usize, deviation: f32) -> Vec<f32> {
        let mut out = Vec::with_capacity(len + 1);
        for pair in 0..len.div_ceil(2) as u64 {
            let bits = self.bits(pair);
            // In (0, 1], so that the logarithm is finite.
            let u = ((bits >> 40) + 1) as f32 * (1.0 / (1u64 << 24) as f32);
            let angle = (bits & 0xff_ffff) as f32 * (std::f32::consts::TAU / (1u64 << 24) as f32);
            let radius = (-2.0 * u.ln()).sqrt() * deviation;
            let (sin, cos) = angle.sin_cos();
            out.extend([radius * cos, radius * sin]);
        }
        out.truncate(len);
        out
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
    fn streams_differ_and_repeat() {
        let stream = Stream::new(7);
        assert_eq!(stream.at(1).bits(5), Stream::new(7).at(1).bits(5));
        assert_ne!(stream.at(1).bits(5), stream.at(2).bits(5));
        assert_ne!(stream.named("a").bits(0), stream.named("b").bits(0));
        assert_ne!(stream.bits(0), Stream::new(8).bits(0));
    }
}
