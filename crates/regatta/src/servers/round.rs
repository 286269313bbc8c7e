//! What workers have pushed to a server and what is not applied yet.

use super::shard::Shard;
use crate::error::{Error, Result};
use regatta_comm::Message;

/// The gradients of one step of every worker, by worker and unit. A worker pushes its next step only after the servers have
/// answered this one, so there is never more than this in memory.
pub(crate) struct Round {
    pushed: Vec<Vec<Option<Message>>>,
    /// By unit: the mean over the workers, where all have pushed.
    mean: Vec<Vec<f32>>,
    /// Units of which the mean is there.
    whole: usize,
    squares: f64,
    /// The first worker whose gradients of this step are not finite.
    not_finite: Option<usize>,
}

impl Round {
    pub(crate) fn new(workers: usize, units: usize) -> Self {
        let pushed = (0..workers).map(|_| (0..units).map(|_| None).collect()).collect();
        Self { pushed, mean: vec![vec![]; units], whole: 0, squares: 0.0, not_finite: None }
    }

    /// Keeps what a worker has pushed of a unit.
    ///
    /// # Errors
    /// It is not a part of a unit, or comes a second time.
    pub(crate) fn keep(&mut self, shard: &Shard, worker: usize, unit: usize, message: Message) -> Result<()> {
        let wrong = |what: String| Error::Usage(format!("worker {worker} pushed {what}"));
        let len = message.numbers::<f32>()?.len();
        if unit >= shard.units() || len != shard.part(unit) {
            return Err(wrong(format!("{len} numbers of unit {unit}: it has another model")));
        }
        let place = &mut self.pushed[worker][unit];
        if place.is_some() {
            return Err(wrong(format!("unit {unit} twice in a step")));
        }
        *place = Some(message);
        Ok(())
    }

    /// Takes what `worker` has pushed of a unit.
    pub(crate) fn take(&mut self, worker: usize, unit: usize) -> Option<Message> {
        self.pushed[worker][unit].take()
    }

    /// Forgets what `worker` has pushed, and the means.
    pub(crate) fn discard(&mut self, worker: usize) {
        self.pushed[worker].fill_with(|| None);
        self.clear();
    }

    /// Forgets the means.
    pub(crate) fn clear(&mut self) {
        (self.whole, self.squares, self.not_finite) = (0, 0.0, None);
    }

    /// Makes the mean of a unit, if all workers have pushed it. The order is the workers', so that the same gradients have the
    /// same mean. Returns, once the means of all units are there, their sum of squares and the first worker whose gradients are
    /// not finite.
    pub(crate) fn combine(&mut self, shard: &Shard, unit: usize) -> Result<Option<(f64, Option<usize>)>> {
        if self.pushed.iter().any(|units| units[unit].is_none()) {
            return Ok(None);
        }
        let pushed: Vec<Message> = self.pushed.iter_mut().filter_map(|units| units[unit].take()).collect();
        let gradients = pushed.iter().map(|message| message.numbers::<f32>());
        let gradients = gradients.collect::<Result<Vec<&[f32]>, _>>()?;
        let mean = &mut self.mean[unit];
        mean_of(&gradients, mean);
        let squares = shard.squares(unit, mean);
        if !squares.is_finite() {
            let culprit = gradients.iter().position(|gradients| !is_finite(gradients));
            self.not_finite = [self.not_finite, culprit].into_iter().flatten().min();
        }
        self.squares += squares;
        self.whole += 1;
        Ok((self.whole == shard.units()).then_some((self.squares, self.not_finite)))
    }

    /// The first worker that has not pushed what another one has; or the first of all, which has not said what is to become of
    /// the means.
    pub(crate) fn awaited(&self) -> Option<usize> {
        let lacks = |worker: &usize| {
            let lacking = (0..self.mean.len()).filter(|&unit| self.pushed[*worker][unit].is_none());
            lacking.into_iter().any(|unit| self.pushed.iter().any(|units| units[unit].is_some()))
        };
        (0..self.pushed.len()).find(lacks).or((self.whole == self.mean.len()).then_some(0))
    }

    /// The mean of a unit.
    pub(crate) fn mean(&self, unit: usize) -> &[f32] {
        &self.mean[unit]
    }

    /// The worker whose gradients may not be applied, because they are not finite.
    pub(crate) fn refused(&self) -> Option<usize> {
        self.not_finite
    }
}

/// Writes the mean of `all` into `mean`, added in their order.
fn mean_of(all: &[&[f32]], mean: &mut Vec<f32>) {
    let part = 1.0 / all.len() as f32;
    mean.clear();
    match all {
        [] => {}
        [one] => mean.extend_from_slice(one),
        [one, two] => mean.extend(one.iter().zip(*two).map(|(one, two)| (one + two) * part)),
        [one, two, rest @ .., last] => {
            mean.extend(one.iter().zip(*two).map(|(one, two)| one + two));
            for more in rest {
                mean.iter_mut().zip(*more).for_each(|(mean, more)| *mean += more);
            }
            mean.iter_mut().zip(*last).for_each(|(mean, last)| *mean = (*mean + last) * part);
        }
    }
}

/// Whether all numbers are finite.
pub(crate) fn is_finite(numbers: &[f32]) -> bool {
    // Without a branch for each number, so that it is vectorised: what is not finite has all bits of the exponent.
    const EXPONENT: u32 = 0x7f80_0000;
    numbers.chunks(1024).all(|some| {
        !some.iter().fold(false, |found, number| found | (number.to_bits() & EXPONENT == EXPONENT))
    })
}

#[cfg(test)]
mod tests {
    use super::{is_finite, mean_of};

    #[test]
    fn the_mean_is_that_of_all() {
        for count in 1..6 {
            let all: Vec<Vec<f32>> =
                (0..count).map(|of| (0..37).map(|i| (of * 7 + i) as f32).collect()).collect();
            let all: Vec<&[f32]> = all.iter().map(Vec::as_slice).collect();
            let mut mean = vec![9.0; 3];
            mean_of(&all, &mut mean);
            let right = |i: usize| all.iter().map(|of| of[i]).sum::<f32>() / count as f32;
            assert!((0..37).all(|i| (mean[i] - right(i)).abs() <= 1e-5 * right(i)), "{mean:?}");
        }
    }

    #[test]
    fn one_number_that_is_not_finite_is_found() {
        let mut numbers = vec![f32::MAX; 3000];
        assert!(is_finite(&numbers) && is_finite(&[]));
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            numbers[2999] = wrong;
            assert!(!is_finite(&numbers));
        }
    }
}
