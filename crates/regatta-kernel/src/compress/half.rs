//! Numbers of 16 bits, as bits.

use crate::simd::vectorized;

vectorized! {
    /// Rounds to bfloat16: to the nearest number, and to even ones in the middle.
    pub fn to_bf16(values: &[f32], out: &mut [u16]) {
        for (x, out) in values.iter().zip(out) {
            let bits = x.to_bits();
            let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
            // Rounding could make infinity of a NaN.
            *out = if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded };
        }
    }
}

vectorized! {
    /// The numbers that bfloat16's bits stand for.
    pub fn from_bf16(bits: &[u16], out: &mut [f32]) {
        for (bits, out) in bits.iter().zip(out) {
            *out = f32::from_bits(u32::from(*bits) << 16);
        }
    }
}

/// Rounds to IEEE 754's 16 bits; what is larger than 65504 becomes infinite.
///
/// # Panics
/// If the lengths differ.
pub fn to_f16(values: &[f32], out: &mut [u16]) {
    use half::slice::HalfFloatSliceExt;
    bytemuck::cast_slice_mut::<u16, half::f16>(out).convert_from_f32_slice(values);
}

/// The numbers that IEEE 754's 16 bits stand for.
///
/// # Panics
/// If the lengths differ.
pub fn from_f16(bits: &[u16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    bytemuck::cast_slice::<u16, half::f16>(bits).convert_to_f32_slice(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_the_crate_half(bits: u32) {
            let x = f32::from_bits(bits);
            let (mut out, mut back) = ([0; 3], [0.0; 3]);
            to_bf16(&[x; 3], &mut out);
            from_bf16(&out, &mut back);
            let expected = half::bf16::from_f32(x);
            prop_assert_eq!(out[2], expected.to_bits());
            prop_assert_eq!(back[2].to_bits(), expected.to_f32().to_bits());
            to_f16(&[x; 3], &mut out);
            from_f16(&out, &mut back);
            prop_assert_eq!(back[1].is_nan(), x.is_nan());
            prop_assert!(x.is_nan() || back[1] == half::f16::from_f32(x).to_f32());
        }
    }
}
