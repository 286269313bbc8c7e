//! The feed-forward part of a transformer layer (Vaswani et al. 2017, "Attention Is All You Need", section 3.3).

use super::{Deviations, Linear, ParamBuilder, Split};
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation;
use serde::{Deserialize, Serialize};

/// The activation function between the two linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationFunction {
    /// GELU with the error function (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units").
    #[default]
    #[serde(alias = "erf")]
    Gelu,
    /// GELU's approximation with the hyperbolic tangent, as in GPT-2 (Hendrycks & Gimpel 2016, section 2).
    #[serde(alias = "tanh")]
    GeluTanh,
    /// SiLU (Elfwing et al. 2018, "Sigmoid-Weighted Linear Units").
    Silu,
    /// The rectified linear unit.
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

/// The hidden width of a feed-forward part, in widths of the model.
const EXPANSION: usize = 4;

/// The two linear layers: from `width` up to the hidden width, and down again.
pub(crate) fn feed_forward_layers(
    params: &ParamBuilder,
    width: usize,
    deviations: Deviations,
    bias: bool,
) -> (Linear, Linear) {
    let (embed, mlp): (&[_], &[_]) = (&[("embed", width)], &[("mlp", EXPANSION * width)]);
    (
        Linear::columns(&params.at("up"), embed, mlp, deviations.input, bias),
        Linear::rows(&params.at("down"), mlp, embed, deviations.residual, bias),
    )
}

/// Maps `x` `[batch, time, width]` to `[batch, time, width]`.
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
