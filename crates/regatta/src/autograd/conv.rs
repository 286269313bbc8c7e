//! Convolution of channels-last images. Images are `[batch, height, width, channels]`, and weights are
//! `[kernel, kernel, inputs, outputs]`.

use super::custom::{Back, custom, fused, numbers, tensor_of, value};
use super::linear::defer;
use super::work::{Cost, Work};
use burn::backend::TensorMetadata;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn::tensor::module::{conv2d, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use regatta_kernel::conv::{self, Epilogue, Shape};

fn shape_of(x: &Tensor<4>, weight: &Tensor<4>, stride: usize, padding: usize) -> Shape {
    let ([images, height, width, inputs], [kernel, _, _, outputs]) = (x.dims(), weight.dims());
    Shape { images, height, width, inputs, outputs, kernel, stride, padding }
}

fn work(shape: &Shape) -> Work {
    let numbers = shape.input_len() + shape.weight_len() + shape.output_len();
    let forward = Cost { flops: shape.flops(), bytes: 4.0 * numbers as f64 };
    let backward = Cost { flops: 2.0 * forward.flops, bytes: 2.0 * forward.bytes };
    Work { name: "convolution", forward, backward }
}

/// The convolution of `x` with the square kernel `weight`, with `padding` zeros on each side of an image.
pub(crate) fn convolution(x: Tensor<4>, weight: Tensor<4>, stride: usize, padding: usize) -> Tensor<4> {
    if !fused(&x) {
        let weight = weight.permute([3, 2, 0, 1]);
        let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1);
        return conv2d(x.permute([0, 3, 1, 2]), weight, None, options).permute([0, 2, 3, 1]);
    }
    let shape = shape_of(&x, &weight, stride, padding);
    let sides = [shape.images, shape.out_height(), shape.out_width(), shape.outputs];
    custom(work(&shape), [value(x), value(weight)], |[x, weight]| {
        let mut out = vec![0.0; shape.output_len()];
        conv::forward(&shape, &numbers(&x), &numbers(&weight), Epilogue::default(), &mut out);
        let back: Back<2> = Box::new(move |gradient, [of_x, of_weight]| {
            let by_input = of_x.map(|_| {
                let mut out = vec![0.0; shape.input_len()];
                conv::by_input(&shape, &numbers(&gradient), &numbers(&weight), &mut out);
                tensor_of(out, x.shape())
            });
            let by_weight = of_weight.and_then(|node| {
                let sides = weight.shape();
                defer(node, move || {
                    let mut out = vec![0.0; shape.weight_len()];
                    conv::by_weight(&shape, &numbers(&x), &numbers(&gradient), false, &mut out);
                    tensor_of(out, sides)
                })
            });
            [by_input, by_weight]
        });
        (tensor_of(out, sides), back)
    })
}

/// [`convolution`] with stride 1, followed by `bias`, ReLU and 2x2 max pooling.
pub(crate) fn convolution_pooled(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Tensor<1>,
    padding: usize,
) -> Tensor<4> {
    if !fused(&x) {
        let weight = weight.permute([3, 2, 0, 1]);
        let options = ConvOptions::new([1; 2], [padding; 2], [1; 2], 1);
        let x = relu(conv2d(x.permute([0, 3, 1, 2]), weight, Some(bias), options));
        return max_pool2d(x, MaxPoolOptions::new([2, 2])).permute([0, 2, 3, 1]);
    }
    let shape = shape_of(&x, &weight, 1, padding);
    let sides = [shape.images, shape.out_height() / 2, shape.out_width() / 2, shape.outputs];
    let len: usize = sides.iter().product();
    custom(work(&shape), [value(x), value(weight), value(bias)], |[x, weight, bias]| {
        let (mut out, mut codes) = (vec![0.0; len], vec![0; len]);
        conv::pooled(&shape, &numbers(&x), &numbers(&weight), &numbers(&bias), &mut out, &mut codes);
        let back: Back<3> = Box::new(move |gradient, [of_x, of_weight, of_bias]| {
            let mut by_input = of_x.map(|_| vec![0.0; shape.input_len()]);
            let (mut by_weight, mut by_bias) = (vec![0.0; shape.weight_len()], vec![0.0; shape.outputs]);
            let (numbers_of_x, weight) = (numbers(&x), numbers(&weight));
            conv::pooled_backward(
                &shape,
                &numbers_of_x,
                &weight,
                &numbers(&gradient),
                &codes,
                by_input.as_deref_mut(),
                &mut by_weight,
                &mut by_bias,
            );
            let Shape { kernel, inputs, outputs, .. } = shape;
            [
                by_input.map(|out| tensor_of(out, x.shape())),
                of_weight.map(|_| tensor_of(by_weight, [kernel, kernel, inputs, outputs])),
                of_bias.map(|_| tensor_of(by_bias, [outputs])),
            ]
        });
        (tensor_of(out, sides), back)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{to_vec, train_device};
    use burn::tensor::{DType, TensorData};

    fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let values = crate::random::Stream::new(seed).normal(shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &train_device())
    }

    fn f64s<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
        tensor.into_data().iter::<f64>().collect()
    }

    fn close<const D: usize>(name: &str, found: Tensor<D>, wanted: Tensor<D>) {
        assert_eq!(found.dims(), wanted.dims(), "{name}");
        let (found, wanted) = (to_vec(found).unwrap(), f64s(wanted));
        let largest = wanted.iter().fold(1e-30f64, |most, x| most.max(x.abs()));
        for (a, b) in found.iter().zip(&wanted) {
            assert!((f64::from(*a) - b).abs() < 1e-5 * largest, "{name}: {a} instead of {b}");
        }
    }

    /// Compares with Burn's operations, which the same functions use for f64.
    #[test]
    fn agrees_with_burns_operations_in_f64() {
        for (kernel, stride) in [(3, 1), (3, 2), (1, 2), (5, 1)] {
            let (x, weight) = (tensor([3, 9, 8, 4], 1), tensor([kernel, kernel, 4, 6], 2));
            let bias = tensor([6], 3);
            let run = |dtype: DType, pooled: bool| {
                let x = x.clone().cast(dtype).require_grad();
                let (weight, bias) = (weight.clone().cast(dtype), bias.clone().cast(dtype));
                let (weight, bias) = (weight.require_grad(), bias.require_grad());
                let out = if pooled {
                    convolution_pooled(x.clone(), weight.clone(), bias.clone(), kernel / 2)
                } else {
                    convolution(x.clone(), weight.clone(), stride, kernel / 2)
                };
                let scale = tensor(out.dims(), 4).cast(dtype);
                let mut found = (out.clone() * scale).sum().backward();
                let of_x = x.grad_remove(&mut found).unwrap();
                (out, of_x, weight.grad_remove(&mut found).unwrap(), bias.grad_remove(&mut found))
            };
            for pooled in [false, true] {
                let (found, wanted) = (run(DType::F32, pooled), run(DType::F64, pooled));
                close("result", found.0, wanted.0);
                close("images", found.1, wanted.1);
                close("weights", found.2, wanted.2);
                if let (Some(found), Some(wanted), true) = (found.3, wanted.3, pooled) {
                    close("bias", found, wanted);
                }
            }
        }
    }
}
