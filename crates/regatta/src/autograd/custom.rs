//! Custom operations: each has its own forward and backward pass, which compute on the numbers of Flex tensors.

use super::work::Work;
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, DType, Flex, Shape, TensorMetadata, flex::FlexTensor, tensor::FloatTensor};
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) type Tracked = FloatTensor<Autodiff<Flex>>;

/// An input of an operation, which autodiff records or does not.
pub(crate) enum Value {
    /// Autodiff does not record it.
    Plain(FlexTensor),
    /// Autodiff records it.
    Tracked(Tracked),
}

/// Computes the gradients of an operation's inputs from the gradient of its output. Only inputs with a node need one.
pub(crate) type Back<const N: usize> =
    Box<dyn FnOnce(FlexTensor, [Option<NodeId>; N]) -> [Option<FlexTensor>; N] + Send>;

#[derive(Clone)]
struct State<const N: usize>(Arc<Mutex<Option<Back<N>>>>);

impl<const N: usize> fmt::Debug for State<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Back")
    }
}

#[derive(Debug)]
struct Custom;

impl<const N: usize> Backward<Flex, N> for Custom {
    type State = State<N>;

    fn backward(self, ops: Ops<State<N>, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        let back = ops.state.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(back) = back else { return };
        let wanted = ops.parents.each_ref().map(|parent| parent.as_ref().map(|node| node.id));
        for (parent, gradient) in ops.parents.iter().zip(back(gradient, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// The panic of an operation whose tensor is on another backend.
const NOT_FLEX: &str = "the engine's tensors are on the Flex backend";

/// The primitive of a tensor on Flex.
///
/// # Panics
/// The tensor is on another backend than [`device`](super::device), which is a bug.
pub(crate) fn value<const D: usize>(tensor: Tensor<D>) -> Value {
    if tensor.is_autodiff() {
        Value::Tracked(tensor.try_into_primitive::<Autodiff<Flex>>().expect(NOT_FLEX))
    } else {
        Value::Plain(plain(tensor))
    }
}

/// The primitive of a tensor on Flex, without its graph.
///
/// # Panics
/// As [`value`].
pub(crate) fn plain<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.try_into_primitive::<Flex>().expect(NOT_FLEX)
}

/// Whether `tensor` is f32 on Flex, so that fused operations can compute on it. Other tensors take Burn's operations.
pub(crate) fn fused<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.device() == Device::flex()
}

/// The node of a tensor in its graph; none where Flex's autodiff does not record the tensor.
pub(crate) fn node_of<const D: usize>(tensor: &Tensor<D>) -> Option<NodeId> {
    tensor.clone().try_into_primitive::<Autodiff<Flex>>().ok().map(|tracked| tracked.id())
}

/// Runs `forward` on the numbers of `inputs`. If any input is recorded, the backward function that `forward` returns is
/// recorded too. Both are measured as `work` while [`recording`](super::recording) runs.
pub(crate) fn custom<const N: usize, const D: usize>(
    work: Work,
    inputs: [Value; N],
    forward: impl FnOnce([FlexTensor; N]) -> (FlexTensor, Back<N>),
) -> Tensor<D> {
    let forward = move |inputs| {
        let (output, back) = work.forward(|| forward(inputs));
        let back: Back<N> = Box::new(move |gradient, wanted| work.backward(|| back(gradient, wanted)));
        (output, back)
    };
    if inputs.iter().all(|input| matches!(input, Value::Plain(_))) {
        let (output, _) = forward(inputs.map(|input| match input {
            Value::Plain(primitive) => primitive,
            Value::Tracked(tracked) => tracked.into_primitive(),
        }));
        return Tensor::from_primitive::<Flex>(output);
    }
    let mut guards = Vec::with_capacity(N);
    let primitives = inputs.map(|input| {
        let tracked = match input {
            Value::Tracked(tracked) => tracked,
            Value::Plain(primitive) => constant(primitive),
        };
        let (primitive, guard) = tracked.into_parts();
        guards.push(guard);
        primitive
    });
    let (output, back) = forward(primitives);
    let guards: [_; N] = guards.try_into().expect("a guard for every input");
    let prepared = Backward::<Flex, N>::prepare::<NoCheckpointing>(Custom, guards);
    let output = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(op) => op.finish(State(Arc::new(Mutex::new(Some(back)))), output),
        OpsKind::UnTracked(op) => op.finish(output),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// A recorded tensor that needs no gradient.
fn constant(primitive: FlexTensor) -> Tracked {
    // The primitive has no static rank, so a flat tensor serves for every shape.
    let shape = primitive.shape();
    let len = shape.num_elements();
    let flat = Tensor::<1>::from_primitive::<Flex>(primitive.to_contiguous().reshape(Shape::from([len])));
    let Value::Tracked(tracked) = value(Tensor::from_inner(flat)) else {
        unreachable!("from_inner gives a recorded tensor")
    };
    <Autodiff<Flex> as burn::backend::ops::FloatTensorOps<Autodiff<Flex>>>::float_reshape(tracked, shape)
}

/// The f32 numbers of a tensor in row-major order; copied only if the tensor has another layout.
pub(crate) fn numbers(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    match tensor.as_slice::<f32>() {
        Some(slice) => Cow::Borrowed(slice),
        None => Cow::Owned(tensor.to_contiguous().as_slice::<f32>().map(<[f32]>::to_vec).unwrap_or_default()),
    }
}

/// Changes a tensor's f32 numbers, in row-major order; in place if no other tensor shares them.
pub(crate) fn in_place(tensor: FlexTensor, change: impl FnOnce(&mut [f32])) -> FlexTensor {
    let fills_storage = tensor.layout().start_offset() == 0
        && tensor.as_slice::<f32>().is_some_and(|values| values.len() == tensor.storage::<f32>().len());
    // Otherwise the tensor is a view of a larger buffer, or is stored in another order.
    let mut tensor =
        if fills_storage { tensor } else { tensor_of(numbers(&tensor).into_owned(), tensor.shape()) };
    change(tensor.storage_mut());
    tensor
}

/// A tensor of `values` in row-major order.
pub(crate) fn tensor_of(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.into()))
}

/// The integers of a tensor in row-major order.
pub(crate) fn integers<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i64> {
    tensor.into_data().iter::<i64>().collect()
}
