//! The linear layer. Its weight gradient may be computed later: the zero-bubble schedule fills waiting time with it
//! (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2).

use super::custom::{Back, custom, fused, in_place, numbers, tensor_of, value};
use super::work::Work;
use burn::backend::{Shape, TensorMetadata, autodiff::NodeId, flex::FlexTensor};
use burn::tensor::Tensor;
use regatta_kernel::activation::{self, Activation, bias_forward};
use regatta_kernel::bias;
use regatta_kernel::matmul::{Matrix, new_product};
use std::cell::RefCell;

/// The gradient of a parameter, not yet computed.
pub(crate) struct Deferred {
    /// The parameter's node.
    pub(crate) node: NodeId,
    compute: Box<dyn FnOnce() -> FlexTensor>,
}

impl Deferred {
    /// Computes the gradient.
    pub(crate) fn compute(self) -> FlexTensor {
        (self.compute)()
    }
}

thread_local! {
    static DEFERRED: RefCell<Option<Vec<Deferred>>> = const { RefCell::new(None) };
}

/// Runs `backward` and returns its result and the weight gradients that it deferred.
pub(crate) fn deferring<R>(backward: impl FnOnce() -> R) -> (R, Vec<Deferred>) {
    DEFERRED.set(Some(vec![]));
    let result = backward();
    (result, DEFERRED.take().unwrap_or_default())
}

/// Defers `compute` while [`deferring`] runs; otherwise returns its result.
pub(super) fn defer(node: NodeId, compute: impl FnOnce() -> FlexTensor + 'static) -> Option<FlexTensor> {
    DEFERRED.with_borrow_mut(|deferred| match deferred {
        Some(deferred) => {
            deferred.push(Deferred { node, compute: Box::new(compute) });
            None
        }
        None => Some(compute()),
    })
}

/// `activation(x * weight + bias)` for `x` `[.., input]`, `weight` `[input, output]` and `bias` `[output]`, as
/// `[.., output]`. Bias and activation are the product's epilogue. Backward first multiplies the gradient by the
/// activation's derivative, in place.
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Activation,
) -> Tensor<D> {
    if !fused(&x) {
        let sums = x.matmul(weight.unsqueeze());
        let sums = match bias {
            Some(bias) => sums + bias.unsqueeze(),
            None => sums,
        };
        return activate(sums, activation);
    }
    let work = work(&x, &weight, 1);
    match bias {
        None => custom(work, [value(x), value(weight)], |[x, weight]| {
            let (output, layer) = Layer::forward(x, weight, None, activation);
            let back: Back<2> = Box::new(move |gradient, [of_x, of_weight]| {
                let [x, weight, _] = layer.backward(gradient, [of_x, of_weight, None]);
                [x, weight]
            });
            (output, back)
        }),
        Some(bias) => custom(work, [value(x), value(weight), value(bias)], |[x, weight, bias]| {
            let (output, layer) = Layer::forward(x, weight, Some(&bias), activation);
            (output, Box::new(move |gradient, wanted| layer.backward(gradient, wanted)))
        }),
    }
}

/// The product of `x` `[.., input]` and the transpose of `table` `[output, input]`, as `[.., output]`.
pub(crate) fn linear_by_rows<const D: usize>(x: Tensor<D>, table: Tensor<2>) -> Tensor<D> {
    if !fused(&x) {
        return x.matmul(table.transpose().unsqueeze());
    }
    custom(work(&x, &table, 0), [value(x), value(table)], |[x, table]| {
        let (x_data, table_data) = (numbers(&x), numbers(&table));
        let (rows, weights) = (matrix(&x, &x_data), matrix(&table, &table_data));
        let shape = with_last(&x, table.shape()[0]);
        let output = tensor_of(new_product(rows, weights.transposed()), shape);
        drop((x_data, table_data));
        let back: Back<2> = Box::new(move |gradient, [of_x, of_table]| {
            let of_x = of_x.map(|_| {
                let (gradient_data, table_data) = (numbers(&gradient), numbers(&table));
                let rows = new_product(matrix(&gradient, &gradient_data), matrix(&table, &table_data));
                tensor_of(rows, with_last(&gradient, table.shape()[1]))
            });
            [of_x, of_table.and_then(|node| weight_gradient(node, gradient, x))]
        });
        (output, back)
    })
}

/// Burn's operation for an activation.
pub(crate) fn activate<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    use burn::tensor::activation::{gelu, gelu_approximate, relu, silu};
    match activation {
        Activation::Identity => x,
        Activation::Relu => relu(x),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => gelu_approximate(x),
        Activation::Silu => silu(x),
    }
}

