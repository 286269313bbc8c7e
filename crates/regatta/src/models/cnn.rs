//! A small convolutional network for digits, in the shape of LeNet-5 (LeCun et al. 1998) with ReLU and dropout.

use super::{Activation, Batch, Model, count_correct, images};
use crate::layers::{Context, Init, cross_entropy, dropout};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn::tensor::module::{conv2d, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
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

/// See the [module](self).
#[derive(Module, Debug)]
pub struct Cnn {
    convs: Vec<Conv>,
    hidden: Linear,
    head: Linear,
    #[module(skip)]
    rate: f64,
}

#[derive(Module, Debug)]
struct Conv {
    weight: Param<Tensor<4>>,
    bias: Param<Tensor<1>>,
}

impl Cnn {
    /// A model of `config`'s shape over one-channel pictures of `side` x `side` pixels, with weights of `seed`.
    pub fn new(config: &CnnConfig, side: usize, classes: usize, seed: u64) -> Self {
        let init = Init::new(seed);
        let (mut inputs, mut side) = (1, side);
        let mut convs = vec![];
        for (i, &outputs) in config.channels.iter().enumerate() {
            let init = init.at("convs").nth(i);
            convs.push(Conv {
                weight: init.normal([outputs, inputs, 3, 3], (2.0 / (9 * inputs) as f32).sqrt()),
                bias: init.zeros([outputs]),
            });
            (inputs, side) = (outputs, side / 2);
        }
        let flat = inputs * side * side;
        Self {
            convs,
            hidden: init.at("hidden").linear(flat, config.hidden, (2.0 / flat as f32).sqrt(), true),
            head: init.at("head").linear(config.hidden, classes, (1.0 / config.hidden as f32).sqrt(), true),
            rate: config.dropout,
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
            let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
            let x = relu(conv2d(input.four(), conv.weight.val(), Some(conv.bias.val()), options));
            return Activation::Four(max_pool2d(x, MaxPoolOptions::new([2, 2])));
        }
        Activation::Two(if index == self.convs.len() {
            dropout(
                relu(self.hidden.forward(input.four().flatten::<2>(1, 3))),
                self.rate,
                context,
                index as u64,
            )
        } else {
            self.head.forward(input.two())
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), images(batch).1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), images(batch).1))
    }
}
