//! Elementary functions without branches or tables, so that loops that call them can be vectorised.

use std::f32::consts::LOG2_E;

/// `e^x` within 2 units in the last place. The result is 0 for `x` below -87.4, infinite above 88.8, and NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // e^x = 2^k e^r with |r| <= ln(2) / 2. ln(2) is the sum of two constants, the first with few digits, so that r is
    // exact (Cody & Waite 1980, "Software Manual for the Elementary Functions").
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this constant rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.4 { -104.0 } else { x };
    let clamped = if clamped > 88.8 { 89.0 } else { clamped };
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, clamped));
    // e^r = 1 + r + r^2 P(r); P is the polynomial of Moshier's Cephes library.
    let p = 1.987_569_2e-4f32.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^k as a product of two factors, because 2^128 and 2^-150 cannot be represented.
    let k = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let power = |k: i32| f32::from_bits((k.wrapping_add(127) << 23).cast_unsigned());
    let half = k >> 1;
    y * power(half) * power(k.wrapping_sub(half))
}

/// The standard normal distribution at `x`: the probability of a smaller value, and the density.
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    // Phi(-|x|) = exp(-z^2) erfcx(z) / 2 with z = |x| / sqrt(2), and erfcx(z) = t P(t) with t = 1 / (1 + 0.49 z):
    // The relative error is below 4e-8, even for large |x|, where 1 - erf(z) would be 0. The coefficients were fitted.
    const P: [f32; 9] = [
        0.276_430_96,
        0.277_031_15,
        0.236_837_92,
        0.216_338_22,
        -0.057_503_484,
        0.343_621_52,
        -0.519_987_5,
        0.282_926,
        -0.055_694_744,
    ];
    const ONE_OVER_SQRT_2_PI: f32 = 0.398_942_3;
    let e = exp(-0.5 * x * x);
    let t = 1.0 / (0.49 * std::f32::consts::FRAC_1_SQRT_2).mul_add(x.abs(), 1.0);
    let mut p = P[P.len() - 1];
    let mut i = P.len() - 1;
    while i > 0 {
        i -= 1;
        p = p.mul_add(t, P[i]);
    }
    let tail = 0.5 * e * t * p;
    (if x < 0.0 { tail } else { 1.0 - tail }, ONE_OVER_SQRT_2_PI * e)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_f64() {
        for i in -880_000..=887_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs();
            // Results below the smallest normal number may be 0.
            assert!(error <= 1.5e-7 * expected + 1.2e-38, "exp({x}) = {}, expected {expected}", exp(x));
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    /// Phi in f64: by its Taylor series near 0, and by its continued fraction elsewhere.
    pub(crate) fn phi(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= x * x / (2 * n + 1) as f64;
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let fraction = (1..200).rev().fold(x.abs(), |rest, n| x.abs() + n as f64 / rest);
        if x < 0.0 { density / fraction } else { 1.0 - density / fraction }
    }

    #[test]
    fn normal_agrees_with_f64() {
        for i in -12_000..=12_000 {
            let x = i as f32 * 1e-3;
            let (below, density) = normal(x);
            let expected = phi(f64::from(x));
            // An error in the last place of x^2 is an error in the exponent.
            let bound = 4e-7 + 6e-8 * f64::from(x * x);
            assert!(
                (f64::from(below) - expected).abs() <= bound * expected + 1.2e-38,
                "{x}: {below} {expected}"
            );
            let expected = (-0.5 * f64::from(x) * f64::from(x)).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!(
                (f64::from(density) - expected).abs() <= bound * expected + 1.2e-38,
                "{x}: {density} {expected}"
            );
        }
    }
}
