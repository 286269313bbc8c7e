//! Pooling of channels-last images.

use super::custom::{Back, custom, fused, numbers, tensor_of, value};
use super::work::Work;
use burn::tensor::Tensor;
use regatta_kernel::pool::{back_mean, mean};

/// The mean over the pixels of each image: `[batch, height, width, channels]` to `[batch, channels]`.
pub(crate) fn global_average_pool(x: Tensor<4>) -> Tensor<2> {
    let [images, height, width, channels] = x.dims();
    if !fused(&x) {
        return x.reshape([images, height * width, channels]).mean_dim(1).reshape([images, channels]);
    }
    let pixels = height * width;
    let elements = (images * pixels * channels) as f64;
    custom(Work::new("global average pool", elements, 4.0 * elements), [value(x)], |[x]| {
        let mut out = vec![0.0; images * channels];
        mean(&numbers(&x), pixels, channels, &mut out);
        let back: Back<1> = Box::new(move |gradient, [wanted]| {
            [wanted.map(|_| {
                let mut out = vec![0.0; images * pixels * channels];
                back_mean(&numbers(&gradient), pixels, channels, &mut out);
                tensor_of(out, [images, height, width, channels])
            })]
        });
        (tensor_of(out, [images, channels]), back)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::train_device;
    use burn::tensor::{DType, TensorData};

    #[test]
    fn agrees_with_burns_operations_in_f64() {
        let run = |dtype: DType| {
            let values = crate::random::Stream::new(1).normal(2 * 3 * 5 * 7, 1.0);
            let x = Tensor::<4>::from_data(TensorData::new(values, [2, 3, 5, 7]), &train_device());
            let x = x.cast(dtype).require_grad();
            let out = global_average_pool(x.clone());
            let found = (out.clone() * out.clone()).sum().backward();
            let plain = out.inner().into_data().iter::<f64>().collect::<Vec<_>>();
            (plain, x.grad(&found).unwrap().into_data().iter::<f64>().collect::<Vec<_>>())
        };
        let (found, wanted) = (run(DType::F32), run(DType::F64));
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(&found.0, &wanted.0) && close(&found.1, &wanted.1));
    }
}
