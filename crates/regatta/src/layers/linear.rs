//! The linear layer.

use super::{Fill, Init};
use crate::autograd::linear;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation;

/// `x * weight + bias`; weight `[input, output]` as this rank holds it.
#[derive(Module, Debug)]
pub struct Linear {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

/// The dimensions that one stored dimension is made of.
pub type Dims<'a> = &'a [(&'a str, usize)];

impl Linear {
    /// Split by its outputs, if they are: the bias is split with them.
    pub fn columns(init: &Init, input: Dims, output: Dims, deviation: f32, bias: bool) -> Self {
        Self {
            weight: init.param("weight", [input, output], Fill::Normal(deviation)),
            bias: bias.then(|| init.param("bias", [output], Fill::Constant(0.0))),
        }
    }

    /// Split by its inputs, if they are: [`sum`](Self::sum) and [`add_bias`](Self::add_bias) are then two steps, with the
    /// ranks' sums between them.
    pub fn rows(init: &Init, input: Dims, output: Dims, deviation: f32, bias: bool) -> Self {
        Self {
            weight: init.param("weight", [input, output], Fill::Normal(deviation)),
            bias: bias.then(|| init.param_of_region("bias", [output], Fill::Constant(0.0))),
        }
    }

    /// Of `[.., input]`, `[.., output]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.activated(x, Activation::Identity)
    }

    /// With an activation function behind it.
    pub fn activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        linear(x, self.weight.val(), self.bias.as_ref().map(Param::val), activation)
    }

    /// Without the bias.
    pub fn sum<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        linear(x, self.weight.val(), None, Activation::Identity)
    }

    /// The rest of the layer.
    pub fn add_bias<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.bias {
            Some(bias) => x + bias.val().unsqueeze(),
            None => x,
        }
    }
}
