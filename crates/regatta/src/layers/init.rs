//! Parameters: their names, initial weights, and the part of each that a rank holds.

use super::split::Split;
use crate::autograd::{Axis, train_device};
use crate::random::Stream;
use burn::module::{Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use regatta_plan::{Dim, Layout, Mesh, TensorSpec};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// One rank's place in the mesh, as far as layers need it.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The mesh.
    pub mesh: Mesh,
    /// Which dimension is split over which axis.
    pub layout: Layout,
    /// This rank.
    pub rank: usize,
    /// The ranks over which layers are split; none where the mesh does not have the axis.
    pub tensor: Option<Axis>,
    /// Whether the regions between split layers are split by `time`.
    pub sequence: bool,
}

impl Placement {
    /// The whole model on one rank.
    pub fn whole() -> Self {
        Self { mesh: Mesh::data(1), layout: Layout::default(), rank: 0, tensor: None, sequence: false }
    }
}

/// A parameter that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// It in the whole model.
    pub spec: TensorSpec,
    /// The part of each dimension that this rank holds.
    pub ranges: Vec<Range<usize>>,
    /// The blocks that use it.
    pub blocks: Vec<usize>,
    /// Whether this rank's gradient is but a part of the sum over the tensor axis.
    pub partial: bool,
    /// Whether it is a running statistic: its gradient is the batch's, of which it is the moving average, and neither
    /// learning rate nor decay nor clipping concern it.
    pub statistic: bool,
}

struct Shared {
    placement: Placement,
    blocks: Option<Vec<usize>>,
    /// Without, parameters are made known but have no memory.
    values: bool,
    made: Mutex<Vec<Made>>,
}

/// Makes parameters whose numbers are a function of (seed, path) and of the place in the whole tensor: the same on
/// every rank and for every plan.
#[derive(Clone)]
pub struct Init {
    stream: Stream,
    path: String,
    blocks: Vec<usize>,
    shared: Arc<Shared>,
}

/// How a parameter begins.
#[derive(Debug, Clone, Copy)]
pub enum Fill {
    /// Normally distributed with mean 0 and this deviation.
    Normal(f32),
    /// All this number.
    Constant(f32),
}

impl Init {
    /// For the root of a model of which this rank holds everything.
    pub fn new(seed: u64) -> Self {
        Self::placed(seed, Placement::whole(), None)
    }

    /// For the root of a model of which this rank holds these blocks, and of their parameters its part.
    pub fn placed(seed: u64, placement: Placement, blocks: Option<Vec<usize>>) -> Self {
        Self::root(seed, placement, blocks, true)
    }

    /// For a model of which only the parameters' names and shapes matter: it takes no memory.
    pub fn describing(placement: Placement) -> Self {
        Self::root(0, placement, None, false)
    }

    fn root(seed: u64, placement: Placement, blocks: Option<Vec<usize>>, values: bool) -> Self {
        let stream = Stream::new(seed).named("init");
        let shared = Shared { placement, blocks, values, made: Mutex::default() };
        Self { stream, path: String::new(), blocks: vec![], shared: Arc::new(shared) }
    }

    /// For the part of the model called `name`.
    pub fn at(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { stream: self.stream.named(name).named("/"), path, ..self.clone() }
    }

    /// The `index`-th of several parts.
    pub fn nth(&self, index: usize) -> Self {
        Self { stream: self.stream.at(index as u64), path: format!("{}.{index}", self.path), ..self.clone() }
    }

    /// For parameters that these blocks use; nothing where this rank holds none of the blocks.
    pub fn of_blocks(&self, blocks: &[usize]) -> Option<Self> {
        let held = self.shared.blocks.as_ref();
        let here = held.is_none_or(|held| blocks.iter().any(|block| held.contains(block)));
        here.then(|| Self { blocks: blocks.to_vec(), ..self.clone() })
    }

    /// What was made so far, in the order in which it was.
    pub fn made(&self) -> Vec<Made> {
        self.shared.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How layers are split along the dimension `name`.
    pub fn split(&self, name: &str) -> Split {
        let placement = &self.shared.placement;
        let split = placement.layout.axis(&placement.mesh, name).is_some();
        let ranks = placement.mesh.axis("tensor");
        let rank = placement.mesh.coordinate(placement.rank, "tensor");
        Split::new(split.then_some((ranks, rank)), placement.tensor.clone(), placement.sequence)
    }

    /// How the regions between split layers are split by `time`.
    pub fn sequence(&self) -> Split {
        let placement = &self.shared.placement;
        let ranks = placement.mesh.axis("tensor");
        let rank = placement.mesh.coordinate(placement.rank, "tensor");
        let split = placement.sequence.then_some((ranks, rank));
        Split::new(split, placement.tensor.clone(), placement.sequence)
    }

    /// A parameter called `name`: a stored dimension for each of `dims`, which names the dimensions that it is made of.
    pub fn param<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        fill: Fill,
    ) -> Param<Tensor<D>> {
        self.make(name, dims, fill, false, false)
    }

    /// [`param`](Self::param) of a region that may be split by `time`: each rank's gradient is then a part of the sum.
    pub fn param_of_region<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        fill: Fill,
    ) -> Param<Tensor<D>> {
        self.make(name, dims, fill, self.shared.placement.sequence, false)
    }

    /// A running statistic: see [`Made::statistic`].
    pub fn statistic<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        fill: Fill,
    ) -> Param<Tensor<D>> {
        self.make(name, dims, fill, false, true)
    }

    fn make<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        fill: Fill,
        partial: bool,
        statistic: bool,
    ) -> Param<Tensor<D>> {
        let Self { stream, path, .. } = self.at(name);
        let named = dims.iter().flat_map(|dims| dims.iter());
        let spec = TensorSpec {
            path,
            dims: named.map(|(name, size)| Dim { name: name.to_string(), size: *size }).collect(),
            shape: dims.iter().map(|dims| dims.iter().map(|(_, size)| size).product()).collect(),
        };
        let placement = &self.shared.placement;
        let ranges = placement.layout.ranges(&placement.mesh, &spec, placement.rank);
        let mut lens = ranges.iter().map(Range::len);
        let shape = dims.map(|dims| lens.by_ref().take(dims.len()).product::<usize>());
        let made = Made { spec, ranges, blocks: self.blocks.clone(), partial, statistic };
        let tensor = match self.shared.values {
            true => Tensor::from_data(TensorData::new(fill.values(stream, &made), shape), &train_device()),
            false => Tensor::zeros([1; D], &train_device()),
        };
        self.shared.made.lock().unwrap_or_else(PoisonError::into_inner).push(made);
        Param::initialized(ParamId::new(), tensor.require_grad())
    }
}

impl Fill {
    /// The numbers of this rank's part.
    fn values(self, stream: Stream, made: &Made) -> Vec<f32> {
        let sizes: Vec<usize> = made.spec.dims.iter().map(|dim| dim.size).collect();
        let len = made.ranges.iter().map(Range::len).product();
        match self {
            Self::Constant(value) => vec![value; len],
            Self::Normal(deviation) if len == made.spec.len() => stream.normal(len, deviation),
            Self::Normal(deviation) => {
                let whole = stream.normal(made.spec.len(), deviation);
                let part = regatta_plan::Piece::boxed(&sizes, &made.ranges);
                let mut values = vec![0.0; len];
                regatta_plan::copy_pieces(&regatta_plan::Piece::whole(&sizes), &whole, &part, &mut values);
                values
            }
        }
    }
}
