//! Softmax cross entropy over a vocabulary that may be split over an axis: neither logits nor probabilities are ever
//! gathered (Shoeybi et al. 2019, "Megatron-LM", section 3).

use super::axis::Axis;
use super::custom::{Back, custom, integers, numbers, tensor_of, value};
use super::work::Work;
use burn::backend::{Shape, TensorMetadata};
use burn::tensor::{Int, Tensor};
use regatta_comm::ReduceOp;

/// A class that counts for nothing, as padding.
pub const IGNORED: i64 = -1;

/// Mean cross entropy (natural logarithm) of `logits` `[samples, classes]` against `targets` `[samples]`, as `[1]`.
/// With an axis, `logits` are this rank's classes, from class `first` on. Samples whose target is [`IGNORED`] count for
/// nothing; the mean is over the others.
pub(crate) fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    split: Option<(&Axis, usize)>,
) -> Tensor<1> {
    let targets = integers(targets);
    let (axis, first) = split.map_or((None, 0), |(axis, first)| (Some(axis), first));
    let elements: f64 = logits.dims().iter().map(|&size| size as f64).product();
    custom(Work::new("cross entropy", 4.0 * elements, 8.0 * elements), [value(logits)], |[logits]| {
        let classes = logits.shape()[1];
        let here =
            move |target: i64| usize::try_from(target).ok()?.checked_sub(first).filter(|c| *c < classes);
        let values = numbers(&logits);
        let mut largest: Vec<f32> = values.chunks_exact(classes).map(row_max).collect();
        if let Some(axis) = axis {
            axis.reduce(&mut largest, ReduceOp::Max);
        }
        // Beside each other, so that one all-reduce carries both: the sums of exponentials and the targets' logits.
        let samples = targets.len();
        let mut sums = vec![0.0f32; 2 * samples];
        let mut exponentials = Vec::with_capacity(values.len());
        for (index, row) in values.chunks_exact(classes).enumerate() {
            let begin = exponentials.len();
            exponentials.extend(row.iter().map(|x| (x - largest[index]).exp()));
            sums[index] = exponentials[begin..].iter().sum();
            sums[samples + index] = here(targets[index]).map_or(0.0, |class| row[class]);
        }
        if let Some(axis) = axis {
            axis.reduce(&mut sums, ReduceOp::Sum);
        }
        let counted = targets.iter().filter(|target| **target != IGNORED).count().max(1);
        let loss =
            |index: usize| f64::from(sums[index].ln()) + f64::from(largest[index] - sums[samples + index]);
        let total: f64 = (0..samples).filter(|&index| targets[index] != IGNORED).map(loss).sum();
        let shape = logits.shape();
        let back: Back<1> = Box::new(move |gradient, [wanted]| {
            [wanted.map(|_| {
                let scale = numbers(&gradient)[0] / counted as f32;
                for (index, row) in exponentials.chunks_exact_mut(classes).enumerate() {
                    let factor = if targets[index] == IGNORED { 0.0 } else { scale / sums[index] };
                    row.iter_mut().for_each(|p| *p *= factor);
                    if let Some(class) = here(targets[index]) {
                        row[class] -= scale;
                    }
                }
                tensor_of(exponentials, shape)
            })]
        });
        (tensor_of(vec![(total / counted as f64) as f32], Shape::from([1])), back)
    })
}

fn row_max(row: &[f32]) -> f32 {
    row.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}
