//! Activation functions, alone and behind a linear layer's bias.

use crate::bias::add_rows;
use crate::fresh::fresh;
use crate::math::{normal, sigmoid};
use crate::parallel::for_chunks;
use crate::simd::vectorized;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// None: the identity.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)` (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2).
    Gelu,
    /// The same with a hyperbolic tangent in the place of the error function, as in GPT-2 (there, section 2).
    GeluTanh,
    /// `x sigmoid(x)` (Elfwing et al. 2018, "Sigmoid-Weighted Linear Units").
    Silu,
}

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;
/// `2 sqrt(2 / pi)`
const TWO_ROOTS: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

/// A function and its derivative, each vectorised for itself.
trait Function {
    fn value(x: f32) -> f32;
    fn slope(x: f32) -> f32;
}

struct Identity;
struct Relu;
struct Gelu;
struct GeluTanh;
struct Silu;

impl Function for Identity {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn slope(_: f32) -> f32 {
        1.0
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        if x > 0.0 { x } else { 0.0 }
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * normal(x).0
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let (below, density) = normal(x);
        x.mul_add(density, below)
    }
}

impl Function for GeluTanh {
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(TWO_ROOTS * x * (CUBIC * x).mul_add(x, 1.0))
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let s = sigmoid(TWO_ROOTS * x * (CUBIC * x).mul_add(x, 1.0));
        let inner = TWO_ROOTS * (3.0 * CUBIC * x).mul_add(x, 1.0);
        (x * s * (1.0 - s)).mul_add(inner, s)
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let s = sigmoid(x);
        (x * s).mul_add(1.0 - s, s)
    }
}

vectorized! {
    fn values<F: Function>(inputs: &[f32], outputs: &mut [MaybeUninit<f32>]) {
        for (y, x) in outputs.iter_mut().zip(inputs) {
            y.write(F::value(*x));
        }
    }
}

vectorized! {
    fn slopes<F: Function>(inputs: &[f32], gradients: &mut [f32]) {
        for (g, x) in gradients.iter_mut().zip(inputs) {
            *g *= F::slope(*x);
        }
    }
}

/// A linear layer's epilogue: adds `bias` `[width]` to the rows of `sums` `[.., width]` in place, and returns their
/// activation. One pass: a chunk is still in the cache when it comes to the activation.
pub fn bias_forward(activation: Activation, sums: &mut [f32], bias: Option<&[f32]>) -> Vec<f32> {
    let chunk = match bias {
        Some(bias) => crate::parallel::rows_of_chunk(bias.len()) * bias.len().max(1),
        None => CHUNK,
    };
    let all = |(sums, outputs): (&mut [f32], &mut [MaybeUninit<f32>])| {
        if let Some(bias) = bias {
            add_rows(sums, bias);
        }
        apply(activation, sums, outputs);
    };
    // SAFETY: the chunks are all of the outputs, and `apply` writes every element of one.
    unsafe {
        fresh(sums.len(), |outputs| {
            if rayon::current_num_threads() == 1 {
                sums.chunks_mut(chunk).zip(outputs.chunks_mut(chunk)).for_each(all);
            } else {
                sums.par_chunks_mut(chunk).zip(outputs.par_chunks_mut(chunk)).for_each(all);
            }
        })
    }
}

/// `gradients *= activation'(inputs)`: the gradient of the inputs from that of the outputs, in place.
pub fn backward(activation: Activation, inputs: &[f32], gradients: &mut [f32]) {
    assert_eq!(inputs.len(), gradients.len(), "an activation has as many gradients as inputs");
    for_chunks(gradients, CHUNK, |index, gradients| {
        let inputs = &inputs[index * CHUNK..][..gradients.len()];
        match activation {
            Activation::Identity => slopes::<Identity>(inputs, gradients),
            Activation::Relu => slopes::<Relu>(inputs, gradients),
            Activation::Gelu => slopes::<Gelu>(inputs, gradients),
            Activation::GeluTanh => slopes::<GeluTanh>(inputs, gradients),
            Activation::Silu => slopes::<Silu>(inputs, gradients),
        }
    });
}

/// Writes every element of `outputs`, which are as many as `inputs`.
fn apply(activation: Activation, inputs: &[f32], outputs: &mut [MaybeUninit<f32>]) {
    match activation {
        Activation::Identity => values::<Identity>(inputs, outputs),
        Activation::Relu => values::<Relu>(inputs, outputs),
        Activation::Gelu => values::<Gelu>(inputs, outputs),
        Activation::GeluTanh => values::<GeluTanh>(inputs, outputs),
        Activation::Silu => values::<Silu>(inputs, outputs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, slope_of, values as any};
    use proptest::prelude::*;

    const ALL: [Activation; 5] =
        [Activation::Identity, Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];

    fn plain(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Identity => x,
            Activation::Relu => x.max(0.0),
            Activation::Gelu => x * crate::math::tests::phi(x),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
            Activation::Silu => x / (1.0 + (-x).exp()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn agree_with_f64_and_with_finite_differences(rows in 1usize..70, width in 1usize..70, seed: u64) {
            let (x, bias, g) = (any(seed, rows * width, 3.0), any(seed ^ 1, width, 1.0), any(seed ^ 2, rows * width, 1.0));
            for activation in ALL {
                let mut sums = x.clone();
                let y = bias_forward(activation, &mut sums, Some(&bias));
                prop_assert_eq!(&bias_forward(activation, &mut sums.clone(), None), &y);
                let inputs: Vec<f64> =
                    (0..x.len()).map(|i| f64::from(x[i]) + f64::from(bias[i % width])).collect();
                close(&y, inputs.iter().map(|x| plain(activation, *x)), 1e-5);
                let mut gradient = g.clone();
                backward(activation, &sums, &mut gradient);
                // The kink of the rectifier has no slope.
                let near = |x: f64| activation == Activation::Relu && x.abs() < 3e-3;
                let wanted = (0..x.len()).map(|i| {
                    if near(inputs[i]) { return f64::from(gradient[i]); }
                    f64::from(g[i]) * slope_of(|x| plain(activation, x), inputs[i])
                });
                close(&gradient, wanted, 1e-5);
            }
        }
    }
}
