//! Dropout. A mask is a function of the seed, the step, the place in the model, the sample and the element of the whole
//! tensor, so it is the same under every plan.

use crate::autograd::{DropoutPart, drop_elements, residual};
use burn::tensor::Tensor;
use regatta_kernel::dropout::{Dropout, Noise};
use std::ops::Range;

/// The dropout of the part `part` of a tensor whose dimension 1 is `whole`; none without noise.
fn dropout_of(rate: f64, noise: Option<Noise>, part: Range<usize>, whole: usize) -> Option<DropoutPart> {
    let Noise { stream: noise, rows } = noise.filter(|_| rate > 0.0)?;
    Some(DropoutPart { dropout: Dropout { noise, rate: rate as f32 }, rows, part, full: whole })
}

/// Sets each element of `x` to zero with probability `rate`, 0 to below 1, and multiplies the others by `1 / (1 - rate)`
/// (Srivastava et al. 2014, "Dropout"). `noise` provides the random numbers; without it, `x` is returned unchanged.
///
/// `x`, of any shape with two or more dimensions, is the range `part` of dimension 1 of a larger tensor, in which that
/// dimension has size `whole`. So ranks that hold parts of a tensor draw the same mask as one rank with all of it.
pub fn dropout_part<const D: usize>(
    x: Tensor<D>,
    rate: f64,
    noise: Option<Noise>,
    part: Range<usize>,
    whole: usize,
) -> Tensor<D> {
    match dropout_of(rate, noise, part, whole) {
        Some(dropout) => drop_elements(x, dropout),
        None => x,
    }
}

/// `x` plus the [`dropout_part`] of `y`, in one pass; both have the same shape.
pub fn residual_part<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    rate: f64,
    noise: Option<Noise>,
    part: Range<usize>,
    whole: usize,
) -> Tensor<D> {
    residual(x, y, dropout_of(rate, noise, part, whole))
}

/// [`dropout_part`] of a tensor that this rank holds completely.
///
/// # Panics
/// `x` has fewer than two dimensions.
pub fn dropout<const D: usize>(x: Tensor<D>, rate: f64, noise: Option<Noise>) -> Tensor<D> {
    let whole = x.dims()[1];
    dropout_part(x, rate, noise, 0..whole, whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{device, to_vec};
    use crate::random::Stream;
    use regatta_kernel::dropout::SampleRows;

    fn noise(seed: u64, rows: SampleRows) -> Option<Noise> {
        Some(Noise { stream: Stream::new(seed), rows })
    }

    #[test]
    fn keeps_the_mean_and_repeats() {
        let noise = |place| Some(Noise { stream: Stream::new(3).at(place), rows: SampleRows::ALL });
        let x = Tensor::<2>::ones([100, 100], &device());
        let run = |place| to_vec(dropout(x.clone(), 0.25, noise(place))).unwrap();
        let kept = run(1);
        let mean = kept.iter().sum::<f32>() / kept.len() as f32;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        assert_eq!(kept, run(1));
        assert_ne!(kept, run(2));
        let same = to_vec(dropout(x, 0.25, None)).unwrap();
        assert!(same.iter().all(|&x| x == 1.0));
    }

    #[test]
    fn parts_of_a_tensor_draw_the_mask_of_the_tensor() {
        let noise = noise(5, SampleRows::ALL);
        let x = Tensor::<3>::ones([2, 6, 4], &device());
        let whole = dropout(x.clone(), 0.5, noise);
        for part in [0..2, 2..6] {
            let own = x.clone().narrow(1, part.start, part.len());
            let wanted = to_vec(whole.clone().narrow(1, part.start, part.len())).unwrap();
            assert_eq!(to_vec(dropout_part(own, 0.5, noise, part, 6)).unwrap(), wanted);
        }
    }

    #[test]
    fn rows_of_a_batch_draw_the_mask_of_the_batch() {
        let x = Tensor::<3>::ones([6, 4, 5], &device());
        let all = to_vec(dropout(x.clone(), 0.5, noise(9, SampleRows::ALL))).unwrap();
        for rows in [SampleRows { first: 1, stride: 2 }, SampleRows { first: 2, stride: 1 }] {
            let own = to_vec(dropout(x.clone().narrow(0, 0, 3), 0.5, noise(9, rows))).unwrap();
            for row in 0..3 {
                assert_eq!(own[row * 20..][..20], all[rows.sample(row) * 20..][..20], "{rows:?}");
            }
        }
    }
}
