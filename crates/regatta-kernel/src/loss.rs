//! Softmax cross entropy over classes that may be split over ranks, without storing probabilities.
//!
//! `loss = log(sum(exp(x))) - (1 - s) x[target] - s mean(x)` with label smoothing `s` (Szegedy et al. 2016,
//! "Rethinking the Inception Architecture", section 7). If the classes are split, the ranks first agree on the
//! largest logit of each row. Then each computes the [`Sums`] over its own classes, and the ranks add them up.

use crate::math::exp;
use crate::parallel::{for_chunks, rows_of_chunk};
use crate::simd::vectorized;

/// Independent results that are folded at the same time, for vector units.
const LANES: usize = 64;
/// Lanes that are combined one after the other.
const LAST_LANES: usize = 16;

/// Folds a row with `with`. `start` is 0 for sums, and negative infinity for the largest element.
#[inline(always)]
fn fold(row: &[f32], start: f32, mut with: impl FnMut(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = with(*lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = with(*lane, *x);
    }
    let mut len = LANES;
    while len > LAST_LANES {
        len /= 2;
        for i in 0..len {
            lanes[i] = combine(start, lanes[i], lanes[i + len]);
        }
    }
    lanes[..LAST_LANES].iter().fold(start, |a, b| combine(start, a, *b))
}

/// Combines two results of a fold: their sum if the fold started with 0, else the larger one.
#[inline(always)]
fn combine(start: f32, a: f32, b: f32) -> f32 {
    if start == 0.0 { a + b } else { a.max(b) }
}

vectorized! {
    fn largest_of(logits: &[f32], classes: usize, largest: &mut [f32]) {
        for (row, largest) in logits.chunks_exact(classes).zip(largest) {
            *largest = fold(row, f32::NEG_INFINITY, f32::max);
        }
    }
}

/// The sums of a row over the classes of a rank. If the classes are split over ranks, the ranks add these up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// The sum of `exp(logit - largest logit)`.
    pub exponentials: f32,
    /// The logit of the target; 0 if the target is not on this rank.
    pub target: f32,
    /// The sum of the logits; 0 without label smoothing.
    pub logits: f32,
}

vectorized! {
    fn sums_of(
        logits: &[f32], classes: usize, largest: &[f32], targets: &[Option<usize>], smooth: bool, sums: &mut [Sums],
    ) {
        let rows = logits.chunks_exact(classes).zip(largest).zip(targets);
        for (((row, largest), target), sums) in rows.zip(sums) {
            *sums = Sums {
                exponentials: fold(row, 0.0, |sum, x| sum + exp(x - largest)),
                target: target.map_or(0.0, |target| row[target]),
                logits: if smooth { fold(row, 0.0, |sum, x| sum + x) } else { 0.0 },
            };
        }
    }
}

vectorized! {
    fn gradients_of(
        logits: &mut [f32], classes: usize, largest: &[f32], sums: &[Sums], targets: &[Option<usize>],
        scales: &[f32], off: f32, on: f32,
    ) {
        let rows = logits.chunks_exact_mut(classes).zip(largest).zip(sums).zip(targets).zip(scales);
        for ((((row, largest), sums), target), scale) in rows {
            let (factor, off) = (scale / sums.exponentials, scale * off);
            for x in row.iter_mut() {
                *x = exp(*x - largest).mul_add(factor, -off);
            }
            if let Some(target) = target {
                row[*target] -= scale * on;
            }
        }
    }
}

/// Writes the largest logit of each row of `logits` `[rows, classes]` to `largest` `[rows]`.
///
/// # Panics
/// If a slice does not have the length of its shape.
pub fn largest(logits: &[f32], classes: usize, largest: &mut [f32]) {
    assert_eq!(logits.len(), largest.len() * classes, "logits must have {classes} classes per row");
    let rows = rows_of_chunk(classes);
    for_chunks(largest, rows, |index, largest| {
        largest_of(&logits[index * rows * classes..][..largest.len() * classes], classes, largest);
    });
}

/// Writes the sums of each row of `logits` `[rows, classes]` to `sums` `[rows]`. `largest` `[rows]` are the largest
/// logits over all ranks, and `targets` `[rows]` the target classes, `None` if the target is not on this rank.
/// `smooth` says whether the sum of the logits is needed: with label smoothing.
///
/// # Panics
/// If a slice does not have the length of its shape, or a target is not below `classes`.
pub fn sums(
    logits: &[f32],
    classes: usize,
    largest: &[f32],
    targets: &[Option<usize>],
    smooth: bool,
    sums: &mut [Sums],
) {
    assert!(
        largest.len() == sums.len() && targets.len() == sums.len(),
        "largest, targets and sums must have as many rows"
    );
    assert_eq!(logits.len(), sums.len() * classes, "logits must have {classes} classes per row");
    let rows = rows_of_chunk(classes);
    for_chunks(sums, rows, |index, sums| {
        let begin = index * rows;
        let logits = &logits[begin * classes..][..sums.len() * classes];
        let (largest, targets) = (&largest[begin..][..sums.len()], &targets[begin..][..sums.len()]);
        sums_of(logits, classes, largest, targets, smooth, sums);
    });
}

