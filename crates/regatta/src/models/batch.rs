//! A micro-batch on the device of a rank.

use crate::autograd::cast;
use burn::tensor::{DType, Int, Tensor};

/// A micro-batch on the device of a rank. The loss leaves out targets and labels that are
/// [`IGNORED`](crate::models::IGNORED).
#[derive(Debug, Clone)]
// A handful are alive at once, so their size does not matter.
#[allow(clippy::large_enum_variant)]
#[non_exhaustive]
pub enum Batch {
    /// Texts.
    Text {
        /// Token ids, `[batch, time]`.
        inputs: Tensor<2, Int>,
        /// The token id that follows each input, `[batch, time]`.
        targets: Tensor<2, Int>,
    },
    /// Pairs of a source text and a target text.
    Pairs {
        /// Token ids of the sources, `[batch, source time]`.
        sources: Tensor<2, Int>,
        /// Token ids of the target texts, `[batch, time]`.
        inputs: Tensor<2, Int>,
        /// The token id that follows each input, `[batch, time]`.
        targets: Tensor<2, Int>,
    },
    /// Images and their classes.
    Images {
        /// The numbers of the pixels, `[batch, height, width, channels]`.
        pixels: Tensor<4>,
        /// The class of each image, `[batch]`.
        labels: Tensor<1, Int>,
    },
}

impl Batch {
    /// The batch with pixels of type `dtype`.
    pub(crate) fn cast(self, dtype: DType) -> Self {
        match self {
            Self::Images { pixels, labels } => Self::Images { pixels: cast(pixels, dtype), labels },
            text => text,
        }
    }

    /// The number of samples.
    pub fn rows(&self) -> usize {
        match self {
            Self::Text { inputs, .. } | Self::Pairs { inputs, .. } => inputs.dims()[0],
            Self::Images { labels, .. } => labels.dims()[0],
        }
    }

    /// The inputs and the targets of texts, each `[batch, time]`.
    ///
    /// # Panics
    /// The batch is of another kind than the model's [`Samples`](crate::models::Samples), which is a bug.
    pub fn text(&self) -> (&Tensor<2, Int>, &Tensor<2, Int>) {
        match self {
            Self::Text { inputs, targets } => (inputs, targets),
            _ => panic!("the model takes a batch of texts"),
        }
    }

    /// The sources `[batch, source time]`, and the inputs and the targets of pairs, each `[batch, time]`.
    ///
    /// # Panics
    /// As [`text`](Self::text).
    pub fn pairs(&self) -> (&Tensor<2, Int>, &Tensor<2, Int>, &Tensor<2, Int>) {
        match self {
            Self::Pairs { sources, inputs, targets } => (sources, inputs, targets),
            _ => panic!("the model takes a batch of pairs of texts"),
        }
    }

    /// The pixels `[batch, height, width, channels]` and the labels `[batch]` of images.
    ///
    /// # Panics
    /// As [`text`](Self::text).
    pub fn images(&self) -> (&Tensor<4>, &Tensor<1, Int>) {
        match self {
            Self::Images { pixels, labels } => (pixels, labels),
            _ => panic!("the model takes a batch of images"),
        }
    }
}
