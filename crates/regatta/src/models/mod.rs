//! Models as chains of blocks.
//!
//! A model lists its blocks once, between the batch and the loss. Blocks are the unit by which every strategy
//! cuts a model; the model itself knows of none of them.

mod cnn;
mod gpt;
mod mlp;

pub use cnn::{Cnn, CnnConfig};
pub use gpt::{Gpt, GptConfig};
pub use mlp::{Mlp, MlpConfig};

use crate::layers::Context;
use burn::module::Module;
use burn::tensor::{Int, Tensor};

/// One micro-batch on the device.
#[derive(Debug, Clone)]
pub enum Batch {
    /// Token ids and the ids that follow them.
    Text {
        /// `[batch, time]`
        inputs: Tensor<2, Int>,
        /// `[batch, time]`
        targets: Tensor<2, Int>,
    },
    /// Pictures and their classes.
    Images {
        /// `[batch, channels, height, width]`
        pixels: Tensor<4>,
        /// `[batch]`
        labels: Tensor<1, Int>,
    },
}

/// What flows from block to block.
#[derive(Debug, Clone)]
pub enum Activation {
    /// Into the first block: it reads the batch.
    Start,
    /// `[batch, features]`
    Two(Tensor<2>),
    /// `[batch, time, embed]`
    Three(Tensor<3>),
    /// `[batch, channels, height, width]`
    Four(Tensor<4>),
}

impl Activation {
    /// `[batch, features]`.
    ///
    /// # Panics
    /// When a block hands on another rank than the next one takes: the model is wrong.
    pub fn two(self) -> Tensor<2> {
        match self {
            Self::Two(x) => x,
            other => panic!("the block takes [batch, features], not {other:?}"),
        }
    }

    /// `[batch, time, embed]`; panics as [`two`](Self::two).
    pub fn three(self) -> Tensor<3> {
        match self {
            Self::Three(x) => x,
            other => panic!("the block takes [batch, time, embed], not {other:?}"),
        }
    }

    /// `[batch, channels, height, width]`; panics as [`two`](Self::two).
    pub fn four(self) -> Tensor<4> {
        match self {
            Self::Four(x) => x,
            other => panic!("the block takes [batch, channels, height, width], not {other:?}"),
        }
    }
}

/// The block-chain contract: a Burn module that is a sequence of blocks between a batch and a loss.
pub trait Model: Module {
    /// How many blocks the chain has.
    fn num_blocks(&self) -> usize;

    /// Runs block `index` on what block `index - 1` returned ([`Activation::Start`] for the first).
    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation;

    /// The mean loss over the batch's samples (tokens for text), from the last block's output.
    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1>;

    /// How many samples the last block's output classifies rightly, for models that classify.
    fn correct(&self, _output: &Activation, _batch: &Batch) -> Option<usize> {
        None
    }

    /// Runs the whole chain.
    fn forward(&self, batch: &Batch, context: &Context) -> Activation {
        (0..self.num_blocks())
            .fold(Activation::Start, |x, index| self.forward_block(index, x, batch, context))
    }
}

/// The images and labels of a batch.
///
/// # Panics
/// On a batch of text: the configuration pairs models with data, so this is a bug.
fn images(batch: &Batch) -> (&Tensor<4>, &Tensor<1, Int>) {
    match batch {
        Batch::Images { pixels, labels } => (pixels, labels),
        Batch::Text { .. } => panic!("an image model was given text"),
    }
}

/// How many rows of `logits` `[batch, classes]` have their largest value at the label.
fn count_correct(logits: &Tensor<2>, labels: &Tensor<1, Int>) -> usize {
    let [rows, _] = logits.dims();
    let best = logits.clone().argmax(1).reshape([rows]);
    best.equal(labels.clone()).int().sum().into_scalar::<i64>() as usize
}
