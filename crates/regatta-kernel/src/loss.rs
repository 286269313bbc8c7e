//! Softmax cross entropy over classes that may be split over ranks, without probabilities in memory.
//!
//! `loss = log(sum(exp(x))) - (1 - s) x[target] - s mean(x)` with label smoothing `s` (Szegedy et al. 2016, "Rethinking the
//! Inception Architecture", section 7). Where classes are split, a rank has [`Sums`] of its own classes and the ranks add
//! them; the largest logit of a row must be known to all before.

use crate::math::exp;
use crate::parallel::{for_chunks, rows_of_chunk};
use crate::simd::vectorized;

const LANES: usize = 64;

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
    while len > 16 {
        len /= 2;
        for i in 0..len {
            lanes[i] = combine(start, lanes[i], lanes[i + len]);
        }
    }
    lanes[..16].iter().fold(start, |a, b| combine(start, a, *b))
}

/// Sums where folding began with 0 and else takes the larger one.
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

/// What ranks add up over a split vocabulary, of each row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Of the exponentials of the logits less the largest one.
    pub exponentials: f32,
    /// The target's logit, where it is here.
    pub target: f32,
    /// Of the logits.
    pub logits: f32,
}

vectorized! {
    fn sums_of(logits: &[f32], classes: usize, largest: &[f32], targets: &[Option<usize>], smooth: bool, sums: &mut [Sums]) {
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

/// The largest logit of each row of `logits` `[rows, classes]`.
pub fn largest(logits: &[f32], classes: usize, largest: &mut [f32]) {
    assert_eq!(logits.len(), largest.len() * classes, "{classes} classes a row");
    let rows = rows_of_chunk(classes);
    for_chunks(largest, rows, |index, largest| {
        largest_of(&logits[index * rows * classes..][..largest.len() * classes], classes, largest);
    });
}

/// The sums of each row of `logits` `[rows, classes]`; `smooth` says whether the sum of the logits is needed.
pub fn sums(
    logits: &[f32],
    classes: usize,
    largest: &[f32],
    targets: &[Option<usize>],
    smooth: bool,
    sums: &mut [Sums],
) {
    assert!(largest.len() == sums.len() && targets.len() == sums.len(), "as many rows");
    assert_eq!(logits.len(), sums.len() * classes, "{classes} classes a row");
    let rows = rows_of_chunk(classes);
    for_chunks(sums, rows, |index, sums| {
        let begin = index * rows;
        let logits = &logits[begin * classes..][..sums.len() * classes];
        let (largest, targets) = (&largest[begin..][..sums.len()], &targets[begin..][..sums.len()]);
        sums_of(logits, classes, largest, targets, smooth, sums);
    });
}

impl Sums {
    /// The loss of a row over `classes` classes on all ranks.
    pub fn loss(&self, largest: f32, smoothing: f32, classes: usize) -> f64 {
        let mean = f64::from(self.logits) / classes as f64;
        let smoothing = f64::from(smoothing);
        // The logits less the largest first: they may be far from 0 together.
        f64::from(self.exponentials.ln())
            + (1.0 - smoothing) * (f64::from(largest) - f64::from(self.target))
            + smoothing * (f64::from(largest) - mean)
    }
}

/// The gradient of the logits.
#[derive(Debug, Clone, Copy)]
pub struct Backward<'a> {
    /// Classes on this rank.
    pub classes: usize,
    /// Classes on all ranks.
    pub all_classes: usize,
    /// Label smoothing.
    pub smoothing: f32,
    /// Of each row, its largest logit.
    pub largest: &'a [f32],
    /// Of each row, its sums over all ranks.
    pub sums: &'a [Sums],
    /// Of each row, its class, where that is on this rank.
    pub targets: &'a [Option<usize>],
    /// Of each row, the gradient of its loss: 0 where it counts for nothing.
    pub scales: &'a [f32],
}

impl Backward<'_> {
    /// Turns logits into their gradients, in place.
    pub fn run(&self, logits: &mut [f32]) {
        let (classes, rows) = (self.classes, rows_of_chunk(self.classes));
        assert_eq!(logits.len(), self.targets.len() * classes, "{classes} classes a row");
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
    use crate::testing::{close, gradient_of, values, wide};
    use proptest::prelude::*;

    fn plain(row: &[f64], target: usize, smoothing: f64) -> f64 {
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
            rows in 1usize..6, classes in 2usize..150, smoothing in prop::sample::select(vec![0.0f32, 0.1]), far in -50f32..50.0, seed: u64,
        ) {
            let logits: Vec<f32> = values(seed, rows * classes, 3.0).iter().map(|x| x + far).collect();
            let targets: Vec<Option<usize>> = (0..rows).map(|row| Some((seed as usize).wrapping_add(row * 7) % classes)).collect();
            let scales = values(seed ^ 1, rows, 1.0);
            let (losses, gradients) = run(&logits, classes, &targets, smoothing, &scales);
            let smooth = f64::from(smoothing);
            for (row, x) in logits.chunks(classes).enumerate() {
                let (x, target) = (wide(x), targets[row].unwrap());
                let wanted = plain(&x, target, smooth);
                prop_assert!((losses[row] - wanted).abs() < 2e-5 * wanted.abs().max(1.0), "{} {}", losses[row], wanted);
                let slope = gradient_of(|x| plain(x, target, smooth), &x);
                let scale = f64::from(scales[row]);
                close(&gradients[row * classes..][..classes], slope.iter().map(|g| g * scale), 1e-5);
            }
        }
    }

    #[test]
    fn rows_that_count_for_nothing_have_no_gradient_and_large_logits_are_no_trouble() {
        let logits = [1e4f32, -1e4, 0.0, 3.0, 1.0, 2.0];
        let (losses, gradients) = run(&logits, 3, &[Some(1), None], 0.0, &[1.0, 0.0]);
        assert_eq!(losses[0], 2e4);
        assert_eq!(gradients, [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
