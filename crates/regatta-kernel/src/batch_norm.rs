//! Batch normalisation over the rows of `[rows, channels]`, fused with the residual addition and the ReLU that often
//! follow (Ioffe & Szegedy 2015, "Batch Normalization"; He et al. 2016, "Deep Residual Learning for Image
//! Recognition").
//!
//! ```
//! use regatta_kernel::batch_norm::{Line, apply, statistics};
//! // Two rows of one channel.
//! let x = [1.0, 3.0];
//! let statistics = statistics(&x, 1);
//! assert_eq!((statistics.mean[0], statistics.variance[0]), (2.0, 1.0));
//! let mut out = [0.0; 2];
//! apply(&x, None, &Line::new(&statistics, &[1.0], &[0.5], 0.0), false, &mut out);
//! assert_eq!(out, [-0.5, 1.5]);
//! ```

use crate::simd::vectorized;
use rayon::prelude::*;

/// Rows that are summed in f32: few enough to keep the precision, many enough to be fast.
const ROWS: usize = 128;
/// Elements that one task processes.
const PART: usize = 1 << 16;
/// Parts whose sums are in memory at the same time.
const PARTS_AT_ONCE: usize = 64;

/// The mean and the variance of every channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// The mean, `[channels]`.
    pub mean: Vec<f32>,
    /// The variance, `[channels]`: the mean square deviation, without Bessel's correction.
    pub variance: Vec<f32>,
}

vectorized! {
    /// Adds over `rows` the values minus `shift` to `first`, and the squares of these differences to `second`.
    fn sums(rows: &[f32], shift: &[f32], first: &mut [f32], second: &mut [f32]) {
        for row in rows.chunks_exact(shift.len()) {
            for (((x, shift), first), second) in row.iter().zip(shift).zip(&mut *first).zip(&mut *second) {
                let x = x - shift;
                *first += x;
                *second = x.mul_add(x, *second);
            }
        }
    }
}

vectorized! {
    /// Adds over `rows` the gradients to `first`, and the gradients times (value - `mean`) to `second`. With `relu`
    /// (a scale and a shift), the gradient counts as 0 where `x * scale + shift` is not positive.
    fn gradient_sums(
        rows: &[f32], gradients: &[f32], mean: &[f32], relu: Option<[&[f32]; 2]>,
        first: &mut [f32], second: &mut [f32],
    ) {
        let channels = mean.len();
        let rows = rows.chunks_exact(channels).zip(gradients.chunks_exact(channels));
        match relu {
            Some([scale, shift]) => for (row, gradients) in rows {
                let line = scale.iter().zip(shift).zip(mean);
                let sums = first.iter_mut().zip(&mut *second);
                let row = row.iter().zip(gradients);
                for (((x, g), ((scale, shift), mean)), (first, second)) in row.zip(line).zip(sums) {
                    let g = if x.mul_add(*scale, *shift) > 0.0 { *g } else { 0.0 };
                    *first += g;
                    *second = g.mul_add(x - mean, *second);
                }
            },
            None => for (row, gradients) in rows {
                let sums = first.iter_mut().zip(&mut *second);
                for (((x, g), mean), (first, second)) in row.iter().zip(gradients).zip(mean).zip(sums) {
                    *first += g;
                    *second = g.mul_add(x - mean, *second);
                }
            },
        }
    }
}

vectorized! {
    /// `x * scale + shift`, plus the residual if there is one, then ReLU if `relu`.
    fn apply_rows(x: &[f32], residual: Option<&[f32]>, scale: &[f32], shift: &[f32], relu: bool, out: &mut [f32]) {
        let channels = scale.len();
        let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
        let rows = x.chunks_exact(channels).zip(out.chunks_exact_mut(channels));
        match residual {
            Some(residual) => for ((x, out), residual) in rows.zip(residual.chunks_exact(channels)) {
                let line = scale.iter().zip(shift).zip(residual);
                for ((x, out), ((scale, shift), residual)) in x.iter().zip(out).zip(line) {
                    *out = (x.mul_add(*scale, *shift) + residual).max(floor);
                }
            },
            None => for (x, out) in rows {
                for ((x, out), (scale, shift)) in x.iter().zip(out).zip(scale.iter().zip(shift)) {
                    *out = x.mul_add(*scale, *shift).max(floor);
                }
            },
        }
    }
}

