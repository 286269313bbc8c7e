//! The boundaries of layers that are split over ranks: how a tensor enters them and leaves them.

use super::axis::{AxisGroup, copy_to_split, gather_time, scatter_time, sum_of_split};
use burn::tensor::Tensor;
use regatta_plan::part;
use std::ops::Range;

/// How a region of the model is split over the tensor axis (Shoeybi et al. 2019, "Megatron-LM", section 3; by time,
/// Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2). A region may
/// also be unsplit.
#[derive(Debug, Clone)]
pub struct Split {
    /// The number of ranks and this rank's index among them; none if the region is not split.
    place: Option<(usize, usize)>,
    axis: Option<AxisGroup>,
    sequence: bool,
}

impl Split {
    pub(crate) fn new(place: Option<(usize, usize)>, axis: Option<AxisGroup>, sequence: bool) -> Self {
        Self { place, axis, sequence }
    }

    /// A region that is not split: every rank holds all of it.
    pub fn whole() -> Self {
        Self { place: None, axis: None, sequence: false }
    }

    /// This rank's part of a dimension of `size` elements.
    pub fn part(&self, size: usize) -> Range<usize> {
        self.place.map_or(0..size, |(ranks, rank)| part(size, ranks, rank))
    }

    /// The ranks that share the region; none if it is not split, or if there is no group to communicate over.
    pub(crate) fn axis(&self) -> Option<&AxisGroup> {
        self.place.and(self.axis.as_ref())
    }

    /// Passes `x` `[batch, time, embed]` into split layers and returns `[batch, time, embed]`. Forward is the identity and
    /// backward an all-reduce. If the region before is split by time, `x` is this rank's part of the time, forward is an
    /// all-gather and backward a reduce-scatter.
    ///
    /// A failure of communication is reported after the block, by the engine.
    pub fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        match self.axis() {
            None => x,
            Some(axis) if self.sequence => gather_time(x, axis),
            Some(axis) => copy_to_split(x, axis),
        }
    }

    /// Passes `x` `[batch, time, embed]`, a partial sum on each rank, out of split layers. Forward is an all-reduce and
    /// backward the identity. If the region after is split by time, forward is a reduce-scatter, which returns this rank's
    /// part of the time, and backward an all-gather.
    ///
    /// A failure of communication is reported after the block, by the engine.
    pub fn leave(&self, x: Tensor<3>) -> Tensor<3> {
        match self.axis() {
            None => x,
            Some(axis) if self.sequence => scatter_time(x, axis),
            Some(axis) => sum_of_split(x, axis),
        }
    }
}
