//! Initial weights.

use crate::autograd::train_device;
use crate::random::Stream;
use burn::module::{Param, ParamId};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Tensor, TensorData};

/// Makes parameters whose numbers are a function of (seed, path): the same on every rank and for every plan.
#[derive(Debug, Clone)]
pub struct Init {
    stream: Stream,
}

impl Init {
    /// For a model's root.
    pub fn new(seed: u64) -> Self {
        Self { stream: Stream::new(seed).named("init") }
    }

    /// For the part of the model called `name`.
    pub fn at(&self, name: &str) -> Self {
        Self { stream: self.stream.named(name).named("/") }
    }

    /// The `index`-th of several parts.
    pub fn nth(&self, index: usize) -> Self {
        Self { stream: self.stream.at(index as u64) }
    }

    fn param<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        let tensor = Tensor::from_data(TensorData::new(values, shape), &train_device());
        Param::initialized(ParamId::new(), tensor.require_grad())
    }

    /// Normally distributed with mean 0.
    pub fn normal<const D: usize>(&self, shape: [usize; D], deviation: f32) -> Param<Tensor<D>> {
        Self::param(self.stream.normal(shape.iter().product(), deviation), shape)
    }

    /// Zeros.
    pub fn zeros<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D>> {
        Self::param(vec![0.0; shape.iter().product()], shape)
    }

    /// A linear layer `[input, output]` with normal weights.
    pub fn linear(&self, input: usize, output: usize, deviation: f32, bias: bool) -> Linear {
        Linear {
            weight: self.at("weight").normal([input, output], deviation),
            bias: bias.then(|| self.zeros([output])),
        }
    }

    /// Layer norm over the last dimension.
    pub fn layer_norm(&self, width: usize, bias: bool) -> LayerNorm {
        LayerNormConfig::new(width).with_bias(bias).init(&train_device())
    }
}
