//! A small convolutional network for images of digits, like LeNet-5 (LeCun et al. 1998, "Gradient-Based Learning Applied to
//! Document Recognition") with ReLU and dropout.

use super::{
    Activation, Batch, BlockCost, Limit, Model, ModelSpec, Problem, Samples, at_least_one, count_correct,
    held, largest, rates,
};
use crate::layers::{Context, Convolution, Linear, ParamBuilder, cross_entropy, dropout};
use burn::module::Module;
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation::Relu;
use serde::{Deserialize, Serialize};

/// The configuration of a [`Cnn`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CnnConfig {
    /// Output channels of each 3x3 convolution, 1 to 4 of them. A 2x2 max pooling follows each.
    pub channels: Vec<usize>,
    /// Width of the hidden linear layer.
    pub hidden: usize,
    /// Dropout rate before the last layer, 0 to below 1.
    pub dropout: f64,
}

impl Default for CnnConfig {
    fn default() -> Self {
        Self { channels: vec![16, 32], hidden: 128, dropout: 0.25 }
    }
}

/// A small convolutional network for images of digits, `[batch, 28, 28, 1]` to logits `[batch, classes]` (LeCun et al. 1998,
/// "Gradient-Based Learning Applied to Document Recognition"). Every layer is a block.
#[derive(Module, Debug)]
pub struct Cnn {
    convs: Vec<Option<Convolution>>,
    hidden: Option<Linear>,
    head: Option<Linear>,
    #[module(skip)]
    config: CnnConfig,
    #[module(skip)]
    classes: usize,
}

/// Height and width of an image in pixels.
const SIDE: usize = 28;
/// Height and width of a kernel in pixels.
const KERNEL: usize = 3;
/// Most convolutions. Each pooling halves the image, which 4 of them reduce to one pixel.
const MAX_CONVOLUTIONS: usize = 4;

impl Cnn {
    /// Builds the model for `classes` classes; `params` creates its parameters.
    pub fn new(config: &CnnConfig, classes: usize, params: &ParamBuilder) -> Self {
        let mut inputs = 1;
        let mut convs = vec![];
        for (i, &outputs) in config.channels.iter().enumerate() {
            let conv = |params: ParamBuilder| {
                Convolution::new(&params.at("convs").nth(i), KERNEL, inputs, outputs, true)
            };
            convs.push(params.of_blocks(&[i]).map(conv));
            inputs = outputs;
        }
        let side = SIDE >> config.channels.len();
        let flat = inputs * side * side;
        let linear = |block: usize, name: &str, inputs: usize, outputs: usize, deviation: f32| {
            let params = params.of_blocks(&[block])?.at(name);
            Some(Linear::columns(&params, &[("inputs", inputs)], &[("outputs", outputs)], deviation, true))
        };
        let hidden = config.hidden;
        Self {
            hidden: linear(convs.len(), "hidden", flat, hidden, (2.0 / flat as f32).sqrt()),
            head: linear(convs.len() + 1, "head", hidden, classes, (1.0 / hidden as f32).sqrt()),
            convs,
            config: config.clone(),
            classes,
        }
    }
}

impl Model for Cnn {
    fn num_blocks(&self) -> usize {
        self.convs.len() + 2
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let input = match input {
            Activation::Start => Activation::Four(batch.images().0.clone()),
            input => input,
        };
        if let Some(conv) = self.convs.get(block) {
            return Activation::Four(held(conv).pooled(input.four()));
        }
        Activation::Two(if block == self.convs.len() {
            let x = held(&self.hidden).activated(input.four().flatten::<2>(1, 3), Relu);
            dropout(x, self.config.dropout, context.noise(block, 0))
        } else {
            held(&self.head).forward(input.two())
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), batch.images().1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), batch.images().1))
    }

    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let rows = batch.rows();
        let side = SIDE >> (block + 1);
        vec![match self.config.channels.get(block) {
            Some(&channels) => vec![rows, side, side, channels],
            None if block == self.config.channels.len() => vec![rows, self.config.hidden],
            None => vec![rows, self.classes],
        }]
    }
}

impl ModelSpec for CnnConfig {
    const KIND: &'static str = "cnn";
    type Model = Cnn;

    fn samples(&self) -> Samples {
        Samples::Images { height: SIDE, width: SIDE, channels: 1 }
    }

    fn build(&self, classes: usize, params: &ParamBuilder) -> Cnn {
        Cnn::new(self, classes, params)
    }

    fn costs(&self, classes: usize) -> Vec<BlockCost> {
        let mut inputs = 1;
        let mut costs = vec![];
        for (i, &outputs) in self.channels.iter().enumerate() {
            let pixels = (SIDE >> i).pow(2);
            costs.push(BlockCost {
                name: format!("convolution {i}"),
                flops: 2.0 * (KERNEL * KERNEL * inputs * outputs * pixels) as f64,
                kept: ((inputs + 2 * outputs) * pixels) as f64,
                unsplit: 0.0,
            });
            inputs = outputs;
        }
        let flat = inputs * (SIDE >> self.channels.len()).pow(2);
        for (name, inputs, outputs) in [("hidden", flat, self.hidden), ("head", self.hidden, classes)] {
            let (flops, kept) = (2.0 * (inputs * outputs) as f64, (inputs + 3 * outputs) as f64);
            costs.push(BlockCost { name: name.into(), flops, kept, unsplit: 0.0 });
        }
        costs
    }

    fn limits(&self) -> Vec<Limit> {
        let widest = self.channels.iter().copied().max().unwrap_or(0);
        vec![("channels", widest, largest::CHANNELS), ("hidden", self.hidden, largest::WIDTH)]
    }

    fn check(&self) -> Result<(), Problem> {
        rates(&[("dropout", self.dropout)])?;
        at_least_one([("hidden", self.hidden)])?;
        if !(1..=MAX_CONVOLUTIONS).contains(&self.channels.len()) || self.channels.contains(&0) {
            let problem =
                format!("must have 1 to {MAX_CONVOLUTIONS} convolutions, each with at least 1 channel");
            return Err(Problem::new("channels", problem));
        }
        Ok(())
    }
}
