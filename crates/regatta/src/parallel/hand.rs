//! What goes from block to block, within a rank and between ranks: activations, and gradients in the same shape.

use crate::autograd::{Compute, Wanted, cast, detached, fetch, leaf, seed};
use crate::error::Result;
use crate::models::{Activation, Each};
use burn::tensor::{DType, Gradients, Tensor};

/// Cut off from its graph.
pub(crate) fn cut(activation: Activation) -> Activation {
    activation.map(&mut Detach)
}

struct Detach;

impl Each for Detach {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        detached(tensor)
    }
}

/// As the beginning of a graph of its own.
pub(crate) fn begin(activation: Activation) -> Activation {
    activation.map(&mut Leaf)
}

struct Leaf;

impl Each for Leaf {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        leaf(tensor)
    }
}

/// In f32, as losses are computed.
pub(crate) fn widen(activation: Activation) -> Activation {
    activation.map(&mut Widen)
}

struct Widen;

impl Each for Widen {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        cast(tensor, DType::F32)
    }
}

/// A root of backward for every tensor of `output`, from its gradient.
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

/// Takes the gradient of every tensor of `input` out of `found`.
pub(crate) fn gradients(input: Activation, found: &mut Gradients) -> Activation {
    input.map(&mut Collect { found })
}

struct Collect<'a> {
    found: &'a mut Gradients,
}

impl Each for Collect<'_> {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        let gradient = tensor.grad_remove(self.found);
        gradient.unwrap_or_else(|| detached(tensor).zeros_like())
    }
}

/// The numbers of its tensors behind one another.
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

struct Flatten(Vec<((), Wanted)>);

impl Each for Flatten {
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        self.0.push(((), Wanted::of(tensor.clone())));
        tensor
    }
}

/// The other way: tensors of these shapes.
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
