//! A model's parameter and the part of it that a rank holds.

use crate::autograd::AxisGroup;
use regatta_plan::{Axis, AxisSet, Layout, Mesh, Piece, TensorSpec};
use std::ops::Range;

/// The place of a rank in the mesh, and how layers are split there.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The mesh.
    pub mesh: Mesh,
    /// The axis that each dimension is split over.
    pub layout: Layout,
    /// The rank.
    pub rank: usize,
    /// The ranks that layers are split over; none if the mesh has no tensor axis, or to describe a model without ranks.
    pub tensor: Option<AxisGroup>,
    /// Whether the regions between split layers are split by time.
    pub sequence: bool,
}

impl Placement {
    /// The whole model on one rank.
    pub fn whole() -> Self {
        Self { mesh: Mesh::data(1), layout: Layout::default(), rank: 0, tensor: None, sequence: false }
    }

    /// The number of ranks along the tensor axis, and this rank's index there.
    pub(crate) fn along_tensor(&self) -> (usize, usize) {
        (self.mesh.axis(Axis::Tensor), self.mesh.coordinate(self.rank, Axis::Tensor))
    }
}

/// A parameter that a model declared, and the part of it that a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedParam {
    /// The parameter in the whole model.
    pub spec: TensorSpec,
    /// The part of each dimension that this rank holds.
    pub ranges: Vec<Range<usize>>,
    /// The blocks that use it.
    pub blocks: Vec<usize>,
    /// The axes that it is split over.
    pub split_over: AxisSet,
    /// The axes over which the ranks' gradients must be summed.
    pub partial_over: AxisSet,
    /// Whether it is a running statistic. Its gradient is the statistic of the batch, of which it is the moving average.
    /// Learning rate, weight decay and clipping do not apply to it.
    pub statistic: bool,
}

impl PlacedParam {
    /// The number of elements that the rank holds, in all shards together.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(Range::len).product()
    }

    /// The rows that the rank holds of a parameter of two dimensions or more, as a matrix of which the last dimension has the
    /// columns; none of others.
    pub fn rows(&self) -> Option<usize> {
        let [rows @ .., _] = &self.spec.shape[..] else { return None };
        let whole: usize = rows.iter().product();
        // Named dimensions may be finer than the shape.
        let (mut of_whole, mut held) = (1, 1);
        for (dim, range) in self.spec.dims.iter().zip(&self.ranges) {
            if of_whole >= whole {
                break;
            }
            (of_whole, held) = (of_whole * dim.size, held * range.len());
        }
        (!rows.is_empty()).then_some(held)
    }

    /// The axes over which all ranks hold the same elements. Leaves out the pipeline axis, and ignores shards.
    pub fn replicated_over(&self) -> AxisSet {
        AxisSet::ALL.without(self.split_over).without(Axis::Pipe.into())
    }

    /// The part of the parameter that the rank holds, all shards together.
    pub fn piece(&self) -> Piece {
        let dims: Vec<usize> = self.spec.dims.iter().map(|dim| dim.size).collect();
        Piece::boxed(&dims, &self.ranges)
    }
}
