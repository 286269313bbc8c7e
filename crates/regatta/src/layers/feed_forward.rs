//! The part of a transformer layer that works on each token by itself.

use super::{Deviations, Init, Linear, Split};
use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, gelu_approximate};
use serde::{Deserialize, Serialize};

/// Which GELU (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// By the error function.
    #[default]
    Erf,
    /// By the hyperbolic tangent, as in GPT-2.
    Tanh,
}

/// Up to four times the width, and down again.
pub(crate) fn feed_forward_layers(
    init: &Init,
    width: usize,
    deviations: Deviations,
    bias: bool,
) -> (Linear, Linear) {
    let (embed, mlp): (&[_], &[_]) = (&[("embed", width)], &[("mlp", 4 * width)]);
    (
        Linear::columns(&init.at("up"), embed, mlp, deviations.input, bias),
        Linear::rows(&init.at("down"), mlp, embed, deviations.residual, bias),
    )
}

/// Of `x` `[batch, time, embed]`, the same.
pub(crate) fn feed_forward(x: Tensor<3>, up: &Linear, down: &Linear, act: Gelu, split: &Split) -> Tensor<3> {
    let hidden = up.forward(split.enter(x));
    let hidden = match act {
        Gelu::Erf => gelu(hidden),
        Gelu::Tanh => gelu_approximate(hidden),
    };
    down.add_bias(split.leave(down.sum(hidden)))
}
