//! The part of a transformer layer that works on each token by itself.

use super::{Deviations, Init, Linear, Split};
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation;
use serde::{Deserialize, Serialize};

/// Which function is between the two layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationFunction {
    /// GELU by the error function (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units").
    #[default]
    #[serde(alias = "erf")]
    Gelu,
    /// GELU by the hyperbolic tangent, as in GPT-2.
    #[serde(alias = "tanh")]
    GeluTanh,
    /// SiLU (Elfwing et al. 2018).
    Silu,
    /// The rectifier.
    Relu,
}

impl From<ActivationFunction> for Activation {
    fn from(function: ActivationFunction) -> Self {
        match function {
            ActivationFunction::Gelu => Self::Gelu,
            ActivationFunction::GeluTanh => Self::GeluTanh,
            ActivationFunction::Silu => Self::Silu,
            ActivationFunction::Relu => Self::Relu,
        }
    }
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
pub(crate) fn feed_forward(
    x: Tensor<3>,
    up: &Linear,
    down: &Linear,
    function: ActivationFunction,
    split: &Split,
) -> Tensor<3> {
    let hidden = up.activated(split.enter(x), function.into());
    down.add_bias(split.leave(down.sum(hidden)))
}
