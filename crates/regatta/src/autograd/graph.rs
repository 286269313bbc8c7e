//! The graph of one block: its inputs are detached from the blocks before, and backward starts from the gradients that the
//! blocks after it computed.

use super::custom::{Back, custom, fused, plain, value};
use super::work::Work;
use burn::backend::Shape;
use burn::tensor::{Gradients, Tensor};

/// `tensor` as the leaf of a new graph.
pub(crate) fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(detached(tensor)).require_grad()
}

/// `tensor` without its graph.
pub(crate) fn detached<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.is_autodiff() { tensor.inner() } else { tensor }
}

/// A scalar whose backward pass gives `output` the gradient `gradient`. Burn itself can only start from a gradient of ones.
/// Free of cost where operations are fused.
pub(crate) fn seed<const D: usize>(output: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    let gradient = detached(gradient);
    if !fused(&output) {
        return (output * Tensor::from_inner(gradient)).sum();
    }
    let gradient = plain(gradient);
    custom(Work::none("seed"), [value(output)], |_| {
        let root = super::custom::tensor_of(vec![0.0], Shape::from([1]));
        let back: Back<1> = Box::new(move |_, _| [Some(gradient)]);
        (root, back)
    })
}

/// Runs backward from the sum of these scalars; none if there are no scalars.
pub(crate) fn backward(roots: Vec<Tensor<1>>) -> Option<Gradients> {
    let root = roots.into_iter().reduce(|sum, root| sum + root)?;
    Some(root.backward())
}
