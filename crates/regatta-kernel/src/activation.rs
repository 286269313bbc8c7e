//! Activation functions, alone or after the bias of a linear layer.
//!
//! ```
//! use regatta_kernel::activation::{Activation, backward, bias_forward};
//! let mut sums = [1.0, -2.0];
//! assert_eq!(bias_forward(Activation::Relu, &mut sums, Some(&[0.5, 0.5])), [1.5, 0.0]);
//! // `sums` now includes the bias, as `backward` needs it.
//! let mut gradients = [1.0, 1.0];
//! backward(Activation::Relu, &sums, &mut gradients);
//! assert_eq!(gradients, [1.0, 0.0]);
//! ```

use crate::bias::add_rows;
use crate::math::{normal, sigmoid};
use crate::parallel::for_chunks;
use crate::simd::vectorized;
use crate::uninit::filled;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x`: no activation.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)`, with the distribution function Phi of the normal distribution (Hendrycks & Gimpel 2016, "Gaussian
    /// Error Linear Units", section 2).
    Gelu,
    /// GELU with an approximation of Phi by a hyperbolic tangent, as in GPT-2 (the same paper, section 2).
    GeluTanh,
    /// `x sigmoid(x)` (Elfwing et al. 2018, "Sigmoid-Weighted Linear Units").
    Silu,
}

/// Elements that one task processes.
const CHUNK: usize = 1 << 14;
/// `2 sqrt(2 / pi)`, of [`Activation::GeluTanh`].
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
/// Factor of the cubic term of [`Activation::GeluTanh`].
const CUBIC: f32 = 0.044_715;

/// An activation function and its derivative. Loops are compiled for each one.
trait Function {
    fn value(x: f32) -> f32;
    fn derivative(x: f32) -> f32;
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
    fn derivative(_: f32) -> f32 {
        1.0
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        if x > 0.0 { x } else { 0.0 }
    }

    #[inline(always)]
    fn derivative(x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * normal(x).0
    }

    #[inline(always)]
    fn derivative(x: f32) -> f32 {
        let (below, density) = normal(x);
        x.mul_add(density, below)
    }
}

impl Function for GeluTanh {
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(TWO_SQRT_2_OVER_PI * x * (CUBIC * x).mul_add(x, 1.0))
    }

    #[inline(always)]
    fn derivative(x: f32) -> f32 {
        let s = sigmoid(TWO_SQRT_2_OVER_PI * x * (CUBIC * x).mul_add(x, 1.0));
        let inner = TWO_SQRT_2_OVER_PI * (3.0 * CUBIC * x).mul_add(x, 1.0);
        (x * s * (1.0 - s)).mul_add(inner, s)
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn derivative(x: f32) -> f32 {
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
    fn multiply_by_derivatives<F: Function>(inputs: &[f32], gradients: &mut [f32]) {
        for (g, x) in gradients.iter_mut().zip(inputs) {
            *g *= F::derivative(*x);
        }
    }
}

/// The end of a linear layer: adds `bias` `[width]` to the rows of `sums` `[rows, width]` in place, and returns their
/// activation `[rows, width]`. Both happen in one pass, chunk by chunk, while a chunk is in the cache.
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
    // SAFETY: the chunks cover all outputs, and `apply` writes every element of a chunk.
    unsafe {
        filled(sums.len(), |outputs| {
            if rayon::current_num_threads() == 1 {
                sums.chunks_mut(chunk).zip(outputs.chunks_mut(chunk)).for_each(all);
            } else {
                sums.par_chunks_mut(chunk).zip(outputs.par_chunks_mut(chunk)).for_each(all);
            }
        })
    }
}

/// Backward in place: multiplies `gradients` of the outputs by the derivative of the activation at `inputs` (which
/// include the bias). The result is the gradient of the inputs.
///
/// # Panics
/// If the slices have different lengths.
pub fn backward(activation: Activation, inputs: &[f32], gradients: &mut [f32]) {
    assert_eq!(inputs.len(), gradients.len(), "inputs and gradients must have the same length");
    for_chunks(gradients, CHUNK, |index, gradients| {
        let inputs = &inputs[index * CHUNK..][..gradients.len()];
        match activation {
            Activation::Identity => multiply_by_derivatives::<Identity>(inputs, gradients),
            Activation::Relu => multiply_by_derivatives::<Relu>(inputs, gradients),
            Activation::Gelu => multiply_by_derivatives::<Gelu>(inputs, gradients),
            Activation::GeluTanh => multiply_by_derivatives::<GeluTanh>(inputs, gradients),
            Activation::Silu => multiply_by_derivatives::<Silu>(inputs, gradients),
        }
    });
}

/// Writes every element of `outputs`, which has the length of `inputs`.
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
    use crate::testing::{close, derivative_of, values as random};
    use proptest::prelude::*;

    const ALL: [Activation; 5] =
        [Activation::Identity, Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];

    fn reference(activation: Activation, x: f64) -> f64 {
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
            let (x, bias) = (random(seed, rows * width, 3.0), random(seed ^ 1, width, 1.0));
            let g = random(seed ^ 2, rows * width, 1.0);
            for activation in ALL {
                let mut sums = x.clone();
                let y = bias_forward(activation, &mut sums, Some(&bias));
                prop_assert_eq!(&bias_forward(activation, &mut sums.clone(), None), &y);
                let inputs: Vec<f64> =
                    (0..x.len()).map(|i| f64::from(x[i]) + f64::from(bias[i % width])).collect();
                close(&y, inputs.iter().map(|x| reference(activation, *x)), 1e-5);
                let mut gradient = g.clone();
                backward(activation, &sums, &mut gradient);
                // ReLU has no derivative at 0.
                let near = |x: f64| activation == Activation::Relu && x.abs() < 3e-3;
                let expected = (0..x.len()).map(|i| {
                    if near(inputs[i]) { return f64::from(gradient[i]); }
                    f64::from(g[i]) * derivative_of(|x| reference(activation, x), inputs[i])
                });
                close(&gradient, expected, 1e-5);
            }
        }
    }
}
