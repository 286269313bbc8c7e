//! IEEE half precision to and from f32 in arithmetic that compilers vectorise: no branches, no tables, and no
//! look at the processor's features for every number (Giesen 2012, "Half to float done quic").

use half::f16;

/// The same value; exact. The payload of a NaN is kept.
#[inline(always)]
pub(crate) fn widen(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    // Exponent and mantissa in their new places; then the multiplication corrects the exponent's bias, and makes
    // subnormal numbers normal.
    let moved = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
    let not_finite = if bits & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
    f32::from_bits(moved.to_bits() | not_finite | (bits & 0x8000) << 16)
}

/// The nearest half, of two the even one. NaNs become the quiet NaN without payload.
#[inline(always)]
pub(crate) fn narrow(wide: f32) -> f16 {
    const INFINITY: u32 = 0xff << 23;
    /// 2^16, the first power of two that is too large.
    const TOO_LARGE: u32 = (127 + 16) << 23;
    /// 2^-14, the smallest normal half.
    const NORMAL: u32 = (127 - 14) << 23;
    /// Its last mantissa bit counts as much as that of a subnormal half, so adding it rounds to those.
    const DENORMAL: u32 = (127 - 15 + 23 - 10 + 1) << 23;
    let sign = wide.to_bits() & 0x8000_0000;
    let bits = wide.to_bits() ^ sign;
    let special = if bits > INFINITY { 0x7e00 } else { 0x7c00 };
    let subnormal = (f32::from_bits(bits) + f32::from_bits(DENORMAL)).to_bits().wrapping_sub(DENORMAL);
    let odd = bits >> 13 & 1;
    let normal = bits.wrapping_add((15u32.wrapping_sub(127) << 23).wrapping_add(0xfff + odd)) >> 13;
    let rounded = if bits < NORMAL { subnormal } else { normal };
    let half = if bits >= TOO_LARGE { special } else { rounded };
    f16::from_bits((half | sign >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_half_widens_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            assert_eq!(widen(half).is_nan(), half.is_nan());
            if !half.is_nan() {
                assert_eq!(widen(half).to_bits(), half.to_f32().to_bits(), "{bits:x}");
                assert_eq!(narrow(widen(half)), half, "{bits:x}");
            }
        }
        assert!(narrow(f32::NAN).is_nan());
    }

    #[test]
    fn halves_round_at_their_midpoints() {
        for bits in (0..0x7c00).flat_map(|bits| [bits, bits | 0x8000]) {
            let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let middle = if high.is_infinite() { low.signum() * 65520.0 } else { (low + high) / 2.0 };
            for wide in [middle, f32::from_bits(middle.to_bits() - 1), f32::from_bits(middle.to_bits() + 1)] {
                assert_eq!(narrow(wide).to_bits(), f16::from_f32_const(wide).to_bits(), "{wide:e}");
            }
        }
    }

    proptest! {
        #[test]
        fn narrows_as_the_reference_does(bits in any::<u32>()) {
            let wide = f32::from_bits(bits);
            prop_assert!(wide.is_nan() || narrow(wide).to_bits() == f16::from_f32_const(wide).to_bits(), "{wide:e}");
        }
    }
}
