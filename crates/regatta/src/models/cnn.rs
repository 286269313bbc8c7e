//! A small convolutional network for digits, in the shape of LeNet-5 (LeCun et al. 1998) with ReLU and dropout.

use super::gpt::held;
use super::{Activation, Batch, BlockCost, Model, count_correct, images};
use crate::layers::{Context, Convolution, Init, Linear, cross_entropy, dropout};
use burn::module::Module;
use burn::tensor::Tensor;
use regatta_kernel::activation::Activation::Relu;
use serde::{Deserialize, Serialize};

/// Shape of a [`Cnn`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CnnConfig {
    /// Output channels of each 3x3 convolution; each is followed by a 2x2 max pooling.
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

/// See the [module](self). Every layer is a block.
#[derive(Module, Debug)]
pub struct Cnn {
    convs: Vec<Option<Convolution>>,
    hidden: Option<Linear>,
    head: Option<Linear>,
    #[module(skip)]
    shape: Shape,
}

#[derive(Debug, Clone)]
struct Shape {
    config: CnnConfig,
    side: usize,
    classes: usize,
}

impl Cnn {
    /// A model of `config`'s shape over one-channel pictures of `side` x `side` pixels, of which `init` says what this
    /// rank holds.
    pub fn new(config: &CnnConfig, side: usize, classes: usize, init: &Init) -> Self {
        let mut inputs = 1;
        let mut convs = vec![];
        for (i, &outputs) in config.channels.iter().enumerate() {
            let conv = |init: Init| Convolution::new(&init.at("convs").nth(i), 3, inputs, outputs, true);
            convs.push(init.of_blocks(&[i]).map(conv));
            inputs = outputs;
        }
        let side_now = side >> config.channels.len();
        let flat = inputs * side_now * side_now;
        let linear = |block: usize, name: &str, inputs: usize, outputs: usize, deviation: f32| {
            let init = init.of_blocks(&[block])?.at(name);
            Some(Linear::columns(&init, &[("inputs", inputs)], &[("outputs", outputs)], deviation, true))
        };
        let hidden = config.hidden;
        Self {
            hidden: linear(convs.len(), "hidden", flat, hidden, (2.0 / flat as f32).sqrt()),
            head: linear(convs.len() + 1, "head", hidden, classes, (1.0 / hidden as f32).sqrt()),
            convs,
            shape: Shape { config: config.clone(), side, classes },
        }
    }
}

impl Model for Cnn {
    fn num_blocks(&self) -> usize {
        self.convs.len() + 2
    }

    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let input = match input {
            Activation::Start => Activation::Four(images(batch).0.clone()),
            input => input,
        };
        if let Some(conv) = self.convs.get(index) {
            return Activation::Four(held(conv).pooled(input.four()));
        }
        Activation::Two(if index == self.convs.len() {
            let x = held(&self.hidden).activated(input.four().flatten::<2>(1, 3), Relu);
            dropout(x, self.shape.config.dropout, context.noise(index as u64))
        } else {
            held(&self.head).forward(input.two())
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), images(batch).1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), images(batch).1))
    }

    fn handed_on(&self, index: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let rows = images(batch).1.dims()[0];
        let Shape { config, side, classes } = &self.shape;
        vec![match config.channels.get(index) {
            Some(&channels) => vec![rows, side >> (index + 1), side >> (index + 1), channels],
            None if index == config.channels.len() => vec![rows, config.hidden],
            None => vec![rows, *classes],
        }]
    }
}

impl CnnConfig {
    /// What each block costs for one sample of `side` x `side` pixels.
    pub fn costs(&self, side: usize, classes: usize) -> Vec<BlockCost> {
        let mut inputs = 1;
        let mut costs = vec![];
        for (i, &outputs) in self.channels.iter().enumerate() {
            let pixels = (side >> i).pow(2);
            costs.push(BlockCost {
                name: format!("convolution {i}"),
                flops: 2.0 * (9 * inputs * outputs * pixels) as f64,
                kept: ((inputs + 2 * outputs) * pixels) as f64,
            });
            inputs = outputs;
        }
        let flat = inputs * (side >> self.channels.len()).pow(2);
        for (name, inputs, outputs) in [("hidden", flat, self.hidden), ("head", self.hidden, classes)] {
            let kept = (inputs + 3 * outputs) as f64;
            costs.push(BlockCost { name: name.into(), flops: 2.0 * (inputs * outputs) as f64, kept });
        }
        costs
    }
}
