//! One bit a number: its sign, with the mean of the absolute values of a block (Seide et al. 2014, "1-Bit Stochastic
//! Gradient Descent"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD").

use crate::simd::vectorized;

/// Numbers in a block.
pub const BLOCK: usize = 1024;
/// Bytes of a block's mean.
const MEAN: usize = size_of::<f32>();

/// Bytes of `len` encoded numbers.
pub fn bytes(len: usize) -> usize {
    let rest = len % BLOCK;
    len / BLOCK * (MEAN + BLOCK / 8) + if rest == 0 { 0 } else { MEAN + rest.div_ceil(8) }
}

/// Encodes `values`.
///
/// # Panics
/// If `out` does not have [`bytes`] of the number of values.
pub fn encode(values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), bytes(values.len()), "the length of encoded signs");
    for (values, out) in values.chunks(BLOCK).zip(out.chunks_mut(MEAN + BLOCK / 8)) {
        let (head, signs) = out.split_at_mut(MEAN);
        head.copy_from_slice(&(sum_of_sizes(values) / values.len() as f32).to_le_bytes());
        pack(values, signs);
    }
}

/// Decodes numbers and multiplies them by `factor`; adds them to `out`, or replaces it.
///
/// # Panics
/// If `encoded` has not [`bytes`] of the length of `out`.
pub fn decode(encoded: &[u8], factor: f32, add: bool, out: &mut [f32]) {
    assert_eq!(encoded.len(), bytes(out.len()), "the length of encoded signs");
    for (bytes, out) in encoded.chunks(MEAN + BLOCK / 8).zip(out.chunks_mut(BLOCK)) {
        let (head, signs) = bytes.split_at(MEAN);
        if !add {
            out.fill(0.0);
        }
        unpack(signs, f32::from_le_bytes([head[0], head[1], head[2], head[3]]) * factor, out);
    }
}

vectorized! {
    fn sum_of_sizes(values: &[f32]) -> f32 {
        const LANES: usize = 16;
        let mut sums = [0.0f32; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest: f32 = chunks.remainder().iter().map(|x| x.abs()).sum();
        for chunk in chunks {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum += x.abs();
            }
        }
        sums.iter().sum::<f32>() + rest
    }
}

vectorized! {
    /// A bit is set where the number is negative.
    fn pack(values: &[f32], signs: &mut [u8]) {
        for (values, signs) in values.chunks(8).zip(signs) {
            let bits = values.iter().enumerate().map(|(bit, x)| ((x.to_bits() >> 31) as u8) << bit);
            *signs = bits.fold(0, |all, bit| all | bit);
        }
    }
}

vectorized! {
    fn unpack(signs: &[u8], size: f32, out: &mut [f32]) {
        let (eights, rest) = out.as_chunks_mut::<8>();
        let number = |signs: u8, bit: usize| f32::from_bits(size.to_bits() ^ (u32::from(signs >> bit & 1) << 31));
        for (eight, &signs) in eights.iter_mut().zip(signs) {
            for (bit, x) in eight.iter_mut().enumerate() {
                *x += number(signs, bit);
            }
        }
        if let Some(&signs) = signs.get(eights.len()) {
            rest.iter_mut().enumerate().for_each(|(bit, x)| *x += number(signs, bit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn signs_and_means_come_back(len in 0usize..2500, seed: u64, factor in -2.0f32..2.0) {
            let numbers = values(seed, len, 1.0);
            let mut encoded = vec![0xff; bytes(len)];
            encode(&numbers, &mut encoded);
            let (mut out, mut sum) = (vec![f32::NAN; len], vec![3.0; len]);
            decode(&encoded, factor, false, &mut out);
            decode(&encoded, factor, true, &mut sum);
            for (block, (out, sum)) in numbers.chunks(BLOCK).zip(out.chunks(BLOCK).zip(sum.chunks(BLOCK))) {
                let mean = block.iter().map(|x| f64::from(x.abs())).sum::<f64>() / block.len() as f64;
                for ((x, y), sum) in block.iter().zip(out).zip(sum) {
                    let expected = mean * f64::from(x.signum() * factor);
                    prop_assert!((f64::from(*y) - expected).abs() < 1e-5 * (1.0 + mean), "{x} {y} {expected}");
                    prop_assert!((sum - (3.0 + y)).abs() < 1e-5);
                }
            }
        }

        /// What is lost is less than what there was: `|x - C(x)|^2 = |x|^2 - |x|_1^2 / n` (Karimireddy et al., lemma 8).
        #[test]
        fn encoding_is_a_contraction(len in 1usize..1024, seed: u64) {
            let numbers = values(seed, len, 1.0);
            let mut encoded = vec![0; bytes(len)];
            encode(&numbers, &mut encoded);
            let mut error = numbers.clone();
            decode(&encoded, -1.0, true, &mut error);
            let square = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            let sizes: f64 = numbers.iter().map(|&x| f64::from(x.abs())).sum();
            let expected = square(&numbers) - sizes * sizes / len as f64;
            prop_assert!((square(&error) - expected).abs() < 1e-4 * (1.0 + square(&numbers)));
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let mut numbers = vec![1.0; 1025];
        numbers[3] = f32::NAN;
        let (mut encoded, mut out) = (vec![0; bytes(1025)], vec![0.0; 1025]);
        encode(&numbers, &mut encoded);
        decode(&encoded, 1.0, false, &mut out);
        assert!(out[3].is_nan() && out[1024] == 1.0);
    }
}