vectorized! {
    /// Replaces each gradient by `gradient * factors[0] + x * factors[1] + factors[2]`, after setting it to 0 as in
    /// [`gradient_sums`].
    fn input_gradients(x: &[f32], relu: Option<[&[f32]; 2]>, factors: [&[f32]; 3], gradients: &mut [f32]) {
        let channels = factors[0].len();
        let rows = x.chunks_exact(channels).zip(gradients.chunks_exact_mut(channels));
        match relu {
            Some([scale, shift]) => for (x, gradients) in rows {
                let line = scale.iter().zip(shift).zip(factors[0]).zip(factors[1]).zip(factors[2]);
                for ((x, gradient), ((((scale, shift), a), b), c)) in x.iter().zip(gradients).zip(line) {
                    let g = if x.mul_add(*scale, *shift) > 0.0 { *gradient } else { 0.0 };
                    *gradient = g.mul_add(*a, x.mul_add(*b, *c));
                }
            },
            None => for (x, gradients) in rows {
                let line = factors[0].iter().zip(factors[1]).zip(factors[2]);
                for ((x, gradient), ((a, b), c)) in x.iter().zip(gradients).zip(line) {
                    *gradient = gradient.mul_add(*a, x.mul_add(*b, *c));
                }
            },
        }
    }
}

vectorized! {
    /// Sets gradients to 0 where `out` is not positive.
    fn zero_gradients(out: &[f32], gradients: &mut [f32]) {
        for (out, gradient) in out.iter().zip(gradients) {
            *gradient = if *out > 0.0 { *gradient } else { 0.0 };
        }
    }
}

/// Two sums per channel over all rows. Parts of [`ROWS`] rows are summed in f32, and the sums of the parts, in order,
/// in f64.
fn total(rows: usize, channels: usize, part: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) -> [Vec<f64>; 2] {
    let parts = rows.div_ceil(ROWS);
    // Only some parts at a time, so that their sums need little memory.
    let mut all = [vec![0.0f64; channels], vec![0.0f64; channels]];
    let mut sums = vec![0.0f32; 2 * channels * PARTS_AT_ONCE.min(parts)];
    for begin in (0..parts).step_by(PARTS_AT_ONCE) {
        let count = PARTS_AT_ONCE.min(parts - begin);
        let sums = &mut sums[..2 * channels * count];
        sums.fill(0.0);
        for_parts(2 * channels, sums, |index, sums| {
            let (first, second) = sums.split_at_mut(channels);
            part(begin + index, first, second);
        });
        for sums in sums.chunks_exact(2 * channels) {
            for (all, sums) in all.iter_mut().zip(sums.chunks_exact(channels)) {
                all.iter_mut().zip(sums).for_each(|(all, sum)| *all += f64::from(*sum));
            }
        }
    }
    all
}

/// Calls `body` with every part of `len` elements of `out` and the part's index, on several threads if the pool has
/// them.
fn for_parts(len: usize, out: &mut [f32], body: impl Fn(usize, &mut [f32]) + Sync) {
    if rayon::current_num_threads() == 1 {
        out.chunks_mut(len).enumerate().for_each(|(index, out)| body(index, out));
    } else {
        out.par_chunks_mut(len).enumerate().for_each(|(index, out)| body(index, out));
    }
}

/// Part `index` of `x`, where parts have `len` elements. The last part may be shorter.
fn part_of(x: &[f32], index: usize, len: usize) -> &[f32] {
    &x[index * len..x.len().min((index + 1) * len)]
}

/// The elements of whole rows that together have about [`PART`] elements.
fn part_len(channels: usize) -> usize {
    (PART / channels).max(1) * channels
}

/// The mean and the variance of each channel of `x` `[rows, channels]`; zeros if there are no rows.
pub fn statistics(x: &[f32], channels: usize) -> Statistics {
    let rows = x.len() / channels.max(1);
    if rows == 0 {
        return Statistics { mean: vec![0.0; channels], variance: vec![0.0; channels] };
    }
    // Differences from a value of the channel are summed, because sums of squares lose precision if the mean is far
    // from 0.
    let shift = &x[..channels];
    let len = ROWS * channels;
    let [first, second] =
        total(rows, channels, |index, first, second| sums(part_of(x, index, len), shift, first, second));
    let count = rows as f64;
    let mean = first.iter().zip(shift).map(|(sum, shift)| (sum / count + f64::from(*shift)) as f32).collect();
    let variance = |(first, second): (&f64, &f64)| (second / count - (first / count).powi(2)).max(0.0) as f32;
    Statistics { mean, variance: first.iter().zip(&second).map(variance).collect() }
}

