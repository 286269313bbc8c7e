//! Differentiable collectives over one axis of the mesh (Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et
//! al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2).

use super::custom::{Back, custom, numbers, tensor_of, value};
use super::work::Work;
use burn::backend::{TensorMetadata, flex::FlexTensor};
use burn::tensor::Tensor;
use regatta_comm::{Element, Error, Group, ReduceOp, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The ranks that a layer is split over. Clones share one state.
#[derive(Clone)]
pub struct AxisGroup {
    group: Group,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    first_error: Option<Error>,
    busy: Duration,
}

impl std::fmt::Debug for AxisGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AxisGroup({} of {})", self.rank(), self.size())
    }
}

impl AxisGroup {
    /// The axis of this group's ranks.
    pub fn new(group: Group) -> Self {
        Self { group, state: Arc::default() }
    }

    /// This rank's index along the axis.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// The number of ranks along the axis.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// The group of the axis.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Reports the first failure since the last call. Operations on tensors cannot return an error, so after a failure
    /// their results are invalid.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<()> {
        match self.state.lock().unwrap_or_else(PoisonError::into_inner).first_error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Time spent in operations since the last call.
    pub fn take_time(&self) -> Duration {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).busy)
    }

    fn run(&self, operation: impl FnOnce(&Group) -> Result<()>) {
        let begun = Instant::now();
        let outcome = operation(&self.group);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.busy += begun.elapsed();
        if let Err(error) = outcome {
            state.first_error.get_or_insert(error);
        }
    }

    /// All-reduces `data` over the axis.
    pub(crate) fn reduce<T: Element>(&self, data: &mut [T], reduction: ReduceOp) {
        self.run(|group| group.all_reduce(data, reduction));
    }

    /// The sum of `tensor` over the axis.
    fn sum(&self, tensor: &FlexTensor) -> FlexTensor {
        let mut data = numbers(tensor).into_owned();
        self.reduce(&mut data, ReduceOp::Sum);
        tensor_of(data, tensor.shape())
    }

    /// Concatenates the ranks' parts along dimension 1: `[batch, part, width]` to `[batch, ranks * part, width]`.
    fn gather(&self, tensor: &FlexTensor) -> FlexTensor {
        let shape = tensor.shape().to_vec();
        let size = self.size();
        let mine = numbers(tensor);
        let mut all = vec![0.0f32; mine.len() * size];
        self.run(|group| group.all_gather(&mine, &mut all));
        let whole = [&shape[..1], &[shape[1] * size], &shape[2..]].concat();
        let row = mine.len() / shape[0].max(1);
        let mut out = Vec::with_capacity(all.len());
        for batch in 0..shape[0] {
            for rank in 0..size {
                out.extend_from_slice(&all[rank * mine.len() + batch * row..][..row]);
            }
        }
        tensor_of(out, whole)
    }

    /// Sums `tensor` over the axis and returns this rank's part of dimension 1: the backward pass of `gather`.
    fn scatter(&self, tensor: &FlexTensor) -> FlexTensor {
        let shape = tensor.shape().to_vec();
        let size = self.size();
        let data = numbers(tensor);
        let row = data.len() / shape[0].max(1) / size;
        let mut by_rank = Vec::with_capacity(data.len());
        for rank in 0..size {
            for batch in 0..shape[0] {
                by_rank.extend_from_slice(&data[(batch * size + rank) * row..][..row]);
            }
        }
        let mut out = vec![0.0f32; data.len() / size];
        self.run(|group| group.reduce_scatter(&by_rank, &mut out, ReduceOp::Sum));
        tensor_of(out, [&shape[..1], &[shape[1] / size], &shape[2..]].concat())
    }
}

/// Identity forward and all-reduce backward, for a replicated tensor that enters split layers (Megatron-LM's f).
pub(crate) fn copy_to_split<const D: usize>(x: Tensor<D>, axis: &AxisGroup) -> Tensor<D> {
    if !x.is_autodiff() {
        return x;
    }
    let axis = axis.clone();
    custom(Work::none("enter split layers"), [value(x)], |[x]| {
        let back: Back<1> = Box::new(move |gradient, [wanted]| [wanted.map(|_| axis.sum(&gradient))]);
        (x, back)
    })
}

/// All-reduce forward and identity backward, for the partial sums that leave split layers (Megatron-LM's g).
pub(crate) fn sum_of_split<const D: usize>(x: Tensor<D>, axis: &AxisGroup) -> Tensor<D> {
    let axis = axis.clone();
    custom(Work::none("leave split layers"), [value(x)], |[x]| {
        (axis.sum(&x), Box::new(|gradient, _| [Some(gradient)]))
    })
}

/// All-gather of `time` forward and reduce-scatter backward, from a region that is split by time into split layers.
pub(crate) fn gather_time(x: Tensor<3>, axis: &AxisGroup) -> Tensor<3> {
    let axis = axis.clone();
    custom(Work::none("enter split layers"), [value(x)], |[x]| {
        let output = axis.gather(&x);
        (output, Box::new(move |gradient, [wanted]| [wanted.map(|_| axis.scatter(&gradient))]))
    })
}

/// Reduce-scatter of `time` forward and all-gather backward, from split layers into a region that is split by time.
pub(crate) fn scatter_time(x: Tensor<3>, axis: &AxisGroup) -> Tensor<3> {
    let axis = axis.clone();
    custom(Work::none("leave split layers"), [value(x)], |[x]| {
        let output = axis.scatter(&x);
        (output, Box::new(move |gradient, [wanted]| [wanted.map(|_| axis.gather(&gradient))]))
    })
}