/// What the backward pass needs from the forward pass.
struct Layer {
    x: FlexTensor,
    weight: FlexTensor,
    /// The inputs of the activation; none for the identity.
    sums: Option<Vec<f32>>,
    activation: Activation,
}

impl Layer {
    fn forward(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<&FlexTensor>,
        activation: Activation,
    ) -> (FlexTensor, Self) {
        let shape = with_last(&x, weight.shape()[1]);
        let mut sums = {
            let (x_data, weight_data) = (numbers(&x), numbers(&weight));
            new_product(matrix(&x, &x_data), matrix(&weight, &weight_data))
        };
        let bias = bias.map(numbers);
        if activation == Activation::Identity {
            if let Some(bias) = bias {
                bias::add(&mut sums, &bias);
            }
            return (tensor_of(sums, shape), Self { x, weight, sums: None, activation });
        }
        let output = bias_forward(activation, &mut sums, bias.as_deref());
        (tensor_of(output, shape), Self { x, weight, sums: Some(sums), activation })
    }

    fn backward(
        self,
        gradient: FlexTensor,
        [of_x, of_weight, of_bias]: [Option<NodeId>; 3],
    ) -> [Option<FlexTensor>; 3] {
        let gradient = match &self.sums {
            Some(sums) => {
                in_place(gradient, |gradient| activation::backward(self.activation, sums, gradient))
            }
            None => gradient,
        };
        let of_x = of_x.map(|_| {
            let (gradient_data, weight_data) = (numbers(&gradient), numbers(&self.weight));
            let weight = matrix(&self.weight, &weight_data).transposed();
            let rows = new_product(matrix(&gradient, &gradient_data), weight);
            tensor_of(rows, with_last(&gradient, self.weight.shape()[0]))
        });
        [
            of_x,
            of_weight.and_then(|node| weight_gradient(node, self.x, gradient.clone())),
            of_bias.and_then(|node| defer(node, move || column_sums(&gradient))),
        ]
    }
}

/// The cost of the product of `x`'s rows and a matrix whose dimension `columns` is the output.
fn work<const D: usize>(x: &Tensor<D>, matrix: &Tensor<2>, columns: usize) -> Work {
    let rows = x.dims()[..D - 1].iter().product();
    Work::product("linear", rows, x.dims()[D - 1], matrix.dims()[columns])
}

/// The rows of `tensor` as a matrix; `data` are the tensor's numbers.
fn matrix<'a>(tensor: &FlexTensor, data: &'a [f32]) -> Matrix<'a> {
    let width = tensor.shape().last().copied().unwrap_or(1);
    Matrix::new(data, data.len() / width.max(1), width)
}

/// The shape of `tensor` with `last` as its last dimension.
fn with_last(tensor: &FlexTensor, last: usize) -> Shape {
    let mut shape = tensor.shape().to_vec();
    if let Some(width) = shape.last_mut() {
        *width = last;
    }
    Shape::from(shape)
}

/// The gradient of a weight: the product of the transpose of `left` and `right`. It may be deferred.
fn weight_gradient(node: NodeId, left: FlexTensor, right: FlexTensor) -> Option<FlexTensor> {
    defer(node, move || {
        let (left_data, right_data) = (numbers(&left), numbers(&right));
        let (left, right) = (matrix(&left, &left_data), matrix(&right, &right_data));
        let shape = [left.columns(), right.columns()];
        tensor_of(new_product(left.transposed(), right), shape)
    })
}

fn column_sums(gradient: &FlexTensor) -> FlexTensor {
    let width = gradient.shape().last().copied().unwrap_or(1);
    tensor_of(bias::column_sums(&numbers(gradient), width), [width])
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

    /// Compares with Burn's operations, with and without deferred weight gradients.
    #[test]
    fn agrees_with_burn_also_with_deferred_gradients() {
        let (x, weight, bias) = (tensor([2, 3, 5], 1), tensor([5, 4], 2), tensor([4], 3));
        let scale = tensor([2, 3, 4], 4);
        let burn = x.clone().matmul(weight.clone().unsqueeze()) + bias.clone().unsqueeze();
        let mut wanted = (burn.clone() * scale.clone()).sum().backward();
        let ours = || linear(x.clone(), weight.clone(), Some(bias.clone()), Activation::Identity);
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
        let found: Vec<Vec<f32>> =
            deferred.into_iter().map(|gradient| numbers(&gradient.compute()).to_vec()).collect();
        close(found[0].clone(), weights);
        close(found[1].clone(), biases);
    }
}
