//! The softmax of a row of scores, its masks, and dropout of weights.

use super::Head;
use crate::random::Stream;
use pulp::Simd;

/// A value below any score. It is finite, so that differences to it are finite too.
pub(super) const LOWEST: f32 = -1e30;

/// `2^x` for `x` up to 127, within 2 units in the last place. The result is 0 for `x` below -127.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding this constant rounds to an integer, which is then in the low bits, with the bias of the exponent added.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // A fitted polynomial for (2^r - 1) / r with |r| <= 1/2. The relative error of the result is 1e-7, and 2^0 is
    // exactly 1.
    #[allow(clippy::approx_constant)] // Close to ln(2), but a fitted coefficient.
    const P: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
    // With the arguments in this order, NaN stays NaN.
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

/// Sets the elements of `row` after the first `visible` to `value`.
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

/// Sets the elements of `row`, which starts at key `first`, to `value` where the mask hides a key from query `i`.
#[inline(always)]
pub(super) fn hide_masked(head: &Head<'_>, i: usize, first: usize, row: &mut [f32], value: f32) {
    if let Some(hidden) =
        head.hidden.and_then(|hidden| hidden.get(i * head.seen + first..(i + 1) * head.seen))
    {
        for (score, &hidden) in row.iter_mut().zip(hidden) {
            *score = if hidden { value } else { *score };
        }
    }
}

/// The state of a query's softmax over the keys so far.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// The largest score.
    pub(super) largest: f32,
    /// The sum of the exponentials of (score - largest score).
    pub(super) sum: f32,
}

impl State {
    /// The state before the first key.
    pub(super) const NEW: Self = Self { largest: LOWEST, sum: 0.0 };

    /// Adds `scores` and replaces them by their exponentials. Returns the factor for earlier exponentials.
    #[inline(always)]
    pub(super) fn update<S: Simd>(&mut self, simd: S, scores: &mut [f32]) -> f32 {
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

    /// Raises the largest score to at least `largest`. Returns the factor for earlier exponentials.
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

    /// The natural logarithm of the sum of exponentials. It is infinite if the query sees no keys, so that its
    /// weights in backward are 0.
    pub(super) fn logarithm(self) -> f32 {
        if self.sum > 0.0 || self.sum.is_nan() {
            self.largest * std::f32::consts::LN_2 + self.sum.ln()
        } else {
            f32::INFINITY
        }
    }
}

/// Decides which weights of a head are dropped.
#[derive(Clone, Copy)]
pub(super) struct WeightDropout {
    stream: Stream,
    /// A weight is dropped if the high 24 bits of its random number are below this.
    threshold: u64,
    /// The factor of the weights that are not dropped.
    scale: f32,
    /// The number of the first weight of the head.
    begin: u64,
}

impl WeightDropout {
    pub(super) fn new(stream: Stream, rate: f64, begin: u64) -> Self {
        // The same decision as `Stream::uniform(n) < rate` in f32, whose uniform numbers are multiples of 2^-24.
        let threshold = (f64::from(rate as f32) * f64::from(1u32 << 24)).ceil() as u64;
        Self { stream, threshold, scale: (1.0 / (1.0 - rate)) as f32, begin }
    }

    /// The factors of the head's weights from weight `first` on.
    #[inline(always)]
    pub(super) fn factors(&self, first: usize, out: &mut [f32]) {
        let first = self.begin.wrapping_add(first as u64);
        for (i, out) in out.iter_mut().enumerate() {
            let drop = self.stream.bits(first.wrapping_add(i as u64)) >> 40 < self.threshold;
            *out = if drop { 0.0 } else { self.scale };
        }
    }
}
