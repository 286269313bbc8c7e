//! Models as chains of blocks.
//!
//! A model lists its blocks once, between the batch and the loss. Blocks are the unit by which every strategy
//! cuts a model; the model itself knows of none of them.

mod cnn;
mod crossings;
mod encoder_decoder;
mod gpt;
mod mlp;
mod resnet;

pub use cnn::{Cnn, CnnConfig};
pub use crossings::{Border, Crossing};
pub use encoder_decoder::{EncoderDecoder, EncoderDecoderConfig};
pub use gpt::{Gpt, GptConfig};
pub use mlp::{Mlp, MlpConfig};
pub use resnet::{Resnet, ResnetConfig};

pub use crate::layers::{ActivationFunction, NormKind};

use crate::autograd::cast;
use crate::layers::Context;
use burn::module::Module;
use burn::tensor::{DType, Int, Tensor};

/// One micro-batch on the device.
#[derive(Debug, Clone)]
// A handful are alive at once, so their size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum Batch {
    /// Token ids and the ids that follow them.
    Text {
        /// `[batch, time]`
        inputs: Tensor<2, Int>,
        /// `[batch, time]`
        targets: Tensor<2, Int>,
    },
    /// Sequences and the sequences that answer them.
    Pairs {
        /// `[batch, source time]`
        sources: Tensor<2, Int>,
        /// `[batch, time]`
        inputs: Tensor<2, Int>,
        /// What follows each of the inputs, `[batch, time]`.
        targets: Tensor<2, Int>,
    },
    /// Pictures and their classes.
    Images {
        /// `[batch, height, width, channels]`
        pixels: Tensor<4>,
        /// `[batch]`
        labels: Tensor<1, Int>,
    },
}

impl Batch {
    /// With pixels of this type of numbers.
    pub(crate) fn cast(self, dtype: DType) -> Self {
        match self {
            Self::Images { pixels, labels } => Self::Images { pixels: cast(pixels, dtype), labels },
            text => text,
        }
    }

    /// Samples.
    pub fn rows(&self) -> usize {
        match self {
            Self::Text { inputs, .. } | Self::Pairs { inputs, .. } => inputs.dims()[0],
            Self::Images { labels, .. } => labels.dims()[0],
        }
    }
}

/// What flows from block to block.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)]
pub enum Activation {
    /// Into the first block: it reads the batch.
    Start,
    /// `[batch, features]`
    Two(Tensor<2>),
    /// `[batch, time, embed]`
    Three(Tensor<3>),
    /// `[batch, height, width, channels]`
    Four(Tensor<4>),
    /// A decoder's `[batch, time, embed]`, and the encoder's result that it looks at, `[batch, source time, embed]`.
    Pair(Tensor<3>, Tensor<3>),
}

/// What is done with each tensor of an activation.
pub(crate) trait Each {
    /// One of them.
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D>;
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

    /// A decoder's tensor and the encoder's; panics as [`two`](Self::two).
    pub fn pair(self) -> (Tensor<3>, Tensor<3>) {
        match self {
            Self::Pair(x, memory) => (x, memory),
            other => panic!("the block takes a decoder's and an encoder's tensor, not {other:?}"),
        }
    }

    /// Passes every tensor through `each`.
    pub(crate) fn map(self, each: &mut impl Each) -> Self {
        match self {
            Self::Start => Self::Start,
            Self::Two(x) => Self::Two(each.tensor(x)),
            Self::Three(x) => Self::Three(each.tensor(x)),
            Self::Four(x) => Self::Four(each.tensor(x)),
            Self::Pair(x, memory) => {
                let x = each.tensor(x);
                Self::Pair(x, each.tensor(memory))
            }
        }
    }

    /// `[batch, height, width, channels]`; panics as [`two`](Self::two).
    pub fn four(self) -> Tensor<4> {
        match self {
            Self::Four(x) => x,
            other => panic!("the block takes [batch, height, width, channels], not {other:?}"),
        }
    }
}

/// What one block costs for one sample, over all ranks that it is split over.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCost {
    /// What the block is.
    pub name: String,
    /// Floating-point operations forward; backward takes twice as many.
    pub flops: f64,
    /// Numbers kept from forward for backward.
    pub kept: f64,
}

/// The block-chain contract: a Burn module that is a sequence of blocks between a batch and a loss.
pub trait Model: Module {
    /// How many blocks the chain has.
    fn num_blocks(&self) -> usize;

    /// Runs block `index` on what block `index - 1` returned ([`Activation::Start`] for the first).
    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation;

    /// The mean loss over the batch's samples (tokens for text), from the last block's output.
    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1>;

    /// The shapes of what block `index` hands on for `batch`, as this rank sees them.
    fn handed_on(&self, index: usize, batch: &Batch) -> Vec<Vec<usize>>;

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
        Batch::Text { .. } | Batch::Pairs { .. } => panic!("an image model was given text"),
    }
}

/// How many rows of `logits` `[batch, classes]` have their largest value at the label.
fn count_correct(logits: &Tensor<2>, labels: &Tensor<1, Int>) -> usize {
    let [rows, _] = logits.dims();
    let best = logits.clone().argmax(1).reshape([rows]);
    best.equal(labels.clone()).int().sum().into_scalar::<i64>() as usize
}
