//! Batch normalisation of channels-last images. Its running statistics are parameters whose gradient is the statistic of
//! the batch. So micro-batches, workers, shards and checkpoints treat them like all other parameters.

use super::custom::{Back, Value, custom, fused, in_place, numbers, plain, tensor_of, value};
use super::work::Work;
use burn::backend::autodiff::NodeId;
use burn::backend::{TensorMetadata, flex::FlexTensor};
use burn::tensor::Tensor;
use burn::tensor::activation::relu as burn_relu;
use regatta_kernel::batch_norm::{Line, Statistics, apply, backward, statistics, through_relu};

/// Added to variances, so that the division is defined.
const EPS: f64 = 1e-5;

/// The parameters of a batch normalisation, each `[channels]`.
pub(crate) struct BatchNormParams {
    pub(crate) gamma: Tensor<1>,
    pub(crate) beta: Tensor<1>,
    pub(crate) running_mean: Tensor<1>,
    pub(crate) running_variance: Tensor<1>,
}

/// Normalises `x` `[batch, height, width, channels]` by the statistics of the batch (Ioffe & Szegedy 2015, "Batch
/// Normalization", algorithm 1), then adds `residual` if given and applies ReLU if `relu`. Backward returns the batch's mean
/// and unbiased variance as the gradients of the running mean and variance.
pub(crate) fn batch_norm(
    x: Tensor<4>,
    norm: BatchNormParams,
    residual: Option<Tensor<4>>,
    relu: bool,
) -> Tensor<4> {
    if !fused(&x) {
        return decomposed(x, norm, residual, relu);
    }
    let elements = x.dims().iter().product::<usize>() as f64;
    let work = Work::new("batch norm", 8.0 * elements, 16.0 * elements);
    let BatchNormParams { gamma, beta, running_mean, running_variance } = norm;
    let [x, gamma, beta] = [value(x), value(gamma), value(beta)];
    let running = [value(running_mean), value(running_variance)];
    let [mean, variance] = running;
    match residual {
        None => custom(work, [x, gamma, beta, mean, variance], |[x, gamma, beta, ..]| {
            let (out, kept) = forward(x, gamma, &beta, None, relu);
            let back: Back<5> = Box::new(move |gradient, wanted| kept.backward(gradient, wanted));
            (out, back)
        }),
        Some(residual) => {
            let inputs = [x, gamma, beta, mean, variance, value(residual)];
            custom(work, inputs, |[x, gamma, beta, _, _, residual]| {
                let (out, kept) = forward(x, gamma, &beta, Some(&residual), relu);
                // The output is also the mask of ReLU. It takes no more memory, since the next layer keeps it anyway.
                let mask = relu.then(|| out.clone());
                let back: Back<6> = Box::new(move |gradient, [x, gamma, beta, mean, variance, residual]| {
                    let mut gradient = gradient;
                    if let Some(mask) = mask {
                        gradient = in_place(gradient, |values| through_relu(&numbers(&mask), values));
                    }
                    let of_residual = residual.map(|_| gradient.clone());
                    let [x, gamma, beta, mean, variance] =
                        Kept { relu: false, ..kept }.backward(gradient, [x, gamma, beta, mean, variance]);
                    [x, gamma, beta, mean, variance, of_residual]
                });
                (out, back)
            })
        }
    }
}

/// Normalises by the running statistics, as in evaluation, then adds `residual` if given and applies ReLU if `relu`. Has no
/// backward pass.
pub(crate) fn batch_norm_by_running(
    x: Tensor<4>,
    norm: BatchNormParams,
    residual: Option<Tensor<4>>,
    relu: bool,
) -> Tensor<4> {
    if !fused(&x) {
        let BatchNormParams { gamma, beta, running_mean, running_variance } = norm;
        let scale = gamma / (running_variance + EPS).sqrt();
        let shift = beta - running_mean * scale.clone();
        return finish(x * scale.unsqueeze() + shift.unsqueeze(), residual, relu);
    }
    let elements = x.dims().iter().product::<usize>() as f64;
    let work = Work::new("batch norm", 2.0 * elements, 8.0 * elements);
    let [gamma, beta, mean, variance] =
        [norm.gamma, norm.beta, norm.running_mean, norm.running_variance].map(plain);
    let residual = residual.map(plain);
    custom(work, [Value::Plain(plain(x))], |[x]| {
        let running = Statistics { mean: numbers(&mean).to_vec(), variance: numbers(&variance).to_vec() };
        let line = Line::new(&running, &numbers(&gamma), &numbers(&beta), EPS);
        let mut out = vec![0.0; x.shape().num_elements()];
        apply(&numbers(&x), residual.as_ref().map(numbers).as_deref(), &line, relu, &mut out);
        (tensor_of(out, x.shape()), Box::new(|_, _| [None]))
    })
}

