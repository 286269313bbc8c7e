//! A multi-layer perceptron for digits.

use super::gpt::held;
use super::{Activation, Batch, BlockCost, Model, count_correct, images};
use crate::layers::{Context, Init, Linear, cross_entropy, dropout};
use burn::module::Module;
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation::Relu;
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

/// See the [module](self). Every layer is a block.
#[derive(Module, Debug)]
pub struct Mlp {
    layers: Vec<Option<Linear>>,
    #[module(skip)]
    widths: Vec<usize>,
    #[module(skip)]
    rate: f64,
}

impl Mlp {
    /// A model of `config`'s shape from `pixels` inputs to `classes` outputs, of which `init` says what this rank holds.
    pub fn new(config: &MlpConfig, pixels: usize, classes: usize, init: &Init) -> Self {
        let widths = config.widths(pixels, classes);
        let layers = widths.windows(2).enumerate().map(|(i, pair)| {
            // He et al. 2015, "Delving Deep into Rectifiers", equation 10.
            let deviation = (2.0 / pair[0] as f32).sqrt();
            let init = init.of_blocks(&[i])?.at("layers").nth(i);
            Some(Linear::columns(&init, &[("inputs", pair[0])], &[("outputs", pair[1])], deviation, true))
        });
        Self { layers: layers.collect(), widths, rate: config.dropout }
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
        let layer = held(&self.layers[index]);
        let last = index + 1 == self.layers.len();
        Activation::Two(if last {
            layer.forward(x)
        } else {
            dropout(layer.activated(x, Relu), self.rate, context.noise(index as u64))
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), images(batch).1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), images(batch).1))
    }

    fn handed_on(&self, index: usize, batch: &Batch) -> Vec<Vec<usize>> {
        vec![vec![images(batch).1.dims()[0], self.widths[index + 1]]]
    }
}

impl MlpConfig {
    fn widths(&self, pixels: usize, classes: usize) -> Vec<usize> {
        [pixels].iter().chain(&self.hidden).chain(&[classes]).copied().collect()
    }

    /// What each block costs for one sample.
    pub fn costs(&self, pixels: usize, classes: usize) -> Vec<BlockCost> {
        let layers = self.widths(pixels, classes);
        let cost = |(i, pair): (usize, &[usize])| BlockCost {
            name: format!("layer {i}"),
            flops: 2.0 * (pair[0] * pair[1]) as f64,
            kept: (pair[0] + 3 * pair[1]) as f64,
        };
        layers.windows(2).enumerate().map(cost).collect()
    }
}
