//! The linear layer.

use super::{Initializer, ParamBuilder};
use crate::autograd::linear;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation;

/// A linear layer, `x * weight + bias`. `input` and `output` are the sizes that this rank holds.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[input, output]`
    weight: Param<Tensor<2>>,
    /// `[output]`
    bias: Option<Param<Tensor<1>>>,
}

/// The named dimensions that one stored dimension combines, with their sizes in the whole model.
pub type Dims<'a> = &'a [(&'a str, usize)];

impl Linear {
    /// A layer whose outputs may be split over ranks (Shoeybi et al. 2019, "Megatron-LM", section 3): the layout decides by
    /// the names in `output`, and the bias is split with the outputs. `deviation` is the standard deviation of initial
    /// weights.
    pub fn columns(params: &ParamBuilder, input: Dims, output: Dims, deviation: f32, bias: bool) -> Self {
        Self {
            weight: params.param("weight", [input, output], Initializer::Normal(deviation)),
            bias: bias.then(|| params.param("bias", [output], Initializer::Constant(0.0))),
        }
    }

    /// A layer whose inputs may be split over ranks (Shoeybi et al. 2019, section 3): the layout decides by the names in
    /// `input`. Each rank then has a partial sum, so that [`sum`](Self::sum) and [`add_bias`](Self::add_bias) are two steps
    /// with a [`leave`](super::Split::leave) between them. `deviation` is the standard deviation of initial weights.
    pub fn rows(params: &ParamBuilder, input: Dims, output: Dims, deviation: f32, bias: bool) -> Self {
        Self {
            weight: params.param("weight", [input, output], Initializer::Normal(deviation)),
            bias: bias.then(|| params.param_of_region("bias", [output], Initializer::Constant(0.0))),
        }
    }

    /// Maps `[.., input]` to `[.., output]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.activated(x, Activation::Identity)
    }

    /// As [`forward`](Self::forward), followed by `activation`.
    pub fn activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        linear(x, self.weight.val(), self.bias.as_ref().map(Param::val), activation)
    }

    /// As [`forward`](Self::forward), without the bias.
    pub fn sum<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        linear(x, self.weight.val(), None, Activation::Identity)
    }

    /// Adds the bias, if there is one, to `x` `[.., output]`.
    pub fn add_bias<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.bias {
            Some(bias) => x + bias.val().unsqueeze(),
            None => x,
        }
    }
}
