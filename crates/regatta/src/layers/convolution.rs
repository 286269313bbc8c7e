//! Convolution and batch normalisation of channels-last images, `[batch, height, width, channels]`.

use super::{Context, Initializer, ParamBuilder};
use crate::autograd::{BatchNormParams, batch_norm, batch_norm_by_running, convolution, convolution_pooled};
use burn::module::{Module, Param};
use burn::tensor::Tensor;

/// A convolution with a square kernel. It pads images with `kernel / 2` zeros on each side, so that with an odd kernel and
/// stride 1 images keep their size.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[kernel, kernel, inputs, outputs]`
    weight: Param<Tensor<4>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Convolution {
    /// A convolution of `kernel` x `kernel` pixels from `inputs` to `outputs` channels. Initial weights follow He et al.
    /// 2015, "Delving Deep into Rectifiers", equation 10.
    pub fn new(params: &ParamBuilder, kernel: usize, inputs: usize, outputs: usize, bias: bool) -> Self {
        let deviation = (2.0 / (kernel * kernel * inputs) as f32).sqrt();
        let dims: [&[_]; 4] =
            [&[("y", kernel)], &[("x", kernel)], &[("inputs", inputs)], &[("outputs", outputs)]];
        Self {
            weight: params.param("weight", dims, Initializer::Normal(deviation)),
            bias: bias.then(|| params.param("bias", [&[("outputs", outputs)]], Initializer::Constant(0.0))),
        }
    }

    /// Maps images `[batch, height, width, inputs]` to `[batch, height, width, outputs]`, with height and width divided by
    /// `stride`, rounded up (odd kernels). Leaves out the bias.
    pub fn forward(&self, x: Tensor<4>, stride: usize) -> Tensor<4> {
        let weight = self.weight.val();
        let padding = weight.dims()[0] / 2;
        convolution(x, weight, stride, padding)
    }

    /// The convolution with stride 1, followed by the bias, ReLU and 2x2 max pooling: `[batch, height, width, inputs]` to
    /// `[batch, height / 2, width / 2, outputs]`, rounded down (odd kernels).
    pub fn pooled(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = self.weight.val();
        let [kernel, _, _, outputs] = weight.dims();
        let bias = self.bias.as_ref().map(Param::val);
        let bias = bias.unwrap_or_else(|| Tensor::zeros([outputs], (&x.device(), x.dtype())));
        convolution_pooled(x, weight, bias, kernel / 2)
    }
}

/// Batch normalisation (Ioffe & Szegedy 2015, "Batch Normalization"). Training uses the statistics of this worker's
/// micro-batch, evaluation the running statistics.
#[derive(Module, Debug)]
pub struct BatchNorm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
    running_mean: Param<Tensor<1>>,
    running_variance: Param<Tensor<1>>,
}

impl BatchNorm {
    /// Batch normalisation of images with `channels` channels.
    pub fn new(params: &ParamBuilder, channels: usize) -> Self {
        let dims: [&[_]; 1] = [&[("channels", channels)]];
        Self {
            gamma: params.param("gamma", dims, Initializer::Constant(1.0)),
            beta: params.param("beta", dims, Initializer::Constant(0.0)),
            running_mean: params.statistic("running_mean", dims, Initializer::Constant(0.0)),
            running_variance: params.statistic("running_variance", dims, Initializer::Constant(1.0)),
        }
    }

    /// Normalises images `[batch, height, width, channels]`, then adds `residual` of the same shape if given, and then
    /// applies ReLU if `relu`.
    pub fn forward(
        &self,
        x: Tensor<4>,
        residual: Option<Tensor<4>>,
        relu: bool,
        context: &Context,
    ) -> Tensor<4> {
        let norm = BatchNormParams {
            gamma: self.gamma.val(),
            beta: self.beta.val(),
            running_mean: self.running_mean.val(),
            running_variance: self.running_variance.val(),
        };
        if context.learns() {
            batch_norm(x, norm, residual, relu)
        } else {
            batch_norm_by_running(x, norm, residual, relu)
        }
    }
}
