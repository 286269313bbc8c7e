//! Where a tensor goes into layers that are split over ranks, and where it comes out again.

use crate::autograd::{Axis, copy_to_split, gather_time, scatter_time, sum_of_split};
use burn::tensor::Tensor;
use regatta_plan::part;
use std::ops::Range;

/// How a region of the model is split over the tensor axis; it may be whole.
#[derive(Debug, Clone)]
pub struct Split {
    /// Ranks and this rank's place, where it is split.
    place: Option<(usize, usize)>,
    axis: Option<Axis>,
    sequence: bool,
}

impl Split {
    pub(crate) fn new(place: Option<(usize, usize)>, axis: Option<Axis>, sequence: bool) -> Self {
        Self { place, axis, sequence }
    }

    /// Nothing is split.
    pub fn whole() -> Self {
        Self { place: None, axis: None, sequence: false }
    }

    /// This rank's part of `size` things.
    pub fn part(&self, size: usize) -> Range<usize> {
        self.place.map_or(0..size, |(ranks, rank)| part(size, ranks, rank))
    }

    /// The ranks, where there are several and there is a way to reach them.
    pub fn axis(&self) -> Option<&Axis> {
        self.place.and(self.axis.as_ref())
    }

    /// Into split layers, `[batch, time, embed]`: identity forward and all-reduce backward; where the region before is
    /// split by time, all-gather forward and reduce-scatter backward.
    pub fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        match self.axis() {
            None => x,
            Some(axis) if self.sequence => gather_time(x, axis),
            Some(axis) => copy_to_split(x, axis),
        }
    }

    /// Out of split layers: the ranks' partial sums meet, forward by all-reduce or, where the region behind is split by
    /// time, by reduce-scatter.
    pub fn leave(&self, x: Tensor<3>) -> Tensor<3> {
        match self.axis() {
            None => x,
            Some(axis) if self.sequence => scatter_time(x, axis),
            Some(axis) => sum_of_split(x, axis),
        }
    }
}
