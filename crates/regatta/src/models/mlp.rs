//! A multi-layer perceptron for images of digits.

use super::{
    Activation, Batch, BlockCost, Limit, Model, ModelSpec, Problem, Samples, count_correct, held, largest,
    rates,
};
use crate::layers::{Context, Linear, ParamBuilder, cross_entropy, dropout};
use burn::module::Module;
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation::Relu;
use serde::{Deserialize, Serialize};

/// The configuration of an [`Mlp`].
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

/// A multi-layer perceptron with ReLU for images of digits, `[batch, 28, 28, 1]` to logits `[batch, classes]`. Every layer is
/// a block.
#[derive(Module, Debug)]
pub struct Mlp {
    layers: Vec<Option<Linear>>,
    #[module(skip)]
    widths: Vec<usize>,
    #[module(skip)]
    rate: f64,
}

impl Mlp {
    /// Builds the model for `classes` classes; `params` creates its parameters.
    pub fn new(config: &MlpConfig, classes: usize, params: &ParamBuilder) -> Self {
        let widths = config.widths(classes);
        let layers = widths.windows(2).enumerate().map(|(i, pair)| {
            // He et al. 2015, "Delving Deep into Rectifiers", equation 10.
            let deviation = (2.0 / pair[0] as f32).sqrt();
            let params = params.of_blocks(&[i])?.at("layers").nth(i);
            Some(Linear::columns(&params, &[("inputs", pair[0])], &[("outputs", pair[1])], deviation, true))
        });
        Self { layers: layers.collect(), widths, rate: config.dropout }
    }
}

impl Model for Mlp {
    fn num_blocks(&self) -> usize {
        self.layers.len()
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let x: Tensor<2> = match input {
            Activation::Start => batch.images().0.clone().flatten(1, 3),
            input => input.two(),
        };
        let layer = held(&self.layers[block]);
        let last = block + 1 == self.layers.len();
        Activation::Two(if last {
            layer.forward(x)
        } else {
            dropout(layer.activated(x, Relu), self.rate, context.noise(block, 0))
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), batch.images().1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), batch.images().1))
    }

    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        vec![vec![batch.images().1.dims()[0], self.widths[block + 1]]]
    }
}

/// Height and width of an image in pixels.
const SIDE: usize = 28;

impl MlpConfig {
    /// The widths of the input, the hidden layers and the output.
    fn widths(&self, classes: usize) -> Vec<usize> {
        [SIDE * SIDE].iter().chain(&self.hidden).chain(&[classes]).copied().collect()
    }
}

impl ModelSpec for MlpConfig {
    const KIND: &'static str = "mlp";
    type Model = Mlp;

    fn samples(&self) -> Samples {
        Samples::Images { height: SIDE, width: SIDE, channels: 1 }
    }

    fn build(&self, classes: usize, params: &ParamBuilder) -> Mlp {
        Mlp::new(self, classes, params)
    }

    fn costs(&self, classes: usize) -> Vec<BlockCost> {
        let layers = self.widths(classes);
        let cost = |(i, pair): (usize, &[usize])| BlockCost {
            name: format!("layer {i}"),
            flops: 2.0 * (pair[0] * pair[1]) as f64,
            kept: (pair[0] + 3 * pair[1]) as f64,
            unsplit: 0.0,
        };
        layers.windows(2).enumerate().map(cost).collect()
    }

    fn limits(&self) -> Vec<Limit> {
        let widest = self.hidden.iter().copied().max().unwrap_or(0);
        vec![("hidden", widest, largest::WIDTH), ("hidden", self.hidden.len(), largest::LAYERS)]
    }

    fn check(&self) -> Result<(), Problem> {
        rates(&[("dropout", self.dropout)])?;
        if self.hidden.contains(&0) {
            return Err(Problem::new("hidden", "every width must be at least 1"));
        }
        Ok(())
    }
}
