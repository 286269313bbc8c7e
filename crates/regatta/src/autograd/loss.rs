//! Softmax cross entropy over a vocabulary that may be split over an axis. Neither logits nor probabilities are gathered
//! (Shoeybi et al. 2019, "Megatron-LM", section 3).

use super::axis::AxisGroup;
use super::custom::{Back, custom, fused, in_place, integers, numbers, tensor_of, value};
use super::device::at_least_f32;
use super::work::Work;
use burn::backend::Shape;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};
use regatta_comm::ReduceOp;
use regatta_kernel::loss::{Backward, Sums, largest, sums};

/// The target of a sample that the loss ignores, such as padding.
pub const IGNORED: i64 = -1;

/// Mean cross entropy (natural logarithm) of `logits` `[samples, classes]` against `targets` `[samples]`, as `[1]`, with
/// label smoothing (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7). The mean
/// leaves out samples whose target is [`IGNORED`].
///
/// `split` is an axis, the first of this rank's classes, and the number of all classes: then `logits` are those of this
/// rank's classes.
pub(crate) fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    smoothing: f32,
    split: Option<(&AxisGroup, usize, usize)>,
) -> Tensor<1> {
    if !fused(&logits) {
        return decomposed(logits, targets, smoothing);
    }
    let [rows, classes] = logits.dims();
    let targets = integers(targets);
    let (axis, first, all_classes) =
        split.map_or((None, 0, classes), |(axis, first, all)| (Some(axis), first, all));
    let local_class =
        |target: &i64| usize::try_from(*target).ok()?.checked_sub(first).filter(|class| *class < classes);
    let local_targets: Vec<Option<usize>> = targets.iter().map(local_class).collect();
    let counts: Vec<bool> = targets.iter().map(|target| *target != IGNORED).collect();
    let counted = counts.iter().filter(|counts| **counts).count().max(1);
    let elements = (rows * classes) as f64;
    custom(Work::new("cross entropy", 4.0 * elements, 8.0 * elements), [value(logits)], |[logits]| {
        let mut largest_logits = vec![0.0f32; rows];
        let mut all = vec![Sums::default(); rows];
        {
            let values = numbers(&logits);
            largest(&values, classes, &mut largest_logits);
            if let Some(axis) = axis {
                axis.reduce(&mut largest_logits, ReduceOp::Max);
            }
            sums(&values, classes, &largest_logits, &local_targets, smoothing > 0.0, &mut all);
        }
        if let Some(axis) = axis {
            reduce_sums(axis, &mut all, smoothing > 0.0);
        }
        let loss = |row: usize| all[row].loss(largest_logits[row], smoothing, all_classes);
        let total: f64 = (0..rows).filter(|&row| counts[row]).map(loss).sum();
        let back: Back<1> = Box::new(move |gradient, [wanted]| {
            [wanted.map(|_| {
                let scale = numbers(&gradient)[0] / counted as f32;
                let scales: Vec<f32> =
                    counts.iter().map(|counts| if *counts { scale } else { 0.0 }).collect();
                let backward = Backward {
                    classes,
                    all_classes,
                    smoothing,
                    largest: &largest_logits,
                    sums: &all,
                    targets: &local_targets,
                    scales: &scales,
                };
                in_place(logits, |logits| backward.run(logits))
            })]
        });
        (tensor_of(vec![(total / counted as f64) as f32], Shape::from([1])), back)
    })
}

/// Sums each row's sums over the ranks of `axis`. They are packed into one buffer, so that one all-reduce is enough.
fn reduce_sums(axis: &AxisGroup, all: &mut [Sums], smooth: bool) {
    let mut packed: Vec<f32> = all.iter().map(|sums| sums.exponentials).collect();
    packed.extend(all.iter().map(|sums| sums.target));
    if smooth {
        packed.extend(all.iter().map(|sums| sums.logits));
    }
    axis.reduce(&mut packed, ReduceOp::Sum);
    let rows = all.len();
    for (row, sums) in all.iter_mut().enumerate() {
        sums.exponentials = packed[row];
        sums.target = packed[rows + row];
        sums.logits = packed.get(2 * rows + row).copied().unwrap_or(0.0);
    }
}

/// [`cross_entropy`] with Burn's operations. 16-bit numbers are summed as f32.
fn decomposed(logits: Tensor<2>, targets: Tensor<1, Int>, smoothing: f32) -> Tensor<1> {
    let [rows, _] = logits.dims();
    let logs = log_softmax(at_least_f32(logits), 1);
    let ignored = targets.clone().equal_elem(IGNORED);
    let counted = ignored.clone().bool_not().int().sum().into_scalar::<i64>().max(1);
    let classes = targets.clamp_min(0).reshape([rows, 1]);
    let of_target = logs.clone().gather(1, classes).reshape([rows]);
    let smooth = logs.mean_dim(1).reshape([rows]).mul_scalar(smoothing);
    let by_sample = of_target.mul_scalar(1.0 - smoothing) + smooth;
    by_sample.mask_fill(ignored, 0.0).sum().mul_scalar(-1.0 / counted as f64)
}
