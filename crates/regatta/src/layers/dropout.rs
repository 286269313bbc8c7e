//! Dropout whose masks are a function of (seed, step, micro-step, worker, place, element of the whole tensor).

use crate::autograd::{Drops, drop_elements, residual};
use crate::random::Stream;
use burn::tensor::Tensor;
use regatta_kernel::dropout::Dropout;
use std::ops::Range;

/// What is dropped of part `part` of a tensor that is `whole` long along dimension 1; nothing without noise.
fn drops(rate: f64, noise: Option<Stream>, part: Range<usize>, whole: usize) -> Option<Drops> {
    let noise = noise.filter(|_| rate > 0.0)?;
    Some(Drops { dropout: Dropout { noise, rate: rate as f32 }, part, whole })
}

/// Zeroes each element with probability `rate` and scales the others by `1 / (1 - rate)` (Srivastava et al. 2014), with
/// random numbers of `noise`; identity without. `part` says which part of dimension 1 of the whole tensor `x` is, and
/// `whole` how long that is: so the ranks that hold the parts of a tensor draw what one rank would draw for all of it.
pub fn dropout_part<const D: usize>(
    x: Tensor<D>,
    rate: f64,
    noise: Option<Stream>,
    part: Range<usize>,
    whole: usize,
) -> Tensor<D> {
    match drops(rate, noise, part, whole) {
        Some(drops) => drop_elements(x, drops),
        None => x,
    }
}

/// `x + y`, with [`dropout_part`] of `y`.
pub fn residual_part<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    rate: f64,
    noise: Option<Stream>,
    part: Range<usize>,
    whole: usize,
) -> Tensor<D> {
    residual(x, y, drops(rate, noise, part, whole))
}

/// [`dropout_part`] of a whole tensor of two or more dimensions.
pub fn dropout<const D: usize>(x: Tensor<D>, rate: f64, noise: Option<Stream>) -> Tensor<D> {
    let whole = x.dims()[1];
    dropout_part(x, rate, noise, 0..whole, whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{device, to_vec};

    #[test]
    fn keeps_the_mean_and_repeats() {
        let noise = Stream::new(3);
        let x = Tensor::<2>::ones([100, 100], &device());
        let run = |place| to_vec(dropout(x.clone(), 0.25, Some(noise.at(place)))).unwrap();
        let kept = run(1);
        let mean = kept.iter().sum::<f32>() / kept.len() as f32;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        assert_eq!(kept, run(1));
        assert_ne!(kept, run(2));
        let same = to_vec(dropout(x, 0.25, None)).unwrap();
        assert!(same.iter().all(|&x| x == 1.0));
    }

    #[test]
    fn the_parts_draw_what_the_whole_draws() {
        let noise = Some(Stream::new(5));
        let x = Tensor::<3>::ones([2, 6, 4], &device());
        let whole = dropout(x.clone(), 0.5, noise);
        for part in [0..2, 2..6] {
            let own = x.clone().narrow(1, part.start, part.len());
            let wanted = to_vec(whole.clone().narrow(1, part.start, part.len())).unwrap();
            assert_eq!(to_vec(dropout_part(own, 0.5, noise, part, 6)).unwrap(), wanted);
        }
    }
}
