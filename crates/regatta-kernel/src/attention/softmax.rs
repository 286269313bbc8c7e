//! Exponentials of a row of scores, and which of them are dropped.

use super::Pair;
use crate::random::Stream;
use pulp::Simd;

/// Less than any score, and a number: differences to it are numbers too.
pub(super) const LOWEST: f32 = -1e30;

/// `2^x` for `x` up to 127, within 2 units in the last place; 0 below -127.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding it rounds to a whole number, which is then in the low bits with the exponent's bias.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // (2^r - 1) / r for |r| <= 1/2; fitted, relative error of the whole 1e-7. 2^0 is exactly 1.
    #[allow(clippy::approx_constant)] // Near ln(2), and not it.
    const P: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
    // In this order, what is not a number stays so.
    let x = simd.max_f32s(simd.splat_f32s(-127.0), x);
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, simd.splat_f32s(ROUND)));
    let mut y = simd.splat_f32s(P[4]);
    for i in [3, 2, 1, 0] {
        y = simd.mul_add_e_f32s(y, r, simd.splat_f32s(P[i]));
    }
    let y = simd.mul_add_e_f32s(y, r, simd.splat_f32s(1.0));
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.mul_f32s(y, simd.transmute_f32s_u32s(power))
}

/// `value` in the numbers of `row` behind the first `visible`.
#[inline(always)]
pub(super) fn hide<S: Simd>(simd: S, row: &mut [f32], visible: usize, value: f32) {
    let (vectors, _) = S::as_mut_simd_f32s(row);
    let (whole, part) = (visible / S::F32_LANES, visible % S::F32_LANES);
    let Some(vectors) = vectors.get_mut(whole..) else { return };
    let hidden = simd.splat_f32s(value);
    let mut first = 0;
    if let (true, Some(vector)) = (part > 0, vectors.first_mut()) {
        let mask = simd.mask_between_m32s(0, part as u32).mask();
        *vector = simd.select_f32s(mask, *vector, hidden);
        first = 1;
    }
    for vector in &mut vectors[first..] {
        *vector = hidden;
    }
}

/// `value` where query `i` must not see a key, from key `first` on.
#[inline(always)]
pub(super) fn hide_masked(pair: &Pair<'_>, i: usize, first: usize, row: &mut [f32], value: f32) {
    if let Some(hidden) =
        pair.hidden.and_then(|hidden| hidden.get(i * pair.seen + first..(i + 1) * pair.seen))
    {
        for (score, &hidden) in row.iter_mut().zip(hidden) {
            *score = if hidden { value } else { *score };
        }
    }
}

/// What is known of a query's softmax so far.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// The largest score.
    pub(super) largest: f32,
    /// The sum of the exponentials, less the largest.
    pub(super) sum: f32,
}

impl State {
    pub(super) const NEW: Self = Self { largest: LOWEST, sum: 0.0 };

    /// Takes more `scores`, leaves their exponentials in their place, and returns by what earlier ones must be multiplied.
    #[inline(always)]
    pub(super) fn take<S: Simd>(&mut self, simd: S, scores: &mut [f32]) -> f32 {
        let (vectors, _) = S::as_mut_simd_f32s(scores);
        let mut largest = simd.splat_f32s(self.largest);
        for vector in vectors.iter() {
            largest = simd.max_f32s(largest, *vector);
        }
        let largest = simd.reduce_max_f32s(largest);
        let all = simd.splat_f32s(largest);
        let mut sum = simd.splat_f32s(0.0);
        for vector in vectors.iter_mut() {
            *vector = exp2(simd, simd.sub_f32s(*vector, all));
            sum = simd.add_f32s(sum, *vector);
        }
        let factor = self.raise(largest);
        self.sum += simd.reduce_sum_f32s(sum);
        factor
    }

    /// Makes the largest score at least `largest`, and returns by what exponentials so far must be multiplied.
    #[inline(always)]
    pub(super) fn raise(&mut self, largest: f32) -> f32 {
        if self.largest >= largest {
            return 1.0;
        }
        let factor = if self.largest == LOWEST {
            0.0
        } else {
            crate::math::exp((self.largest - largest) * std::f32::consts::LN_2)
        };
        self.largest = largest;
        self.sum *= factor;
        factor
    }

    /// The natural logarithm of the sum of exponentials; infinite where nothing was seen, so that weights come out as 0.
    pub(super) fn logarithm(self) -> f32 {
        if self.sum > 0.0 || self.sum.is_nan() {
            self.largest * std::f32::consts::LN_2 + self.sum.ln()
        } else {
            f32::INFINITY
        }
    }
}

/// Which weights of a head are dropped.
#[derive(Clone, Copy)]
pub(super) struct Drops {
    stream: Stream,
    /// Numbers whose high 24 bits are below it drop.
    below: u64,
    keep: f32,
    /// The number of the first query's weight of the first key.
    begin: u64,
}

impl Drops {
    pub(super) fn new(stream: Stream, rate: f64, begin: u64) -> Self {
        // Uniform numbers are multiples of 2^-24 and are compared in f32.
        let below = (f64::from(rate as f32) * f64::from(1u32 << 24)).ceil() as u64;
        Self { stream, below, keep: (1.0 / (1.0 - rate)) as f32, begin }
    }

    /// The factors of weights from number `first` of the head on.
    #[inline(always)]
    pub(super) fn factors(&self, first: usize, out: &mut [f32]) {
        let first = self.begin.wrapping_add(first as u64);
        for (i, out) in out.iter_mut().enumerate() {
            let drop = self.stream.bits(first.wrapping_add(i as u64)) >> 40 < self.below;
            *out = if drop { 0.0 } else { self.keep };
        }
    }
}
