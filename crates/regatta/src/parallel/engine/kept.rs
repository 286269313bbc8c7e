//! The inputs and results of a step, and the activations that it keeps for the backward pass.

use crate::layers::Context;
use crate::models::{Activation, Batch, Model};
use crate::parallel::exchange::CommTime;
use burn::tensor::Tensor;

/// A micro-batch of a step.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// The samples.
    pub batch: Batch,
    /// The context of the forward pass.
    pub context: Context,
    /// The weight of this micro-batch's mean loss: the part of its targets that are not ignored.
    pub weight: f64,
}

/// The result of a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepResult {
    /// The sum of the micro-batches' weighted losses on the rank that computes them; 0 on other ranks.
    pub loss_sum: f64,
    /// The time that communication took.
    pub comm: CommTime,
}

/// A micro-batch in a chunk of this rank's stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MicroChunk {
    pub(super) chunk: usize,
    pub(super) micro_batch: usize,
}

/// What the forward pass of a block keeps for its backward pass.
pub(super) struct Kept {
    pub(super) input: Activation,
    /// The output with its graph; none if the block is recomputed.
    pub(super) output: Option<Output>,
}

/// The output of a block, or the loss after the last block.
#[allow(clippy::large_enum_variant)]
pub(super) enum Output {
    Activation(Activation),
    Loss(Tensor<1>),
}

/// The number of elements that `block` returns for `batch`.
pub(super) fn elements(model: &dyn Model, block: usize, batch: &crate::models::Batch) -> usize {
    model.output_shapes(block, batch).iter().map(|shape| shape.iter().product::<usize>()).sum()
}