/// A normalisation as an affine function per channel: `x * scale + shift`, which equals `(x - mean) / deviation *
/// gamma + beta`.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The factor, `[channels]`.
    pub scale: Vec<f32>,
    /// What is added, `[channels]`.
    pub shift: Vec<f32>,
}

impl Line {
    /// The function for these statistics and the parameters `gamma` and `beta`, `[channels]` each. `eps` is added to
    /// the variance.
    pub fn new(statistics: &Statistics, gamma: &[f32], beta: &[f32], eps: f64) -> Self {
        let inverse = statistics.variance.iter().map(|variance| 1.0 / (f64::from(*variance) + eps).sqrt());
        let scale: Vec<f64> =
            inverse.zip(gamma).map(|(inverse, gamma)| inverse * f64::from(*gamma)).collect();
        let shift = scale.iter().zip(&statistics.mean).zip(beta);
        let shift =
            shift.map(|((scale, mean), beta)| (f64::from(*beta) - scale * f64::from(*mean)) as f32).collect();
        Self { scale: scale.into_iter().map(|scale| scale as f32).collect(), shift }
    }
}

/// Writes `x * scale + shift` to `out`, plus `residual` if it is given, and with negative results set to 0 if `relu`.
/// `x`, `residual` and `out` are `[rows, channels]`.
pub fn apply(x: &[f32], residual: Option<&[f32]>, line: &Line, relu: bool, out: &mut [f32]) {
    let len = part_len(line.scale.len());
    for_parts(len, out, |index, out| {
        let residual = residual.map(|residual| part_of(residual, index, len));
        apply_rows(part_of(x, index, len), residual, &line.scale, &line.shift, relu, out);
    });
}

/// Backward of ReLU, in place: sets gradients to 0 where the result `out` of ReLU is 0. Both have the same length.
pub fn through_relu(out: &[f32], gradients: &mut [f32]) {
    for_parts(PART, gradients, |index, gradients| zero_gradients(part_of(out, index, PART), gradients));
}

