//! Convolution and batch normalisation of channels-last images, `[batch, height, width, channels]`.

use super::{Context, Fill, Init};
use crate::autograd::{Norm, batch_norm, batch_norm_by_running, convolution, convolution_pooled};
use burn::module::{Module, Param};
use burn::tensor::Tensor;

/// A convolution with a square kernel of odd size, padded so that with stride 1 images keep their size.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[kernel, kernel, inputs, outputs]`
    weight: Param<Tensor<4>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Convolution {
    /// From `inputs` to `outputs` channels. Weights begin as He et al. 2015, "Delving Deep into Rectifiers", equation 10,
    /// has it.
    pub fn new(init: &Init, kernel: usize, inputs: usize, outputs: usize, bias: bool) -> Self {
        let deviation = (2.0 / (kernel * kernel * inputs) as f32).sqrt();
        let dims: [&[_]; 4] =
            [&[("y", kernel)], &[("x", kernel)], &[("inputs", inputs)], &[("outputs", outputs)]];
        Self {
            weight: init.param("weight", dims, Fill::Normal(deviation)),
            bias: bias.then(|| init.param("bias", [&[("outputs", outputs)]], Fill::Constant(0.0))),
        }
    }

    /// Of images, images of `outputs` channels; without the bias.
    pub fn forward(&self, x: Tensor<4>, stride: usize) -> Tensor<4> {
        let weight = self.weight.val();
        let padding = weight.dims()[0] / 2;
        convolution(x, weight, stride, padding)
    }

    /// With the bias, ReLU and 2x2 max pooling behind it.
    pub fn pooled(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = self.weight.val();
        let [kernel, _, _, outputs] = weight.dims();
        let bias = self.bias.as_ref().map(Param::val);
        let bias = bias.unwrap_or_else(|| Tensor::zeros([outputs], (&x.device(), x.dtype())));
        convolution_pooled(x, weight, bias, kernel / 2)
    }
}

/// Batch normalisation (Ioffe & Szegedy 2015). In training by the statistics of the micro-batch on this worker, in
/// evaluation by the running ones.
#[derive(Module, Debug)]
pub struct BatchNorm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
    running_mean: Param<Tensor<1>>,
    running_variance: Param<Tensor<1>>,
}

impl BatchNorm {
    /// Over `channels`.
    pub fn new(init: &Init, channels: usize) -> Self {
        let dims: [&[_]; 1] = [&[("channels", channels)]];
        Self {
            gamma: init.param("gamma", dims, Fill::Constant(1.0)),
            beta: init.param("beta", dims, Fill::Constant(0.0)),
            running_mean: init.statistic("running_mean", dims, Fill::Constant(0.0)),
            running_variance: init.statistic("running_variance", dims, Fill::Constant(1.0)),
        }
    }

    /// Of images, with `residual` added, and then ReLU where wanted.
    pub fn forward(
        &self,
        x: Tensor<4>,
        residual: Option<Tensor<4>>,
        relu: bool,
        context: &Context,
    ) -> Tensor<4> {
        let norm = Norm {
            gamma: self.gamma.val(),
            beta: self.beta.val(),
            running_mean: self.running_mean.val(),
            running_variance: self.running_variance.val(),
        };
        match context.learns() {
            true => batch_norm(x, norm, residual, relu),
            false => batch_norm_by_running(x, norm, residual, relu),
        }
    }
}