/// What the backward pass needs from the forward pass.
struct Kept {
    x: FlexTensor,
    gamma: FlexTensor,
    statistics: Statistics,
    line: Line,
    relu: bool,
}

fn forward(
    x: FlexTensor,
    gamma: FlexTensor,
    beta: &FlexTensor,
    residual: Option<&FlexTensor>,
    relu: bool,
) -> (FlexTensor, Kept) {
    let mut out = vec![0.0; x.shape().num_elements()];
    let (statistics, line) = {
        let gamma = numbers(&gamma);
        let statistics = statistics(&numbers(&x), gamma.len());
        let line = Line::new(&statistics, &gamma, &numbers(beta), EPS);
        apply(&numbers(&x), residual.map(numbers).as_deref(), &line, relu, &mut out);
        (statistics, line)
    };
    (tensor_of(out, x.shape()), Kept { x, gamma, statistics, line, relu })
}

impl Kept {
    /// The gradients of x, gamma, beta and the running statistics.
    fn backward(self, gradient: FlexTensor, wanted: [Option<NodeId>; 5]) -> [Option<FlexTensor>; 5] {
        let Self { x, gamma, statistics, line, relu } = self;
        let mut of_line = [vec![], vec![]];
        let gradient = in_place(gradient, |values| {
            of_line = backward(&numbers(&x), &statistics, &numbers(&gamma), &line, EPS, relu, values);
        });
        let [of_gamma, of_beta] = of_line;
        let rows = x.shape().num_elements() / of_beta.len().max(1);
        let Statistics { mean, mut variance } = statistics;
        let correction = correction(rows) as f32;
        variance.iter_mut().for_each(|variance| *variance *= correction);
        let [of_x, w_gamma, w_beta, w_mean, w_variance] = wanted;
        let line = |wanted: Option<NodeId>, values: Vec<f32>| {
            wanted.map(|_| {
                let len = values.len();
                tensor_of(values, [len])
            })
        };
        [
            of_x.map(|_| gradient),
            line(w_gamma, of_gamma),
            line(w_beta, of_beta),
            line(w_mean, mean),
            line(w_variance, variance),
        ]
    }
}

/// Bessel's correction: the factor that makes the variance of `rows` samples an unbiased estimate.
fn correction(rows: usize) -> f64 {
    rows as f64 / rows.saturating_sub(1).max(1) as f64
}

/// [`batch_norm`] with Burn's operations.
fn decomposed(x: Tensor<4>, norm: BatchNormParams, residual: Option<Tensor<4>>, relu: bool) -> Tensor<4> {
    let [batch, height, width, _] = x.dims();
    let over = |x: Tensor<4>| x.mean_dim(0).mean_dim(1).mean_dim(2);
    let mean = over(x.clone());
    let centred = x - mean.clone();
    let variance = over(centred.clone() * centred.clone());
    let flat = |x: Tensor<4>| x.flatten::<1>(0, 3);
    let unbiased = flat(variance.clone()) * correction(batch * height * width);
    let normal = centred / (variance + EPS).sqrt();
    let out = normal * norm.gamma.unsqueeze() + norm.beta.unsqueeze();
    let out = with_gradient(out, norm.running_mean, flat(mean));
    finish(with_gradient(out, norm.running_variance, unbiased), residual, relu)
}

/// Adds `residual` if given, and applies ReLU if `relu`.
fn finish(x: Tensor<4>, residual: Option<Tensor<4>>, relu: bool) -> Tensor<4> {
    let x = match residual {
        Some(residual) => x + residual,
        None => x,
    };
    if relu { burn_relu(x) } else { x }
}

