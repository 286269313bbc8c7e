//! Numbers of 8 or 4 bits, with a scale for each block (Alistarh et al. 2017, "QSGD", section 3.3, with the largest number
//! of a block as its scale).
//!
//! A number lies between two codes. It becomes the nearer one with the larger probability, so that the mean of many
//! roundings is the number itself: sums over many ranks and steps are not biased, and nobody needs to keep the error.

use crate::simd::vectorized;

/// Numbers in a block.
pub const BLOCK: usize = 256;
/// Bytes of a block's scale.
const SCALE: usize = size_of::<f32>();

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Codes from -127 to 127.
    Eight,
    /// Codes from -7 to 7, two in a byte.
    Four,
}

impl Width {
    /// The largest code.
    fn largest(self) -> f32 {
        match self {
            Self::Eight => 127.0,
            Self::Four => 7.0,
        }
    }

    /// Bytes of the codes of `len` numbers of one block.
    fn codes(self, len: usize) -> usize {
        match self {
            Self::Eight => len,
            Self::Four => len.div_ceil(2),
        }
    }

    /// Bytes of `len` encoded numbers.
    pub fn bytes(self, len: usize) -> usize {
        let whole = len / BLOCK * (SCALE + self.codes(BLOCK));
        let rest = len % BLOCK;
        whole + if rest == 0 { 0 } else { SCALE + self.codes(rest) }
    }
}

/// Encodes `values`. `seed` decides how they are rounded: the same seed rounds the same numbers alike.
///
/// # Panics
/// If `out` does not have [`Width::bytes`] of the number of values.
pub fn encode(width: Width, values: &[f32], seed: u64, out: &mut [u8]) {
    assert_eq!(out.len(), width.bytes(values.len()), "the length of encoded numbers");
    let blocks = values.chunks(BLOCK).zip(out.chunks_mut(SCALE + width.codes(BLOCK)));
    for (index, (values, out)) in blocks.enumerate() {
        let largest = largest(values);
        let scale = largest / width.largest();
        let (head, codes) = out.split_at_mut(SCALE);
        head.copy_from_slice(&scale.to_le_bytes());
        // Below this the inverse is infinite; such a block is all zeros, or as good as that.
        let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let seed = mix(seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)) as u32;
        match width {
            Width::Eight => encode8(values, inverse, seed, codes),
            Width::Four => encode4(values, inverse, seed, codes),
        }
    }
}

/// Decodes numbers and multiplies them by `factor`; adds them to `out`, or replaces it.
///
/// # Panics
/// If `bytes` has not [`Width::bytes`] of the length of `out`.
pub fn decode(width: Width, bytes: &[u8], factor: f32, add: bool, out: &mut [f32]) {
    assert_eq!(bytes.len(), width.bytes(out.len()), "the length of encoded numbers");
    let blocks = bytes.chunks(SCALE + width.codes(BLOCK)).zip(out.chunks_mut(BLOCK));
    for (bytes, out) in blocks {
        let (head, codes) = bytes.split_at(SCALE);
        let scale = f32::from_le_bytes([head[0], head[1], head[2], head[3]]) * factor;
        if !add {
            out.fill(0.0);
        }
        match width {
            Width::Eight => decode8(codes, scale, out),
            Width::Four => decode4(codes, scale, out),
        }
    }
}

/// The finaliser of SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators").
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number in `[0, 1)` for the `index`-th number of a block.
#[inline(always)]
fn uniform(seed: u32, index: u32) -> f32 {
    // A hash of 32 bits whose rounds are those of MurmurHash3's finaliser: vector units have these operations.
    let mut x = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9));
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    ((x ^ (x >> 16)) >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}

/// The low byte of a whole number of a few bits. Added to 1.5 * 2^23, it stands in the low bits of the sum: a conversion to
/// an integer, which looks for numbers that are not, would keep loops from being vectorised.
#[inline(always)]
fn low_byte(x: f32) -> u8 {
    (x + 12_582_912.0).to_bits() as u8
}

vectorized! {
    /// The largest absolute value; not finite where one of them is not.
    pub(super) fn largest(values: &[f32]) -> f32 {
        const LANES: usize = 16;
        let mut most = [0u32; LANES];
        let chunks = values.chunks_exact(LANES);
        // Without the sign, the order of floats is that of their bits, and what is not finite comes last.
        let bits = |x: f32| x.to_bits() & 0x7fff_ffff;
        let rest = chunks.remainder().iter().map(|&x| bits(x)).max().unwrap_or(0);
        for chunk in chunks {
            for (most, &x) in most.iter_mut().zip(chunk) {
                *most = (*most).max(bits(x));
            }
        }
        f32::from_bits(most.iter().fold(rest, |all, &most| all.max(most)))
    }
}

