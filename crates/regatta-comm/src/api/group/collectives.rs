//! The operations, as calls that return when they are done.

use super::Group;
use crate::error::{Error, Result};
use crate::execution::operation::Operation;
use crate::execution::operations::Caller;
use crate::numbers::element::{DType, Element, Reduction};
use crate::numbers::sized::filled;

impl Group {
    /// Takes its turn behind everything submitted with a handle.
    pub(super) fn turn(&self) -> Caller<'_> {
        self.inner.queue.drain();
        self.core().waiting()
    }

    /// Leaves the reduction of all ranks' `data` in everyone's: the same bits on every rank. After an error its
    /// contents are unspecified, as those of every output here.
    ///
    /// # Errors
    /// A rank that died, stalled or called something else; a reduction that does not suit the type.
    pub fn all_reduce<T: Element>(&self, data: &mut [T], reduction: impl Into<Reduction>) -> Result<()> {
        self.turn().in_place(&Operation::all_reduce(reduction), data)
    }

    /// [`all_reduce`](Self::all_reduce) of `input` into `output`, which are equally long.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_to<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        reduction: impl Into<Reduction>,
    ) -> Result<()> {
        if input.len() != output.len() {
            return Err(Error::Usage(format!(
                "all_reduce: {} elements in, but {} out",
                input.len(),
                output.len()
            )));
        }
        output.copy_from_slice(input);
        self.all_reduce(output, reduction)
    }

    /// Leaves the reduction of all ranks' `data` in that of rank `root`; the others keep theirs.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); a root that is no rank.
    pub fn reduce<T: Element>(
        &self,
        data: &mut [T],
        reduction: impl Into<Reduction>,
        root: usize,
    ) -> Result<()> {
        self.turn().in_place(&Operation::reduce(reduction, root), data)
    }

    /// Leaves the reduction of everyone's `rank`-th part of `input` in `output`. `input` has `size()` parts as
    /// long as `output`.
    ///
    /// # Errors
    /// Lengths that do not fit; else as [`all_reduce`](Self::all_reduce).
    pub fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        reduction: impl Into<Reduction>,
    ) -> Result<()> {
        self.turn().move_numbers(&Operation::reduce_scatter(reduction), Some(input), Some(output))
    }

    /// [`reduce_scatter`](Self::reduce_scatter) where the part of rank r has `counts[r]` elements; all ranks give the
    /// same counts.
    ///
    /// # Errors
    /// As [`reduce_scatter`](Self::reduce_scatter).
    pub fn reduce_scatter_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        reduction: impl Into<Reduction>,
    ) -> Result<()> {
        let operation = Operation::reduce_scatter(reduction).counts(counts);
        self.turn().move_numbers(&operation, Some(input), Some(output))
    }

    /// Gathers everyone's `input` into everyone's `output`, in the order of ranks. `output` is `size()` times as
    /// long as `input`.
    ///
    /// # Errors
    /// Lengths that do not fit; else as [`all_reduce`](Self::all_reduce).
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.turn().move_numbers(&Operation::all_gather(), Some(input), Some(output))
    }

    /// [`all_gather`](Self::all_gather) where this rank's part is already in its place in `data`.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn all_gather_in_place<T: Element>(&self, data: &mut [T]) -> Result<()> {
        self.turn().in_place(&Operation::all_gather(), data)
    }

    /// [`all_gather`](Self::all_gather) where rank r gives `counts[r]` elements; all ranks give the same counts.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn all_gather_v<T: Element>(&self, input: &[T], output: &mut [T], counts: &[usize]) -> Result<()> {
        self.turn().move_numbers(&Operation::all_gather().counts(counts), Some(input), Some(output))
    }

    /// Everyone's `input`, of lengths that nobody need know before: two operations.
    ///
    /// # Errors
    /// Lengths that this machine's memory cannot hold, which end the job; else as [`all_reduce`](Self::all_reduce).
    pub fn all_gather_vec<T: Element>(&self, input: &[T]) -> Result<Vec<Vec<T>>> {
        let mut lengths = vec![0i64; self.size()];
        self.all_gather(&[input.len() as i64], &mut lengths)?;
        // The others wait in the second operation for a rank that cannot take part.
        let give_up = |error: Error| self.core().job.give_up(&error.to_string());
        let (counts, mut all) = announced::<T>(&lengths).map_err(give_up)?;
        self.all_gather_v(input, &mut all, &counts)?;
        let mut rest = all.as_slice();
        let mut take = |count| {
            let (part, more) = rest.split_at(count);
            rest = more;
            part.to_vec()
        };
        Ok(counts.into_iter().map(&mut take).collect())
    }

    /// Copies `data` of rank `root` to everyone.
    ///
    /// # Errors
    /// A root that is no rank; else as [`all_reduce`](Self::all_reduce).
    pub fn broadcast<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        self.turn().in_place(&Operation::broadcast(root), data)
    }

    /// Gathers everyone's `input` into the `output` of rank `root`, in the order of ranks; that of the others is not
    /// touched and may be empty.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn gather<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.turn().move_numbers(&Operation::gather(root), Some(input), Some(output))
    }

    /// [`gather`](Self::gather) where rank r gives `counts[r]` elements; all ranks give the same counts.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn gather_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        self.turn().move_numbers(&Operation::gather(root).counts(counts), Some(input), Some(output))
    }

    /// Copies the parts of the `input` of rank `root` to everyone's `output`, in the order of ranks; the input of the
    /// others is not read and may be empty.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn scatter<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.turn().move_numbers(&Operation::scatter(root), Some(input), Some(output))
    }

    /// [`scatter`](Self::scatter) where rank r gets `counts[r]` elements; all ranks give the same counts.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn scatter_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        self.turn().move_numbers(&Operation::scatter(root).counts(counts), Some(input), Some(output))
    }

    /// Sends the r-th part of `input` to rank r, and receives the r-th part of `output` from it. Both have `size()`
    /// parts of one length.
    ///
    /// # Errors
    /// Lengths that do not fit; else as [`all_reduce`](Self::all_reduce).
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.turn().move_numbers(&Operation::all_to_all(), Some(input), Some(output))
    }

    /// [`all_to_all`](Self::all_to_all) where rank r is sent `sent[r]` elements and `received[r]` come from it.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all); two ranks that do not agree on the length between them.
    pub fn all_to_all_v<T: Element>(
        &self,
        input: &[T],
        sent: &[usize],
        output: &mut [T],
        received: &[usize],
    ) -> Result<()> {
        let operation = Operation::all_to_all_v(sent, received);
        self.turn().move_numbers(&operation, Some(input), Some(output))
    }

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&self) -> Result<()> {
        self.turn().run(&Operation::barrier(), DType::U8, None, None)
    }

    /// Sends `data` to rank `to`, which receives it by [`recv`](Self::recv) with the same type and length.
    ///
    /// # Errors
    /// This rank itself as the other; else as [`all_reduce`](Self::all_reduce).
    pub fn send<T: Element>(&self, data: &[T], to: usize) -> Result<()> {
        self.turn().move_numbers(&Operation::send(to), Some(data), None)
    }

    /// Receives `data` from rank `from`.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn recv<T: Element>(&self, data: &mut [T], from: usize) -> Result<()> {
        self.turn().in_place(&Operation::recv(from), data)
    }
}

/// The lengths that ranks have announced as counts, and memory for all of them.
fn announced<T: Element>(lengths: &[i64]) -> Result<(Vec<usize>, Vec<T>)> {
    let counts: Option<Vec<usize>> = lengths.iter().map(|&len| usize::try_from(len).ok()).collect();
    let sum = |counts: &Vec<usize>| counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
    let total = counts.as_ref().and_then(sum).unwrap_or(usize::MAX);
    let all = filled(total, T::zeroed(), &format!("what ranks announced to gather ({lengths:?})"))?;
    Ok((counts.unwrap_or_default(), all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_lengths_that_no_memory_holds_are_refused() {
        assert_eq!(announced::<u8>(&[2, 0, 3]).unwrap(), (vec![2, 0, 3], vec![0; 5]));
        for lengths in [[1, -1], [i64::MIN, 0], [i64::MAX, i64::MAX], [1 << 60, 1 << 60], [1 << 50, 0]] {
            let error = announced::<f64>(&lengths).unwrap_err().to_string();
            assert!(error.contains(&lengths[0].to_string()), "{error}");
        }
    }
}
