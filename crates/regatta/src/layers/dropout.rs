//! Dropout whose masks are a function of (seed, step, micro-step, rank, place).

use crate::random::Stream;
use burn::tensor::{Tensor, TensorData};

/// What a forward pass knows beside its batch.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    noise: Option<Stream>,
}

impl Context {
    /// Evaluation and generation: nothing random.
    pub fn eval() -> Self {
        Self { noise: None }
    }

    /// Training; `noise` must differ from one micro-step and rank to the next.
    pub fn train(noise: Stream) -> Self {
        Self { noise: Some(noise) }
    }
}

/// Zeroes each element with probability `rate` and scales the others by `1 / (1 - rate)` (Srivastava et al.
/// 2014). Identity in evaluation. `place` names the layer, so that no two layers share a mask.
pub fn dropout<const D: usize>(x: Tensor<D>, rate: f64, context: &Context, place: u64) -> Tensor<D> {
    let Some(noise) = context.noise.filter(|_| rate > 0.0) else { return x };
    let stream = noise.at(place);
    let keep = (1.0 / (1.0 - rate)) as f32;
    let rate = rate as f32;
    let shape = x.dims();
    let len: usize = shape.iter().product();
    let mask: Vec<f32> = (0..len as u64).map(|i| if stream.uniform(i) < rate { 0.0 } else { keep }).collect();
    let mask = Tensor::<D>::from_data(TensorData::new(mask, shape), &x.device());
    x * mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{device, to_vec};

    #[test]
    fn keeps_the_mean_and_repeats() {
        let context = Context::train(Stream::new(3));
        let x = Tensor::<2>::ones([100, 100], &device());
        let run = |place| to_vec(dropout(x.clone(), 0.25, &context, place)).unwrap();
        let kept = run(1);
        let mean = kept.iter().sum::<f32>() / kept.len() as f32;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        assert_eq!(kept, run(1));
        assert_ne!(kept, run(2));
        let same = to_vec(dropout(x.clone(), 0.25, &Context::eval(), 1)).unwrap();
        assert!(same.iter().all(|&x| x == 1.0));
    }
}