vectorized! {
    fn encode8(values: &[f32], inverse: f32, seed: u32, codes: &mut [u8]) {
        for (index, (x, code)) in values.iter().zip(codes).enumerate() {
            let rounded = (x * inverse + uniform(seed, index as u32)).floor();
            *code = low_byte(rounded.clamp(-127.0, 127.0));
        }
    }
}

vectorized! {
    fn encode4(values: &[f32], inverse: f32, seed: u32, codes: &mut [u8]) {
        let mut single = [0u8; BLOCK];
        for (index, (x, code)) in values.iter().zip(&mut single).enumerate() {
            let rounded = (x * inverse + uniform(seed, index as u32)).floor();
            *code = low_byte(rounded.clamp(-7.0, 7.0)) & 15;
        }
        for ([low, high], out) in single.as_chunks::<2>().0.iter().zip(codes) {
            *out = low | high << 4;
        }
    }
}

vectorized! {
    fn decode8(codes: &[u8], scale: f32, out: &mut [f32]) {
        for (code, x) in codes.iter().zip(out) {
            *x += f32::from(code.cast_signed()) * scale;
        }
    }
}

vectorized! {
    fn decode4(codes: &[u8], scale: f32, out: &mut [f32]) {
        // Shifting up and down again fills the upper bits with the sign.
        let number = |code: u8| f32::from((code << 4).cast_signed() >> 4) * scale;
        let (pairs, last) = out.as_chunks_mut::<2>();
        for (code, [low, high]) in codes.iter().zip(&mut *pairs) {
            *low += number(*code);
            *high += number(code >> 4);
        }
        if let [last] = last {
            *last += number(codes[pairs.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use proptest::prelude::*;

    const WIDTHS: [Width; 2] = [Width::Eight, Width::Four];

    fn round_trip(width: Width, numbers: &[f32], seed: u64) -> Vec<f32> {
        let mut bytes = vec![0xa5; width.bytes(numbers.len())];
        encode(width, numbers, seed, &mut bytes);
        let mut out = vec![f32::NAN; numbers.len()];
        decode(width, &bytes, 1.0, false, &mut out);
        out
    }

    proptest! {
        #[test]
        fn every_number_is_within_one_code(len in 0usize..700, deviation in 1e-20f32..1e20, seed: u64) {
            let numbers = values(seed, len, deviation);
            for width in WIDTHS {
                let out = round_trip(width, &numbers, seed);
                for (block, out) in numbers.chunks(BLOCK).zip(out.chunks(BLOCK)) {
                    let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    let code = most / width.largest();
                    for (x, y) in block.iter().zip(out) {
                        prop_assert!((x - y).abs() <= code * 1.0001, "{width:?} {x} {y} of {most}");
                    }
                }
            }
        }

        #[test]
        fn what_is_added_is_what_is_decoded(len in 0usize..700, seed: u64) {
            let (numbers, before) = (values(seed, len, 1.0), values(seed ^ 1, len, 1.0));
            for width in WIDTHS {
                let mut bytes = vec![0; width.bytes(len)];
                encode(width, &numbers, seed, &mut bytes);
                let (mut sum, mut alone) = (before.clone(), vec![0.0; len]);
                decode(width, &bytes, 0.5, true, &mut sum);
                decode(width, &bytes, 0.5, false, &mut alone);
                for ((sum, alone), before) in sum.iter().zip(&alone).zip(&before) {
                    prop_assert!((sum - (alone + before)).abs() <= 1e-6 * (1.0 + sum.abs()));
                }
            }
        }
    }

    #[test]
    fn the_mean_of_many_roundings_is_the_number() {
        let numbers: Vec<f32> = (0..64).map(|i| (i as f32 - 31.3) / 40.0).collect();
        for width in WIDTHS {
            let mut mean = vec![0.0f64; numbers.len()];
            const TIMES: u64 = 4000;
            for seed in 0..TIMES {
                for (mean, x) in mean.iter_mut().zip(round_trip(width, &numbers, seed)) {
                    *mean += f64::from(x) / TIMES as f64;
                }
            }
            // Five deviations of the mean of so many roundings of one code.
            let code = 0.8 / f64::from(width.largest());
            let bound = 5.0 * 0.5 * code / (TIMES as f64).sqrt();
            for (x, mean) in numbers.iter().zip(mean) {
                assert!((f64::from(*x) - mean).abs() < bound, "{width:?}: {x} became {mean} on average");
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for width in WIDTHS {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut numbers = vec![1.0; 300];
                numbers[7] = bad;
                let out = round_trip(width, &numbers, 1);
                assert!(!out[7].is_finite() && out[299].is_finite(), "{width:?} {bad}: {}", out[7]);
            }
            assert_eq!(round_trip(width, &[0.0, -0.0, 1e-45], 3)[..2], [0.0, 0.0]);
        }
    }
}
