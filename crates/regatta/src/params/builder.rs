//! Creates the parameters of models: their names, their initial numbers, and the part of each that a rank holds.

use super::placed::{PlacedParam, Placement};
use super::store::ParamStore;
use crate::autograd::{Split, train_device};
use crate::random::Stream;
use burn::module::{Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use regatta_plan::{Axis, AxisSet, Dim, Piece, TensorSpec};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The state that all builders of one model share.
struct Shared {
    placement: Placement,
    /// The blocks that this rank holds; none if it holds all.
    blocks: Option<Vec<usize>>,
    state: Mutex<State>,
}

struct State {
    declared: Vec<PlacedParam>,
    memory: ParamMemory,
}

/// The memory of parameters.
// A model has only one, so its size does not matter.
#[allow(clippy::large_enum_variant)]
enum ParamMemory {
    /// Parameters are only described and have no memory.
    None,
    /// Each parameter has a tensor of its own.
    Tensors,
    /// Parameters are in a store; none after it was taken out.
    Store(Option<ParamStore>),
}

/// Creates the parameters of a model. The initial numbers are a function of the seed, the parameter's path and the element
/// of the whole tensor, so they are the same on every rank and under every plan.
///
/// ```
/// use regatta::layers::{Initializer, ParamBuilder};
/// // A weight of 4 x 8 called `layer.weight`, whose second dimension a layout may split over ranks.
/// let params = ParamBuilder::new(1).at("layer");
/// let weight = params.param("weight", [&[("embed", 4)], &[("mlp", 8)]], Initializer::Normal(0.02));
/// assert_eq!(weight.val().dims(), [4, 8]);
/// ```
#[derive(Clone)]
pub struct ParamBuilder {
    stream: Stream,
    path: String,
    blocks: Vec<usize>,
    shared: Arc<Shared>,
}

/// The initial numbers of a parameter.
#[derive(Debug, Clone, Copy)]
pub enum Initializer {
    /// Normally distributed numbers with mean 0 and this standard deviation.
    Normal(f32),
    /// This number for every element.
    Constant(f32),
}

impl ParamBuilder {
    /// A builder that only describes parameters: their names and shapes, without memory.
    pub(crate) fn describing(placement: Placement) -> Self {
        Self::root(0, placement, None, ParamMemory::None)
    }

    /// A builder for a whole model on this rank, whose initial weights follow from `seed`. Each parameter has a tensor of its
    /// own. It is for a model that the engine does not train.
    pub fn new(seed: u64) -> Self {
        Self::root(seed, Placement::whole(), None, ParamMemory::Tensors)
    }

    /// A builder for the blocks `blocks` of a model (none: all) on the rank at `placement`. The parameters are in `store`.
    pub(crate) fn filling(
        seed: u64,
        placement: Placement,
        blocks: Option<Vec<usize>>,
        store: ParamStore,
    ) -> Self {
        Self::root(seed, placement, blocks, ParamMemory::Store(Some(store)))
    }

    fn root(seed: u64, placement: Placement, blocks: Option<Vec<usize>>, memory: ParamMemory) -> Self {
        let stream = Stream::new(seed).named("init");
        let state = Mutex::new(State { declared: vec![], memory });
        Self {
            stream,
            path: String::new(),
            blocks: vec![],
            shared: Arc::new(Shared { placement, blocks, state }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A builder for the parameters of the field `name` of the module.
    pub fn at(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { stream: self.stream.named(name).named("/"), path, ..self.clone() }
    }

    /// A builder for the parameters of element `index` of a list in the module.
    pub fn nth(&self, index: usize) -> Self {
        Self { stream: self.stream.at(index as u64), path: format!("{}.{index}", self.path), ..self.clone() }
    }

    /// A builder for parameters that the blocks `blocks` use; none if this rank holds none of these blocks.
    pub fn of_blocks(&self, blocks: &[usize]) -> Option<Self> {
        let held = self.shared.blocks.as_ref();
        let here = held.is_none_or(|held| blocks.iter().any(|block| held.contains(block)));
        here.then(|| Self { blocks: blocks.to_vec(), ..self.clone() })
    }

    /// The parameters that were declared so far, in order.
    pub(crate) fn declared(&self) -> Vec<PlacedParam> {
        self.state().declared.clone()
    }

    /// The store with the parameters; none if the builder has none.
    pub(crate) fn into_store(self) -> Option<ParamStore> {
        match &mut self.state().memory {
            ParamMemory::Store(store) => store.take(),
            _ => None,
        }
    }

    /// How this rank's layers are split along the dimension `name`, such as `heads`, `mlp` or `vocab`.
    pub fn split(&self, name: &str) -> Split {
        let placement = &self.shared.placement;
        let split = placement.layout.axis(&placement.mesh, name).is_some();
        let place = split.then(|| placement.along_tensor());
        Split::new(place, placement.tensor.clone(), placement.sequence)
    }

    /// How the regions between split layers are split by time.
    pub fn sequence(&self) -> Split {
        let placement = &self.shared.placement;
        let place = placement.sequence.then(|| placement.along_tensor());
        Split::new(place, placement.tensor.clone(), placement.sequence)
    }

    /// Creates the parameter `name`, a field of the module. It has a stored dimension for each of `dims`, which lists the
    /// names of the dimensions that it combines, with their sizes in the whole model. The tensor has the sizes that this rank
    /// holds.
    ///
    /// # Panics
    /// The model did not declare the same parameter when its parameters were described, which is a bug of the model.
    pub fn param<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        initializer: Initializer,
    ) -> Param<Tensor<D>> {
        self.create(name, dims, initializer, AxisSet::NONE, false)
    }

    /// As [`param`](Self::param), for a layer of a region that may be split by time. Then the gradient is the sum of the
    /// gradients on the ranks of the tensor axis.
    ///
    /// # Panics
    /// As [`param`](Self::param).
    pub fn param_of_region<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        initializer: Initializer,
    ) -> Param<Tensor<D>> {
        let partial = if self.shared.placement.sequence { Axis::Tensor.into() } else { AxisSet::NONE };
        self.create(name, dims, initializer, partial, false)
    }

    /// As [`param`](Self::param), for a running statistic, such as the mean of a batch normalisation. Its gradient is the
    /// statistic of the batch, of which it becomes the moving average. Learning rate, weight decay and clipping do not apply
    /// to it.
    ///
    /// # Panics
    /// As [`param`](Self::param).
    pub fn statistic<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        initializer: Initializer,
    ) -> Param<Tensor<D>> {
        self.create(name, dims, initializer, AxisSet::NONE, true)
    }

    fn create<const D: usize>(
        &self,
        name: &str,
        dims: [&[(&str, usize)]; D],
        initializer: Initializer,
        partial_over: AxisSet,
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
        let axes = spec.dims.iter().filter_map(|dim| placement.layout.axis(&placement.mesh, &dim.name));
        let split_over = axes.fold(AxisSet::NONE, |set, axis| set.union(axis.into()));
        let mut lens = ranges.iter().map(Range::len);
        let shape = dims.map(|dims| lens.by_ref().take(dims.len()).product::<usize>());
        let blocks = self.blocks.clone();
        let placed = PlacedParam { spec, ranges, blocks, split_over, partial_over, statistic };
        let mut state = self.state();
        let State { declared, memory } = &mut *state;
        let draw = |piece: &Piece, out: &mut [f32]| initializer.fill(stream, piece, out);
        let tensor = match memory {
            ParamMemory::Store(Some(store)) => store.fill(&placed, shape, draw),
            ParamMemory::Tensors => {
                let mut values = vec![0.0; placed.len()];
                draw(&placed.piece(), &mut values);
                Tensor::from_data(TensorData::new(values, shape), &train_device())
            }
            ParamMemory::None | ParamMemory::Store(None) => Tensor::zeros([1; D], &train_device()),
        };
        declared.push(placed);
        Param::initialized(ParamId::new(), tensor.require_grad())
    }
}

impl Initializer {
    /// Writes the initial numbers of `piece` to `out`.
    fn fill(self, stream: Stream, piece: &Piece, out: &mut [f32]) {
        match self {
            Self::Constant(value) => out.fill(value),
            Self::Normal(deviation) => {
                for run in piece.runs() {
                    stream.fill_normal(run.global as u64, deviation, &mut out[run.local..][..run.len]);
                }
            }
        }
    }
}
