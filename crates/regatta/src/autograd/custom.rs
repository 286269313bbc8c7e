//! Operations with a forward and a backward pass of their own, on the numbers of Flex tensors.

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

/// An input of an operation: recorded for backward or not.
pub(crate) enum Value {
    /// Not recorded.
    Plain(FlexTensor),
    /// Recorded.
    Tracked(Tracked),
}

/// The gradients of an operation's inputs from that of its output; only those asked for are computed.
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

/// The primitive of a tensor on Flex.
///
/// # Panics
/// On another backend: the engine puts its tensors on [`device`](super::device).
pub(crate) fn value<const D: usize>(tensor: Tensor<D>) -> Value {
    let foreign = "the engine's tensors live on the Flex backend";
    match tensor.is_autodiff() {
        true => Value::Tracked(tensor.try_into_primitive::<Autodiff<Flex>>().expect(foreign)),
        false => Value::Plain(plain(tensor)),
    }
}

/// The primitive of a tensor's numbers, whether it is recorded or not; panics as [`value`].
pub(crate) fn plain<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.try_into_primitive::<Flex>().expect("the engine's tensors live on the Flex backend")
}

/// Whether operations on `tensor` can be fused ones: it is f32 on Flex. Elsewhere they are made of Burn's own.
pub(crate) fn fused<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.device() == Device::flex()
}

/// The place of a tensor in graphs, where operations of our own see it.
pub(crate) fn node_of<const D: usize>(tensor: &Tensor<D>) -> Option<NodeId> {
    tensor.clone().try_into_primitive::<Autodiff<Flex>>().ok().map(|tracked| tracked.id())
}

/// Runs `forward` on the numbers of `inputs` and records what it returns for backward, if any input is recorded.
/// Measured as `work` where somebody records.
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
    // The rank does not matter to the primitive: every tensor can be seen as a flat one and back.
    let shape = primitive.shape();
    let len = shape.num_elements();
    let flat = Tensor::<1>::from_primitive::<Flex>(primitive.to_contiguous().reshape(Shape::from([len])));
    let Value::Tracked(tracked) = value(Tensor::from_inner(flat)) else {
        unreachable!("from_inner gives a recorded tensor")
    };
    <Autodiff<Flex> as burn::backend::ops::FloatTensorOps<Autodiff<Flex>>>::float_reshape(tracked, shape)
}

/// The f32 numbers of a tensor in row-major order; copied only where the layout is another.
pub(crate) fn numbers(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    match tensor.as_slice::<f32>() {
        Some(slice) => Cow::Borrowed(slice),
        None => Cow::Owned(tensor.to_contiguous().as_slice::<f32>().map(<[f32]>::to_vec).unwrap_or_default()),
    }
}

/// Changes a tensor's f32 numbers, in row-major order: in place where nobody else looks at them.
pub(crate) fn in_place(tensor: FlexTensor, change: impl FnOnce(&mut [f32])) -> FlexTensor {
    let whole = tensor.layout().start_offset() == 0
        && tensor.as_slice::<f32>().is_some_and(|values| values.len() == tensor.storage::<f32>().len());
    // Else it is a part of a larger buffer, or in another order.
    let mut tensor = if whole { tensor } else { tensor_of(numbers(&tensor).into_owned(), tensor.shape()) };
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