/// `x` itself; backward returns `statistic` as the gradient of `running`.
fn with_gradient(x: Tensor<4>, running: Tensor<1>, statistic: Tensor<1>) -> Tensor<4> {
    if !x.is_autodiff() {
        return x;
    }
    let statistic = plain(statistic);
    custom(Work::none("batch statistic"), [value(x), value(running)], |[x, _]| {
        let back: Back<2> = Box::new(move |gradient, [of_x, of_running]| {
            [of_x.map(|_| gradient), of_running.map(|_| statistic)]
        });
        (x, back)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::train_device;
    use burn::tensor::{DType, TensorData};

    fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let values = crate::random::Stream::new(seed).normal(shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &train_device())
    }

    fn f64s<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
        tensor.into_data().iter::<f64>().collect()
    }

    /// The output, and the gradients of x, residual, gamma, beta and the running statistics.
    fn run(dtype: DType, with_residual: bool, relu: bool) -> [Vec<f64>; 7] {
        let leaf = |seed: u64| tensor([5], seed).cast(dtype).require_grad();
        let (x, residual) = (tensor([3, 4, 2, 5], 1) * 2.0 + 1.0, tensor([3, 4, 2, 5], 2));
        let (x, residual) = (x.detach().cast(dtype).require_grad(), residual.cast(dtype).require_grad());
        let [gamma, beta, mean, variance] = [3, 4, 5, 6].map(leaf);
        let norm = BatchNormParams {
            gamma: gamma.clone(),
            beta: beta.clone(),
            running_mean: mean.clone(),
            running_variance: variance.clone(),
        };
        let out = batch_norm(x.clone(), norm, with_residual.then(|| residual.clone()), relu);
        let mut found = (out.clone() * tensor([3, 4, 2, 5], 7).cast(dtype)).sum().backward();
        let of_residual = residual.grad_remove(&mut found).map(f64s).unwrap_or_default();
        let mut of = |leaf: &Tensor<1>| f64s(leaf.grad_remove(&mut found).unwrap());
        let lines = [of(&gamma), of(&beta), of(&mean), of(&variance)];
        let of_x = f64s(x.grad_remove(&mut found).unwrap());
        let [gamma, beta, mean, variance] = lines;
        [f64s(out), of_x, of_residual, gamma, beta, mean, variance]
    }

    #[test]
    fn agrees_with_burns_operations_in_f64() {
        for (residual, relu) in [(false, false), (false, true), (true, false), (true, true)] {
            let both = run(DType::F32, residual, relu).into_iter().zip(run(DType::F64, residual, relu));
            for (index, (found, wanted)) in both.enumerate() {
                let largest = wanted.iter().fold(1e-30f64, |most, x| most.max(x.abs()));
                let off = found
                    .iter()
                    .zip(&wanted)
                    .map(|(a, b)| (a - b).abs())
                    .max_by(f64::total_cmp)
                    .unwrap_or(0.0);
                assert!(off < 1e-5 * largest, "{index} with {residual} {relu}: {:.1e}", off / largest);
            }
        }
    }

    #[test]
    fn the_gradients_of_running_statistics_are_those_of_the_batch() {
        let values = f64s(tensor([3, 4, 2, 5], 1) * 2.0 + 1.0);
        let [.., mean, variance] = run(DType::F32, false, true);
        for channel in 0..5 {
            let column: Vec<f64> = values.iter().skip(channel).step_by(5).copied().collect();
            let wanted = column.iter().sum::<f64>() / 24.0;
            assert!((mean[channel] - wanted).abs() < 1e-5);
            let squares = column.iter().map(|x| (x - wanted).powi(2)).sum::<f64>();
            assert!((variance[channel] - squares / 23.0).abs() < 1e-5);
        }
    }

    #[test]
    fn by_running_statistics() {
        let x = tensor([1, 1, 2, 2], 1);
        let line = |values: [f32; 2]| Tensor::<1>::from_data(TensorData::from(values), &train_device());
        let norm = || BatchNormParams {
            gamma: line([2.0, 3.0]),
            beta: line([0.5, -1.0]),
            running_mean: line([1.0, -1.0]),
            running_variance: line([4.0, 0.25]),
        };
        let plain: Vec<f64> = f64s(x.clone());
        let wanted = |i: usize| match i % 2 {
            0 => (plain[i] - 1.0) / (4.0 + EPS).sqrt() * 2.0 + 0.5,
            _ => (plain[i] + 1.0) / (0.25 + EPS).sqrt() * 3.0 - 1.0,
        };
        for dtype in [DType::F32, DType::F64] {
            let cast = |x: Tensor<1>| x.cast(dtype);
            let BatchNormParams { gamma, beta, running_mean, running_variance } = norm();
            let norm = BatchNormParams {
                gamma: cast(gamma),
                beta: cast(beta),
                running_mean: cast(running_mean),
                running_variance: cast(running_variance),
            };
            let found = f64s(batch_norm_by_running(x.clone().cast(dtype), norm, None, false));
            found.iter().enumerate().for_each(|(i, y)| assert!((y - wanted(i)).abs() < 1e-4));
        }
    }
}
