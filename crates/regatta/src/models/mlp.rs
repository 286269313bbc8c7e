//! A multi-layer perceptron for digits.

use super::{Activation, Batch, Model, count_correct, images};
use crate::layers::{Context, Init, cross_entropy, dropout};
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use serde::{Deserialize, Serialize};

/// Shape of an [`Mlp`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MlpConfig {
    /// Widths of the hidden layers.
    pub hidden: Vec<usize>,
    /// Dropout rate after each hidden layer, 0 to below 1.
    pub dropout: f64,
}

impl Default for MlpConfig {
    fn default() -> Self {
        Self { hidden: vec![512, 256], dropout: 0.0 }
    }
}

/// See the [module](self).
#[derive(Module, Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
    #[module(skip)]
    rate: f64,
}

impl Mlp {
    /// A model of `config`'s shape from `pixels` inputs to `classes` outputs, with weights of `seed`.
    pub fn new(config: &MlpConfig, pixels: usize, classes: usize, seed: u64) -> Self {
        let init = Init::new(seed).at("layers");
        let widths: Vec<usize> = [pixels].iter().chain(&config.hidden).chain(&[classes]).copied().collect();
        let layers = widths.windows(2).enumerate().map(|(i, pair)| {
            // He et al. 2015, "Delving Deep into Rectifiers", equation 10.
            init.nth(i).linear(pair[0], pair[1], (2.0 / pair[0] as f32).sqrt(), true)
        });
        Self { layers: layers.collect(), rate: config.dropout }
    }
}

impl Model for Mlp {
    fn num_blocks(&self) -> usize {
        self.layers.len()
    }

    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let x: Tensor<2> = match input {
            Activation::Start => images(batch).0.clone().flatten(1, 3),
            input => input.two(),
        };
        let x = self.layers[index].forward(x);
        let last = index + 1 == self.layers.len();
        Activation::Two(if last { x } else { dropout(relu(x), self.rate, context, index as u64) })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), images(batch).1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), images(batch).1))
    }
}
