//! Softmax cross entropy over a vocabulary that may be split over an axis: neither logits nor probabilities are ever
//! gathered (Shoeybi et al. 2019, "Megatron-LM", section 3).

use super::axis::Axis;
use super::custom::{Back, custom, fused, in_place, integers, numbers, tensor_of, value};
use super::device::at_least_f32;
use super::work::Work;
use burn::backend::Shape;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};
use regatta_comm::ReduceOp;
use regatta_kernel::loss::{Backward, Sums, largest, sums};

/// A class that counts for nothing, as padding.
pub const IGNORED: i64 = -1;

/// Mean cross entropy (natural logarithm) of `logits` `[samples, classes]` against `targets` `[samples]`, as `[1]`, with
/// label smoothing. With an axis, `logits` are this rank's classes, from class `first` of `all` on. Samples whose target
/// is [`IGNORED`] count for nothing; the mean is over the others.
pub(crate) fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    smoothing: f32,
    split: Option<(&Axis, usize, usize)>,
) -> Tensor<1> {
    if !fused(&logits) {
        return decomposed(logits, targets, smoothing);
    }
    let [rows, classes] = logits.dims();
    let targets = integers(targets);
    let (axis, first, all_classes) =
        split.map_or((None, 0, classes), |(axis, first, all)| (Some(axis), first, all));
    let here =
        |target: &i64| usize::try_from(*target).ok()?.checked_sub(first).filter(|class| *class < classes);
    let places: Vec<Option<usize>> = targets.iter().map(here).collect();
    let counts: Vec<bool> = targets.iter().map(|target| *target != IGNORED).collect();
    let counted = counts.iter().filter(|counts| **counts).count().max(1);
    let elements = (rows * classes) as f64;
    custom(Work::new("cross entropy", 4.0 * elements, 8.0 * elements), [value(logits)], |[logits]| {
        let mut most = vec![0.0f32; rows];
        let mut all = vec![Sums::default(); rows];
        {
            let values = numbers(&logits);
            largest(&values, classes, &mut most);
            if let Some(axis) = axis {
                axis.reduce(&mut most, ReduceOp::Max);
            }
            sums(&values, classes, &most, &places, smoothing > 0.0, &mut all);
        }
        if let Some(axis) = axis {
            add_up(axis, &mut all, smoothing > 0.0);
        }
        let loss = |row: usize| all[row].loss(most[row], smoothing, all_classes);
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
                    largest: &most,
                    sums: &all,
                    targets: &places,
                    scales: &scales,
                };
                in_place(logits, |logits| backward.run(logits))
            })]
        });
        (tensor_of(vec![(total / counted as f64) as f32], Shape::from([1])), back)
    })
}

/// Adds up what the ranks of `axis` have of each row, beside each other, so that one all-reduce carries it.
fn add_up(axis: &Axis, all: &mut [Sums], smooth: bool) {
    let mut beside: Vec<f32> = all.iter().map(|sums| sums.exponentials).collect();
    beside.extend(all.iter().map(|sums| sums.target));
    if smooth {
        beside.extend(all.iter().map(|sums| sums.logits));
    }
    axis.reduce(&mut beside, ReduceOp::Sum);
    let rows = all.len();
    for (row, sums) in all.iter_mut().enumerate() {
        sums.exponentials = beside[row];
        sums.target = beside[rows + row];
        sums.logits = beside.get(2 * rows + row).copied().unwrap_or(0.0);
    }
}

/// By Burn's operations; narrow numbers are summed as f32.
fn decomposed(logits: Tensor<2>, targets: Tensor<1, Int>, smoothing: f32) -> Tensor<1> {
    let [rows, _] = logits.dims();
    let logs = log_softmax(at_least_f32(logits), 1);
    let ignored = targets.clone().equal_elem(IGNORED);
    let counted = ignored.clone().bool_not().int().sum().into_scalar::<i64>().max(1);
    let at = targets.clamp_min(0).reshape([rows, 1]);
    let of_target = logs.clone().gather(1, at).reshape([rows]);
    let smooth = logs.mean_dim(1).reshape([rows]).mul_scalar(smoothing);
    let each = of_target.mul_scalar(1.0 - smoothing) + smooth;
    each.mask_fill(ignored, 0.0).sum().mul_scalar(-1.0 / counted as f64)
}
