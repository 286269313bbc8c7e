//! The linear layer, whose weight gradient may be computed later: the zero-bubble schedule fills waiting time with it
//! (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2).

use super::custom::{Back, custom, numbers, tensor_of, value};
use super::work::Work;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, Shape, TensorMetadata, autodiff::NodeId, flex::FlexTensor};
use burn::tensor::Tensor;
use std::cell::RefCell;

/// The gradient of a parameter that has yet to be computed.
pub(crate) struct Deferred {
    /// The parameter's node.
    pub(crate) node: NodeId,
    compute: Box<dyn FnOnce() -> FlexTensor>,
}

impl Deferred {
    /// Computes it.
    pub(crate) fn compute(self) -> FlexTensor {
        (self.compute)()
    }
}

thread_local! {
    static DEFERRED: RefCell<Option<Vec<Deferred>>> = const { RefCell::new(None) };
}

/// Runs `backward` and returns beside its result the gradients of weights that it left for later.
pub(crate) fn deferring<R>(backward: impl FnOnce() -> R) -> (R, Vec<Deferred>) {
    DEFERRED.set(Some(vec![]));
    let result = backward();
    (result, DEFERRED.take().unwrap_or_default())
}

/// Leaves `compute` for later where backward is split, and else does it now.
fn defer(node: NodeId, compute: impl FnOnce() -> FlexTensor + 'static) -> Option<FlexTensor> {
    DEFERRED.with_borrow_mut(|deferred| match deferred {
        Some(deferred) => {
            deferred.push(Deferred { node, compute: Box::new(compute) });
            None
        }
        None => Some(compute()),
    })
}

/// `x * weight + bias` for `x` `[.., input]`, `weight` `[input, output]` and `bias` `[output]`.
pub(crate) fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let work = work(&x, &weight, 1);
    match bias {
        None => custom(work, [value(x), value(weight)], |[x, weight]| {
            let output = product(&x, &weight, None);
            let back: Back<2> = Box::new(move |gradient, [of_x, of_weight]| {
                [
                    of_x.map(|_| by_input(&gradient, &weight)),
                    of_weight.and_then(|node| by_weight(node, x, gradient)),
                ]
            });
            (output, back)
        }),
        Some(bias) => custom(work, [value(x), value(weight), value(bias)], |[x, weight, bias]| {
            let output = product(&x, &weight, Some(&bias));
            let back: Back<3> = Box::new(move |gradient, [of_x, of_weight, of_bias]| {
                [
                    of_x.map(|_| by_input(&gradient, &weight)),
                    of_weight.and_then(|node| by_weight(node, x, gradient.clone())),
                    of_bias.and_then(|node| defer(node, move || column_sums(&gradient))),
                ]
            });
            (output, back)
        }),
    }
}

/// `x` times the transpose of `table`: `x` `[.., input]` and `table` `[output, input]` to `[.., output]`.
pub(crate) fn linear_by_rows<const D: usize>(x: Tensor<D>, table: Tensor<2>) -> Tensor<D> {
    custom(work(&x, &table, 0), [value(x), value(table)], |[x, table]| {
        let output = product(&x, &table.transpose(0, 1), None);
        let back: Back<2> = Box::new(move |gradient, [of_x, of_table]| {
            [
                of_x.map(|_| by_input(&gradient, &table.transpose(0, 1))),
                of_table.and_then(|node| by_weight(node, gradient, x)),
            ]
        });
        (output, back)
    })
}

/// The product of `x`'s rows with a matrix of which dimension `columns` is what comes out.
fn work<const D: usize>(x: &Tensor<D>, matrix: &Tensor<2>, columns: usize) -> Work {
    let rows = x.dims()[..D - 1].iter().product();
    Work::product("linear", rows, x.dims()[D - 1], matrix.dims()[columns])
}

/// A tensor's rows and their length.
fn rows(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.shape();
    let width = shape.last().copied().unwrap_or(1);
    [shape.num_elements() / width.max(1), width]
}

fn flat(tensor: &FlexTensor) -> FlexTensor {
    tensor.to_contiguous().reshape(Shape::from(rows(tensor)))
}

fn product(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let mut shape = x.shape().to_vec();
    let outputs = weight.shape()[1];
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let mut output = Flex::float_matmul(flat(x), weight.clone());
    if let Some(bias) = bias {
        let bias = numbers(bias);
        let sums = output.storage_mut::<f32>();
        for row in sums.chunks_exact_mut(outputs.max(1)) {
            row.iter_mut().zip(bias.iter()).for_each(|(sum, b)| *sum += b);
        }
    }
    output.reshape(Shape::from(shape))
}

fn by_input(gradient: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let mut shape = gradient.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.shape()[0];
    }
    Flex::float_matmul(flat(gradient), weight.transpose(0, 1)).reshape(Shape::from(shape))
}

fn by_weight(node: NodeId, x: FlexTensor, gradient: FlexTensor) -> Option<FlexTensor> {
    defer(node, move || Flex::float_matmul(flat(&x).transpose(0, 1), flat(&gradient)))
}

fn column_sums(gradient: &FlexTensor) -> FlexTensor {
    let [_, width] = rows(gradient);
    let mut sums = vec![0.0f32; width];
    for row in numbers(gradient).chunks_exact(width.max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
    }
    tensor_of(sums, [width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{to_vec, train_device};
    use burn::tensor::TensorData;

    fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let values = crate::random::Stream::new(seed).normal(shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &train_device()).require_grad()
    }

    /// Against Burn's own operations, and with the weights' gradients left for later.
    #[test]
    fn agrees_with_burn_at_once_and_later() {
        let (x, weight, bias) = (tensor([2, 3, 5], 1), tensor([5, 4], 2), tensor([4], 3));
        let scale = tensor([2, 3, 4], 4);
        let burn = x.clone().matmul(weight.clone().unsqueeze()) + bias.clone().unsqueeze();
        let mut wanted = (burn.clone() * scale.clone()).sum().backward();
        let ours = || linear(x.clone(), weight.clone(), Some(bias.clone()));
        let mut found = (ours() * scale.clone()).sum().backward();
        let close = |a: Vec<f32>, b: Vec<f32>| {
            assert_eq!(a.len(), b.len());
            a.iter().zip(&b).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{a} {b}"));
        };
        close(to_vec(ours()).unwrap(), to_vec(burn).unwrap());
        close(to_vec(x.grad(&found).unwrap()).unwrap(), to_vec(x.grad(&wanted).unwrap()).unwrap());
        let weights = to_vec(weight.grad_remove(&mut wanted).unwrap()).unwrap();
        let biases = to_vec(bias.grad_remove(&mut wanted).unwrap()).unwrap();
        close(to_vec(weight.grad_remove(&mut found).unwrap()).unwrap(), weights.clone());
        close(to_vec(bias.grad_remove(&mut found).unwrap()).unwrap(), biases.clone());
        let root = (ours() * scale).sum();
        let (mut later, deferred) = deferring(|| root.backward());
        assert!(x.grad(&later).is_some() && weight.grad_remove(&mut later).is_none());
        let found: Vec<Vec<f32>> = deferred.into_iter().map(|one| numbers(&one.compute()).to_vec()).collect();
        close(found[0].clone(), weights);
        close(found[1].clone(), biases);
    }
}
