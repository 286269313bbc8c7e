//! The interface of a model: a chain of blocks between a batch and a loss.

use super::activation::Activation;
use super::batch::Batch;
use crate::layers::Context;
use burn::tensor::{Int, Tensor};

/// A model as a chain of blocks between a batch and a loss. A pipeline may cut the model between two blocks, and each block
/// is recomputed and gathered separately. A model that is not a chain has one block.
///
/// The model is also a Burn module, whose parameters a [`ParamBuilder`](crate::layers::ParamBuilder) creates. It does not
/// know its plan: a part that another rank may hold is a field of type `Option`, see [`held`].
pub trait Model {
    /// The number of blocks in the chain, at least 1.
    fn num_blocks(&self) -> usize;

    /// Runs block `block`, counted from 0. `input` is what the block before returned, or [`Activation::Start`] for the first.
    ///
    /// # Panics
    /// This rank does not hold the block, or `input` or `batch` are of another kind than the block takes.
    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation;

    /// The mean loss over the targets of the batch that are not [`IGNORED`](crate::models::IGNORED), from the last block's
    /// output, as `[1]`. Targets are classes of samples, or tokens of texts.
    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1>;

    /// The shapes of the tensors that block `block` returns for `batch` on this rank: two for an [`Activation::Pair`], one
    /// for the other activations.
    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>>;

    /// The number of samples that the last block's output classifies correctly; none for a model that does not classify.
    fn correct(&self, _output: &Activation, _batch: &Batch) -> Option<usize> {
        None
    }

    /// The names of the model's own metrics.
    fn metric_names(&self) -> &'static [&'static str] {
        &[]
    }

    /// The model's own metrics of the last block's output, in the order of [`metric_names`](Self::metric_names): for each, the
    /// sum over the batch's samples. Where the vocabulary is split over the axis `tensor`, `output` has this rank's part of it.
    fn metrics(&self, _output: &Activation, _batch: &Batch) -> Vec<f64> {
        vec![]
    }

    /// Runs all blocks and returns the last block's output.
    ///
    /// # Panics
    /// This rank does not hold all blocks.
    fn forward(&self, batch: &Batch, context: &Context) -> Activation {
        (0..self.num_blocks())
            .fold(Activation::Start, |x, block| self.forward_block(block, x, batch, context))
    }
}

/// The cost of one block for one sample, summed over the ranks that it is split over.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCost {
    /// The name of the block, such as `layer 3`.
    pub name: String,
    /// Floating-point operations of the forward pass; the backward pass takes twice as many.
    pub flops: f64,
    /// Numbers that the forward pass keeps for the backward pass.
    pub kept: f64,
    /// The numbers among `kept` that every rank of the tensor axis keeps, unless the regions between split layers are split
    /// by time.
    pub unsplit: f64,
}

/// A part of the model that this rank holds.
///
/// # Panics
/// This rank does not hold it: the plan runs a block on a rank without its parameters, which is a bug.
pub fn held<T>(part: &Option<T>) -> &T {
    part.as_ref().expect("a rank runs only the blocks that it holds")
}

/// The number of rows of `logits` `[batch, classes]` whose largest value is at the class in `labels` `[batch]`.
pub fn count_correct(logits: &Tensor<2>, labels: &Tensor<1, Int>) -> usize {
    let [rows, _] = logits.dims();
    let best = logits.clone().argmax(1).reshape([rows]);
    best.equal(labels.clone()).int().sum().into_scalar::<i64>() as usize
}