/// Backward of a normalisation by the statistics of `x` `[rows, channels]` itself. Replaces `gradients` `[rows,
/// channels]` of the result by those of `x`, and returns those of gamma and beta, `[channels]` each. `relu` says that
/// the forward pass set negative results to 0 (without a residual; with one, call [`through_relu`] first).
pub fn backward(
    x: &[f32],
    statistics: &Statistics,
    gamma: &[f32],
    line: &Line,
    eps: f64,
    relu: bool,
    gradients: &mut [f32],
) -> [Vec<f32>; 2] {
    let channels = gamma.len();
    let count = (x.len() / channels.max(1)) as f64;
    let [mean, variance] = [&statistics.mean, &statistics.variance];
    let line = relu.then_some([&line.scale[..], &line.shift[..]]);
    let len = ROWS * channels;
    let [first, second] = total(x.len() / channels, channels, |index, first, second| {
        gradient_sums(part_of(x, index, len), part_of(gradients, index, len), mean, line, first, second);
    });
    // With n = (x - mean) * inverse, the gradient of x is gamma inverse (g - mean(g) - n mean(g n)).
    let mut factors = [(); 3].map(|()| Vec::with_capacity(channels));
    let mut of_gamma = Vec::with_capacity(channels);
    for channel in 0..channels {
        let inverse = 1.0 / (f64::from(variance[channel]) + eps).sqrt();
        let product = second[channel] * inverse;
        of_gamma.push(product as f32);
        let a = f64::from(gamma[channel]) * inverse;
        let b = -a * inverse * product / count;
        let c = -a * first[channel] / count - b * f64::from(mean[channel]);
        factors.iter_mut().zip([a, b, c]).for_each(|(list, value)| list.push(value as f32));
    }
    let len = part_len(channels);
    let factors = [&factors[0][..], &factors[1], &factors[2]];
    for_parts(len, gradients, |index, gradients| {
        input_gradients(part_of(x, index, len), line, factors, gradients)
    });
    [of_gamma, first.iter().map(|sum| *sum as f32).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use proptest::prelude::*;

    const EPS: f64 = 1e-5;

    struct Case {
        x: Vec<f32>,
        residual: Vec<f32>,
        gamma: Vec<f32>,
        beta: Vec<f32>,
        gradient: Vec<f32>,
    }

    fn case(rows: usize, channels: usize, mean: f32) -> Case {
        let of = |name: &str, len: usize| Stream::new(3).named(name).normal(len, 1.0);
        Case {
            x: of("x", rows * channels).iter().map(|x| x + mean).collect(),
            residual: of("residual", rows * channels),
            gamma: of("gamma", channels),
            beta: of("beta", channels),
            gradient: of("gradient", rows * channels),
        }
    }

    /// The result, and the gradients of x, gamma, beta and the residual, computed in f64 from the definition.
    fn reference(case: &Case, with_residual: bool, relu: bool) -> [Vec<f64>; 5] {
        let channels = case.gamma.len();
        let rows = case.x.len() / channels;
        let mut out = [(); 3].map(|()| vec![0.0; case.x.len()]);
        let mut sums = [(); 2].map(|()| vec![0.0; channels]);
        for c in 0..channels {
            let of = |values: &[f32]| -> Vec<f64> {
                (0..rows).map(|r| f64::from(values[r * channels + c])).collect()
            };
            let (x, residual, mut g) = (of(&case.x), of(&case.residual), of(&case.gradient));
            let mean = x.iter().sum::<f64>() / rows as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / rows as f64;
            let inverse = 1.0 / (variance + EPS).sqrt();
            let normal: Vec<f64> = x.iter().map(|x| (x - mean) * inverse).collect();
            let (gamma, beta) = (f64::from(case.gamma[c]), f64::from(case.beta[c]));
            for r in 0..rows {
                let y = normal[r] * gamma + beta + if with_residual { residual[r] } else { 0.0 };
                if relu && y <= 0.0 {
                    g[r] = 0.0;
                }
                out[0][r * channels + c] = if relu { y.max(0.0) } else { y };
                out[2][r * channels + c] = g[r];
            }
            sums[1][c] = g.iter().sum::<f64>();
            sums[0][c] = g.iter().zip(&normal).map(|(g, n)| g * n).sum::<f64>();
            for r in 0..rows {
                let rest = g[r] - sums[1][c] / rows as f64 - normal[r] * sums[0][c] / rows as f64;
                out[1][r * channels + c] = gamma * inverse * rest;
            }
        }
        let ([result, of_x, of_residual], [of_gamma, of_beta]) = (out, sums);
        [result, of_x, of_gamma, of_beta, of_residual]
    }

    fn found(case: &Case, with_residual: bool, relu: bool) -> [Vec<f32>; 5] {
        let channels = case.gamma.len();
        let statistics = statistics(&case.x, channels);
        let line = Line::new(&statistics, &case.gamma, &case.beta, EPS);
        let mut out = vec![f32::NAN; case.x.len()];
        apply(&case.x, with_residual.then_some(&case.residual[..]), &line, relu, &mut out);
        let mut gradients = case.gradient.clone();
        if relu && with_residual {
            through_relu(&out, &mut gradients);
        }
        let of_residual = gradients.clone();
        let relu = relu && !with_residual;
        let [of_gamma, of_beta] =
            backward(&case.x, &statistics, &case.gamma, &line, EPS, relu, &mut gradients);
        [out, gradients, of_gamma, of_beta, of_residual]
    }

    fn check(rows: usize, channels: usize, mean: f32, with_residual: bool, relu: bool) {
        let case = case(rows, channels, mean);
        let names = ["result", "x", "gamma", "beta", "residual"];
        let both = found(&case, with_residual, relu).into_iter().zip(reference(&case, with_residual, relu));
        for (name, (found, expected)) in names.iter().zip(both) {
            if *name == "residual" && !with_residual {
                continue;
            }
            let largest = expected.iter().fold(1.0f64, |most, value| most.max(value.abs()));
            let error = found
                .iter()
                .zip(&expected)
                .map(|(a, b)| (f64::from(*a) - b).abs())
                .max_by(f64::total_cmp)
                .unwrap_or(0.0)
                / largest;
            assert!(error < 1e-5, "{name}, {rows} x {channels}, mean {mean}: {error:.1e}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            rows in 8usize..300, channels in 1usize..70, mean in -3.0f32..3.0, residual: bool, relu: bool,
        ) {
            check(rows, channels, mean, residual, relu);
        }
    }

    #[test]
    fn many_rows_and_a_mean_far_from_zero() {
        check(20_000, 5, 1.0, false, true);
        let far = case(10_000, 3, 1000.0);
        for (variance, mean) in statistics(&far.x, 3).variance.iter().zip(statistics(&far.x, 3).mean) {
            assert!((variance - 1.0).abs() < 0.05 && (mean - 1000.0).abs() < 0.05, "{variance} {mean}");
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_threads() {
        let case = case(9_000, 17, 0.5);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| found(&case, true, true))
        };
        assert_eq!(with(1), with(3));
    }
}
