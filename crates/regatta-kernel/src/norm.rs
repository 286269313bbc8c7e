//! Layer norm (Ba et al. 2016, "Layer Normalization", equation 4) and RMS norm (Zhang & Sennrich 2019, "Root Mean
//! Square Layer Normalization", equation 4) over the last dimension.

use crate::parallel::{map_chunks, rows_of_chunk};
use crate::simd::vectorized;
use crate::uninit::filled;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Independent sums, for vector units.
const LANES: usize = 32;

/// The kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Whether the mean is subtracted first: `true` for layer norm, `false` for RMS norm.
    pub centred: bool,
    /// Added to the variance (for RMS norm to the mean square).
    pub eps: f32,
}

/// What backward needs of a row: the mean (0 for RMS norm) and one over the standard deviation.
pub type Moments = [f32; 2];

/// The sums of the components of `f(x, y)` over two slices of the same length.
#[inline(always)]
fn sums<const N: usize>(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: [&[f32]; 2] = [xs.remainder(), ys.remainder()];
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            let terms = f(x[lane], y[lane]);
            for n in 0..N {
                lanes[n][lane] += terms[n];
            }
        }
    }
    let mut total = lanes.map(|lanes| lanes.iter().sum::<f32>());
    for (x, y) in rest[0].iter().zip(rest[1]) {
        let terms = f(*x, *y);
        (0..N).for_each(|n| total[n] += terms[n]);
    }
    total
}

vectorized! {
    /// Normalises rows, and writes their moments.
    fn forward_rows(
        norm: Norm, x: &[f32], gamma: &[f32], beta: Option<&[f32]>,
        y: &mut [MaybeUninit<f32>], moments: &mut [Moments],
    ) {
        let width = gamma.len();
        let inverse_width = 1.0 / width as f32;
        for ((x, y), moments) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(moments) {
            let mean = if norm.centred { sums(x, x, |x, _| [x])[0] * inverse_width } else { 0.0 };
            let [squares] = sums(x, x, |x, _| [(x - mean) * (x - mean)]);
            let scale = 1.0 / (squares * inverse_width + norm.eps).sqrt();
            *moments = [mean, scale];
            match beta {
                Some(beta) => {
                    for (((y, x), g), b) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                        y.write(((x - mean) * scale).mul_add(*g, *b));
                    }
                }
                None => {
                    for ((y, x), g) in y.iter_mut().zip(x).zip(gamma) {
                        y.write((x - mean) * scale * g);
                    }
                }
            }
        }
    }
}

vectorized! {
    /// Replaces `gradients` of rows by those of their inputs, and adds those of gamma and beta.
    fn backward_rows(
        norm: Norm, x: &[f32], gamma: &[f32], moments: &[Moments], gradients: &mut [f32],
        of_gamma: &mut [f32], of_beta: &mut [f32],
    ) {
        let width = gamma.len();
        let inverse_width = 1.0 / width as f32;
        let beta = !of_beta.is_empty();
        for ((x, g), &[mean, scale]) in x.chunks_exact(width).zip(gradients.chunks_exact_mut(width)).zip(moments) {
            if beta {
                of_beta.iter_mut().zip(g.iter()).for_each(|(sum, g)| *sum += g);
            }
            for ((sum, x), g) in of_gamma.iter_mut().zip(x).zip(g.iter()) {
                *sum = ((x - mean) * scale).mul_add(*g, *sum);
            }
            // dx = scale (g gamma - mean(g gamma) - xhat mean(g gamma xhat)), without the first mean for RMS norm.
            g.iter_mut().zip(gamma).for_each(|(g, gamma)| *g *= gamma);
            let [sum, product] = sums(g, x, |g, x| [g, g * ((x - mean) * scale)]);
            let (mean_gradient, mean_product) =
                (if norm.centred { sum * inverse_width } else { 0.0 }, product * inverse_width * scale);
            for (g, x) in g.iter_mut().zip(x) {
                *g = scale * ((x - mean).mul_add(-mean_product, *g - mean_gradient));
            }
        }
    }
}

/// Normalises each row of `x` `[rows, width]`, multiplies it by `gamma` `[width]` and adds `beta` `[width]`. Returns
/// the result `[rows, width]`, and the moments `[rows]` that [`backward`] needs.
///
/// # Panics
/// If `x` does not consist of whole rows, or `beta` and `gamma` have different lengths.
pub fn forward(norm: Norm, x: &[f32], gamma: &[f32], beta: Option<&[f32]>) -> (Vec<f32>, Vec<Moments>) {
    let width = gamma.len().max(1);
    assert!(x.len().is_multiple_of(width), "x must consist of rows of {width} elements");
    assert!(beta.is_none_or(|beta| beta.len() == gamma.len()), "beta and gamma must have the same length");
    let mut moments = vec![[0.0; 2]; x.len() / width];
    let rows = rows_of_chunk(width);
    let one = |x: &[f32], y: &mut [MaybeUninit<f32>], moments: &mut [Moments]| {
        forward_rows(norm, x, gamma, beta, y, moments);
    };
    // SAFETY: the chunks cover all rows, and `forward_rows` writes every element of its rows.
    let y = unsafe {
        filled(x.len(), |y| {
            let chunk = rows * width;
            if rayon::current_num_threads() == 1 {
                let pairs = x.chunks(chunk).zip(y.chunks_mut(chunk));
                pairs.zip(moments.chunks_mut(rows)).for_each(|((x, y), moments)| one(x, y, moments));
            } else {
                let pairs = x.par_chunks(chunk).zip(y.par_chunks_mut(chunk));
                pairs.zip(moments.par_chunks_mut(rows)).for_each(|((x, y), moments)| one(x, y, moments));
            }
        })
    };
    (y, moments)
}

