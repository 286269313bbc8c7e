//! The inputs and outputs of blocks, within a rank and between ranks: activations, and gradients of the same shapes.

use crate::autograd::{Compute, Fetchable, cast, detached, device, fetch, leaf, seed};
use crate::error::Result;
use crate::models::{Activation, TensorMap};
use burn::tensor::{DType, Gradients, Tensor};

/// The activation without its graph.
pub(crate) fn detach(activation: Activation) -> Activation {
    activation.map(&mut Detach)
}

struct Detach;

impl TensorMap for Detach {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        detached(tensor)
    }
}

/// The activation as leaves of a new graph.
pub(crate) fn as_leaves(activation: Activation) -> Activation {
    activation.map(&mut Leaf)
}

struct Leaf;

impl TensorMap for Leaf {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        leaf(tensor)
    }
}

/// The activation in f32, in which losses are computed.
pub(crate) fn to_f32(activation: Activation) -> Activation {
    activation.map(&mut ToF32)
}

struct ToF32;

impl TensorMap for ToF32 {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        cast(tensor, DType::F32)
    }
}

/// The shapes of all tensors.
pub(crate) fn shapes(activation: &Activation) -> Vec<Vec<usize>> {
    let mut shapes = Shapes(vec![]);
    activation.clone().map(&mut shapes);
    shapes.0
}

struct Shapes(Vec<Vec<usize>>);

impl TensorMap for Shapes {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        self.0.push(tensor.dims().to_vec());
        tensor
    }
}

/// A loss of 0 as `[1]`, whose gradients are zeros.
pub(crate) fn zero_loss(output: Activation) -> Tensor<1> {
    match output {
        Activation::Start => Tensor::zeros([1], &device()),
        Activation::Two(x) => x.sum().mul_scalar(0.0),
        Activation::Three(x) | Activation::Pair(x, _) => x.sum().mul_scalar(0.0),
        Activation::Four(x) => x.sum().mul_scalar(0.0),
    }
}

/// The scalars to start backward from: one for every tensor of `output`, with its gradient.
pub(crate) fn roots(output: Activation, gradient: Activation) -> Vec<Tensor<1>> {
    match (output, gradient) {
        (Activation::Two(y), Activation::Two(gradient)) => vec![seed(y, gradient)],
        (Activation::Three(y), Activation::Three(gradient)) => vec![seed(y, gradient)],
        (Activation::Four(y), Activation::Four(gradient)) => vec![seed(y, gradient)],
        (Activation::Pair(y, memory), Activation::Pair(of_y, of_memory)) => {
            vec![seed(y, of_y), seed(memory, of_memory)]
        }
        _ => vec![],
    }
}

/// Takes the gradient of every tensor of `input` out of `gradients`; zeros where there is none.
pub(crate) fn input_gradients(input: Activation, gradients: &mut Gradients) -> Activation {
    input.map(&mut Collect { gradients })
}

struct Collect<'a> {
    gradients: &'a mut Gradients,
}

impl TensorMap for Collect<'_> {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        let gradient = tensor.grad_remove(self.gradients);
        gradient.unwrap_or_else(|| detached(tensor).zeros_like())
    }
}

/// The numbers of all tensors, one after the other.
///
/// # Errors
/// The device fails.
pub(crate) fn message(activation: Activation) -> Result<Vec<f32>> {
    let mut flat = Flatten(vec![]);
    activation.map(&mut flat);
    let mut message = vec![];
    fetch(flat.0, |(), values| {
        message.extend_from_slice(values);
        Ok(())
    })?;
    Ok(message)
}

struct Flatten(Vec<((), Fetchable)>);

impl TensorMap for Flatten {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        self.0.push(((), Fetchable::of(tensor.clone())));
        tensor
    }
}

/// The inverse of [`message`]: an activation of tensors of these shapes, on the device of `compute`.
pub(crate) fn from_message(data: &[f32], shapes: &[Vec<usize>], compute: &Compute) -> Activation {
    let mut parts = Parts { rest: data, compute };
    match shapes {
        [x, memory] => {
            let x = parts.next(x);
            Activation::Pair(x, parts.next(memory))
        }
        [x] if x.len() == 2 => Activation::Two(parts.next(x)),
        [x] if x.len() == 3 => Activation::Three(parts.next(x)),
        [x] => Activation::Four(parts.next(x)),
        _ => Activation::Start,
    }
}

struct Parts<'a> {
    rest: &'a [f32],
    compute: &'a Compute,
}

impl Parts<'_> {
    fn next<const D: usize>(&mut self, shape: &[usize]) -> Tensor<D> {
        let (part, rest) = self.rest.split_at(shape.iter().product());
        self.rest = rest;
        self.compute.tensor(part.to_vec(), std::array::from_fn(|dim| shape[dim]))
    }
}