impl Sums {
    /// The loss of a row, with label smoothing `smoothing`. `self` are the sums over all ranks, `largest` is the
    /// row's largest logit, and `classes` counts the classes of all ranks.
    pub fn loss(&self, largest: f32, smoothing: f32, classes: usize) -> f64 {
        let mean = f64::from(self.logits) / classes as f64;
        let smoothing = f64::from(smoothing);
        // The largest logit is subtracted first for precision: all logits may be far from 0.
        f64::from(self.exponentials.ln())
            + (1.0 - smoothing) * (f64::from(largest) - f64::from(self.target))
            + smoothing * (f64::from(largest) - mean)
    }
}

/// The backward pass: computes the gradients of logits.
#[derive(Debug, Clone, Copy)]
pub struct Backward<'a> {
    /// Classes on this rank.
    pub classes: usize,
    /// Classes on all ranks.
    pub all_classes: usize,
    /// The label smoothing, 0 for none.
    pub smoothing: f32,
    /// The largest logit of each row over all ranks, `[rows]`.
    pub largest: &'a [f32],
    /// The sums of each row over all ranks, `[rows]`.
    pub sums: &'a [Sums],
    /// The target class of each row, `[rows]`; `None` if it is not on this rank.
    pub targets: &'a [Option<usize>],
    /// The gradient of each row's loss, `[rows]`: 0 for a row that is ignored.
    pub scales: &'a [f32],
}

impl Backward<'_> {
    /// Replaces `logits` `[rows, classes]` by their gradients.
    ///
    /// # Panics
    /// If a slice does not have the length of its shape, or a target is not below `classes`.
    pub fn run(&self, logits: &mut [f32]) {
        let (classes, rows) = (self.classes, rows_of_chunk(self.classes));
        assert_eq!(logits.len(), self.targets.len() * classes, "logits must have {classes} classes per row");
        let (off, on) = (self.smoothing / self.all_classes.max(1) as f32, 1.0 - self.smoothing);
        for_chunks(logits, rows * classes, |index, logits| {
            let range = index * rows..index * rows + logits.len() / classes;
            gradients_of(
                logits,
                classes,
                &self.largest[range.clone()],
                &self.sums[range.clone()],
                &self.targets[range.clone()],
                &self.scales[range],
                off,
                on,
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, gradient_of, to_f64, values};
    use proptest::prelude::*;

    fn reference(row: &[f64], target: usize, smoothing: f64) -> f64 {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log = most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        log - (1.0 - smoothing) * row[target] - smoothing * mean
    }

    fn run(
        logits: &[f32],
        classes: usize,
        targets: &[Option<usize>],
        smoothing: f32,
        scales: &[f32],
    ) -> (Vec<f64>, Vec<f32>) {
        let rows = targets.len();
        let (mut most, mut all) = (vec![0.0; rows], vec![Sums::default(); rows]);
        largest(logits, classes, &mut most);
        sums(logits, classes, &most, targets, smoothing > 0.0, &mut all);
        let losses = (0..rows).map(|row| all[row].loss(most[row], smoothing, classes)).collect();
        let mut gradients = logits.to_vec();
        let backward = Backward {
            classes,
            all_classes: classes,
            smoothing,
            largest: &most,
            sums: &all,
            targets,
            scales,
        };
        backward.run(&mut gradients);
        (losses, gradients)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn agrees_with_f64_and_with_finite_differences(
            rows in 1usize..6, classes in 2usize..150, smoothing in prop::sample::select(vec![0.0f32, 0.1]),
            far in -50f32..50.0, seed: u64,
        ) {
            let logits: Vec<f32> = values(seed, rows * classes, 3.0).iter().map(|x| x + far).collect();
            let target = |row: usize| Some((seed as usize).wrapping_add(row * 7) % classes);
            let targets: Vec<Option<usize>> = (0..rows).map(target).collect();
            let scales = values(seed ^ 1, rows, 1.0);
            let (losses, gradients) = run(&logits, classes, &targets, smoothing, &scales);
            let smooth = f64::from(smoothing);
            for (row, x) in logits.chunks(classes).enumerate() {
                let (x, target) = (to_f64(x), targets[row].unwrap());
                let expected = reference(&x, target, smooth);
                let error = (losses[row] - expected).abs();
                prop_assert!(error < 2e-5 * expected.abs().max(1.0), "{} {}", losses[row], expected);
                let slope = gradient_of(|x| reference(x, target, smooth), &x);
                let scale = f64::from(scales[row]);
                close(&gradients[row * classes..][..classes], slope.iter().map(|g| g * scale), 1e-5);
            }
        }
    }

    #[test]
    fn ignored_rows_have_no_gradient_and_large_logits_do_not_overflow() {
        let logits = [1e4f32, -1e4, 0.0, 3.0, 1.0, 2.0];
        let (losses, gradients) = run(&logits, 3, &[Some(1), None], 0.0, &[1.0, 0.0]);
        assert_eq!(losses[0], 2e4);
        assert_eq!(gradients, [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