/// Backward of [`forward`]: replaces `gradients` `[rows, width]` of the outputs by those of `x`, and writes those of
/// gamma to `of_gamma` `[width]` and those of beta to `of_beta` (`[width]`, or empty if there is no beta).
///
/// # Panics
/// If a slice does not have the length of its shape.
pub fn backward(
    norm: Norm,
    x: &[f32],
    gamma: &[f32],
    moments: &[Moments],
    gradients: &mut [f32],
    of_gamma: &mut [f32],
    of_beta: &mut [f32],
) {
    let width = gamma.len();
    assert!(
        x.len() == gradients.len() && x.len() == moments.len() * width,
        "x, gradients and moments must have as many rows"
    );
    assert!(
        of_gamma.len() == width && (of_beta.is_empty() || of_beta.len() == width),
        "of_gamma and of_beta must have the length of gamma"
    );
    of_gamma.fill(0.0);
    of_beta.fill(0.0);
    if x.is_empty() {
        return;
    }
    let rows = rows_of_chunk(width);
    let beta = of_beta.len();
    let parts = map_chunks(gradients, rows * width, |index, gradients| {
        let begin = index * rows;
        let count = gradients.len() / width;
        let mut sums = vec![0.0; width + beta];
        let (of_gamma, of_beta) = sums.split_at_mut(width);
        let x = &x[begin * width..][..gradients.len()];
        backward_rows(norm, x, gamma, &moments[begin..][..count], gradients, of_gamma, of_beta);
        sums
    });
    for part in parts {
        of_gamma.iter_mut().zip(&part).for_each(|(sum, g)| *sum += g);
        of_beta.iter_mut().zip(&part[width..]).for_each(|(sum, g)| *sum += g);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, gradient_of, to_f64, values};
    use proptest::prelude::*;

    fn reference(norm: Norm, x: &[f64], gamma: &[f64], beta: &[f64]) -> Vec<f64> {
        let width = gamma.len();
        let row = |x: &[f64]| {
            let mean = if norm.centred { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
            (0..width).map(|i| (x[i] - mean) * scale * gamma[i] + beta[i]).collect::<Vec<_>>()
        };
        x.chunks(width).flat_map(row).collect()
    }

    /// The gradients of x, gamma and beta from the formula, in f64.
    fn reference_backward(norm: Norm, x: &[f64], gamma: &[f64], g: &[f64]) -> [Vec<f64>; 3] {
        let width = gamma.len();
        let mut out = [vec![], vec![0.0; width], vec![0.0; width]];
        for (x, g) in x.chunks(width).zip(g.chunks(width)) {
            let n = width as f64;
            let mean = if norm.centred { x.iter().sum::<f64>() / n } else { 0.0 };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
            let hat: Vec<f64> = x.iter().map(|x| (x - mean) * scale).collect();
            let down: Vec<f64> = g.iter().zip(gamma).map(|(g, gamma)| g * gamma).collect();
            let reference = if norm.centred { down.iter().sum::<f64>() / n } else { 0.0 };
            let along = down.iter().zip(&hat).map(|(g, hat)| g * hat).sum::<f64>() / n;
            for i in 0..width {
                out[0].push(scale * (down[i] - reference - hat[i] * along));
                out[1][i] += g[i] * hat[i];
                out[2][i] += g[i];
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn agree_with_f64(rows in 0usize..200, width in 8usize..200, centred: bool, beta: bool, seed: u64) {
            let norm = Norm { centred, eps: 1e-5 };
            let (x, gamma) = (values(seed, rows * width, 2.0), values(seed ^ 1, width, 1.0));
            let shift = if beta { values(seed ^ 2, width, 1.0) } else { vec![0.0; width] };
            let g = values(seed ^ 3, rows * width, 1.0);
            let (y, moments) = forward(norm, &x, &gamma, beta.then_some(&shift[..]));
            close(&y, reference(norm, &to_f64(&x), &to_f64(&gamma), &to_f64(&shift)), 1e-5);
            let (mut of_x, mut of_gamma) = (g.clone(), vec![1.0; width]);
            let mut of_beta = vec![1.0; if beta { width } else { 0 }];
            backward(norm, &x, &gamma, &moments, &mut of_x, &mut of_gamma, &mut of_beta);
            let expected = reference_backward(norm, &to_f64(&x), &to_f64(&gamma), &to_f64(&g));
            close(&of_x, expected[0].clone(), 1e-5);
            close(&of_gamma, expected[1].clone(), 1e-5);
            if beta {
                close(&of_beta, expected[2].clone(), 1e-5);
            }
        }

        #[test]
        fn the_formula_agrees_with_finite_differences(width in 3usize..9, centred: bool, seed: u64) {
            let norm = Norm { centred, eps: 1e-2 };
            let [x, gamma, g] = [0, 1, 2].map(|n| to_f64(&values(seed ^ n, width, 1.0)));
            let beta = vec![0.0; width];
            let loss = |x: &[f64], gamma: &[f64]| {
                reference(norm, x, gamma, &beta).iter().zip(&g).map(|(y, g)| y * g).sum::<f64>()
            };
            let exact = reference_backward(norm, &x, &gamma, &g);
            let to_f32 = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<_>>();
            close(&to_f32(&exact[0]), gradient_of(|x| loss(x, &gamma), &x), 1e-5);
            close(&to_f32(&exact[1]), gradient_of(|gamma| loss(&x, gamma), &gamma), 1e-5);
        }
    }
}
