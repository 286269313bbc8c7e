//! A few numbers of many.

use super::coder::{Coder, Turn};
use crate::error::Result;
use regatta_comm::{Group, ReduceOp};
use regatta_kernel::compress::sparse;
use regatta_plan::Compress;

pub(super) struct Sparse<'a> {
    workers: &'a Group,
    compress: Compress,
}

impl<'a> Sparse<'a> {
    pub(super) fn new(coder: &'a Coder) -> Self {
        Self { workers: &coder.workers, compress: coder.compress }
    }

    /// Each worker sends its largest numbers to all: `millionths` of them. Replaces `numbers` by the mean of what was sent, and
    /// `unsent` by what was not.
    pub(super) fn largest(&self, millionths: u32, numbers: &mut [f32], unsent: &mut [f32]) -> Result<()> {
        let count = Compress { millionths, ..self.compress }.count(numbers.len());
        let size = self.workers.size();
        let places = sparse::largest(numbers, count);
        let mut own = vec![0u8; sparse::BYTES * count];
        sparse::take(numbers, &places, &mut own);
        unsent.copy_from_slice(numbers);
        let mut all = vec![0u8; own.len() * size];
        self.workers.all_gather(&own, &mut all)?;
        numbers.fill(0.0);
        for encoded in all.chunks(own.len()) {
            sparse::add(encoded, 1.0 / size as f32, numbers);
        }
        Ok(())
    }

    /// All workers send the numbers at the same places. Replaces `numbers` by their mean, and `unsent` by the others.
    pub(super) fn random(&self, turn: Turn, numbers: &mut [f32], unsent: &mut [f32]) -> Result<()> {
        let places = sparse::random(numbers.len(), self.compress.count(numbers.len()), turn.random());
        let is_finite = numbers.iter().all(|x| x.is_finite());
        let mut some: Vec<f32> =
            places.iter().map(|&place| std::mem::take(&mut numbers[place as usize])).collect();
        if let (false, Some(first)) = (is_finite, some.first_mut()) {
            // The others hear of it now, and not when its place comes up.
            *first = f32::NAN;
        }
        unsent.copy_from_slice(numbers);
        self.workers.all_reduce(&mut some, ReduceOp::Mean)?;
        numbers.fill(0.0);
        places.iter().zip(&some).for_each(|(&place, x)| numbers[place as usize] = *x);
        Ok(())
    }
}
