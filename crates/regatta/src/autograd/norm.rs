//! Layer norm and RMS norm over the last dimension.

use super::custom::{Back, custom, fused, in_place, numbers, tensor_of, value};
use super::device::{at_least_f32, cast};
use super::work::Work;
use burn::backend::{TensorMetadata, flex::FlexTensor};
use burn::tensor::Tensor;
use regatta_kernel::norm::{self, Moments, Norm};

/// Normalises `x` `[.., width]` over its last dimension, multiplies by `gamma` `[width]` and adds `beta` `[width]`.
pub(crate) fn normalise<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Option<Tensor<1>>,
    norm: Norm,
) -> Tensor<D> {
    if !fused(&x) {
        return decomposed(x, gamma, beta, norm);
    }
    let elements: f64 = x.dims().iter().map(|&size| size as f64).product();
    let work = Work::new("norm", 8.0 * elements, 12.0 * elements);
    match beta {
        None => custom(work, [value(x), value(gamma)], |[x, gamma]| {
            let (output, layer) = Layer::forward(x, gamma, None, norm);
            let back: Back<2> = Box::new(move |gradient, _| {
                let [x, gamma, _] = layer.backward(gradient, false);
                [x, gamma]
            });
            (output, back)
        }),
        Some(beta) => custom(work, [value(x), value(gamma), value(beta)], |[x, gamma, beta]| {
            let (output, layer) = Layer::forward(x, gamma, Some(&beta), norm);
            (output, Box::new(move |gradient, _| layer.backward(gradient, true)))
        }),
    }
}

/// [`normalise`] with Burn's operations. 16-bit numbers are summed as f32.
fn decomposed<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Option<Tensor<1>>,
    norm: Norm,
) -> Tensor<D> {
    let dtype = x.dtype();
    let x = at_least_f32(x);
    let x = if norm.centred { x.clone() - x.mean_dim(D - 1) } else { x };
    let variance = x.clone().powi_scalar(2).mean_dim(D - 1);
    let x = x / variance.add_scalar(norm.eps).sqrt() * at_least_f32(gamma).unsqueeze();
    let x = match beta {
        Some(beta) => x + at_least_f32(beta).unsqueeze(),
        None => x,
    };
    cast(x, dtype)
}

/// What the backward pass needs from the forward pass.
struct Layer {
    norm: Norm,
    x: FlexTensor,
    gamma: FlexTensor,
    moments: Vec<Moments>,
}

impl Layer {
    fn forward(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: Option<&FlexTensor>,
        norm: Norm,
    ) -> (FlexTensor, Self) {
        let beta = beta.map(numbers);
        let (output, moments) = norm::forward(norm, &numbers(&x), &numbers(&gamma), beta.as_deref());
        (tensor_of(output, x.shape()), Self { norm, x, gamma, moments })
    }

    fn backward(self, gradient: FlexTensor, beta: bool) -> [Option<FlexTensor>; 3] {
        let width = self.gamma.shape()[0];
        let mut of_gamma = vec![0.0f32; width];
        let mut of_beta = vec![0.0f32; if beta { width } else { 0 }];
        let (x, gamma) = (numbers(&self.x), numbers(&self.gamma));
        let of_x = in_place(gradient, |gradient| {
            norm::backward(self.norm, &x, &gamma, &self.moments, gradient, &mut of_gamma, &mut of_beta);
        });
        [Some(of_x), Some(tensor_of(of_gamma, [width])), beta.then(|| tensor_of(of_beta, [width]))]
    }
}
