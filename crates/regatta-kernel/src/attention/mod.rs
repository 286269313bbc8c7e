//! Multi-head attention, forward and backward in tiles, so the matrix of scores is never stored as a whole (Dao et
//! al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2"; the softmax in one pass is from Milakov & Gimelshein
//! 2018, "Online normalizer calculation for softmax").
//!
//! Queries are multiplied with one block of keys at a time. For each query the largest score so far and the sum of
//! exponentials are kept, and the weighted sum of values is scaled down when a larger score is found. Forward returns
//! the logarithm of the sum, from which backward recomputes the weights of any tile. Temporary memory is linear in
//! the number of queries and keys. Scores that a causal mask hides are not computed, except in blocks on the
//! diagonal.
//!
//! ```
//! use regatta_kernel::attention::{Attention, Operands};
//! // One head, two tokens, causal. The operands are `[batch, time, 3 * heads * width]` with a width of 1.
//! let attention =
//!     Attention { batch: 1, heads: 1, time: 2, seen: 2, width: 1, past: Some(0), hidden: None, dropout: None };
//! let operands = [0.0, 0.0, 4.0, 0.0, 0.0, 6.0];
//! let (output, sums) = attention.forward(&Operands::Fused(&operands));
//! // The first token sees only itself; the second sees both with equal weights.
//! assert_eq!(output, [4.0, 5.0]);
//! let gradients = attention.backward(&Operands::Fused(&operands), [&output, &sums, &[1.0, 1.0]]);
//! assert_eq!(gradients[0].len(), operands.len());
//! ```

mod backward;
mod forward;
mod pack;
mod product;
mod softmax;
#[cfg(test)]
mod tests;
mod view;

use crate::dropout::SampleRows;
use crate::random::Stream;
use pulp::{Arch, WithSimd};
use rayon::prelude::*;
use softmax::WeightDropout;
pub use view::{Operands, Strides, View};
use view::{Rows, Target, UninitBuffer};

/// Attention of `time` queries to `seen` keys in each of `heads` heads: `softmax(q k^T / sqrt(width)) v`. The fields
/// are the sizes and options of a call.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Number of sequences.
    pub batch: usize,
    /// Heads per sequence.
    pub heads: usize,
    /// Queries per sequence.
    pub time: usize,
    /// Keys and values per sequence.
    pub seen: usize,
    /// Elements of a query, a key or a value.
    pub width: usize,
    /// `Some` for a causal mask: query `i` sees the keys `0..=past + i`, as with `past` earlier keys. `None`: every
    /// query sees every key.
    pub past: Option<usize>,
    /// A further mask `[time, seen]`: `true` hides a key from a query. A query that sees no keys gets zeros.
    pub hidden: Option<&'a [bool]>,
    /// Dropout of weights.
    pub dropout: Option<Dropout>,
}

/// Dropout: sets weights to 0 with probability `rate`, and scales the others by `1 / (1 - rate)`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The random numbers. Number `i` decides about weight `i` of `[samples, all heads, time, seen]`.
    pub stream: Stream,
    /// Which samples of the global batch are the sequences.
    pub rows: SampleRows,
    /// The probability that a weight is dropped.
    pub rate: f64,
    /// Index of the first head among all heads of the model, which may be split over ranks.
    pub first: usize,
    /// The number of all heads.
    pub all: usize,
}

/// The operands and options of one head of one sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    time: usize,
    seen: usize,
    width: usize,
    past: Option<usize>,
    hidden: Option<&'a [bool]>,
    dropout: Option<WeightDropout>,
    queries: Rows<'a>,
    keys: Rows<'a>,
    values: Rows<'a>,
}

impl Head<'_> {
    /// How many keys query `i` sees. Padding after the last query sees as many keys as the last query.
    #[inline(always)]
    fn visible(&self, i: usize) -> usize {
        self.past.map_or(self.seen, |past| self.seen.min(past + 1 + i.min(self.time - 1)))
    }

    /// The factor for queries. It includes log2(e), so that scores are exponents of 2, which are faster than those of
    /// e.
    fn scale(&self) -> f32 {
        (std::f64::consts::LOG2_E / (self.width as f64).sqrt()) as f32
    }
}

impl Attention<'_> {
    /// Floating-point operations of forward; backward takes 2.5 times as many. Scores that the causal mask hides do
    /// not count.
    pub fn flops(&self) -> f64 {
        let scores: usize = match self.past {
            Some(past) => (0..self.time).map(|i| self.seen.min(past + 1 + i)).sum(),
            None => self.time * self.seen,
        };
        4.0 * (self.batch * self.heads * self.width) as f64 * scores as f64
    }

    /// Returns the output `[batch, time, heads * width]`, and for [`Self::backward`] the logarithms of the sums of
    /// exponentials of each query's scores, `[batch, heads, time]`.
    ///
    /// # Panics
    /// If an operand is too short, or if there are not as many queries as keys with [`Operands::Fused`].
    pub fn forward(&self, operands: &Operands<'_>) -> (Vec<f32>, Vec<f32>) {
        self.forward_on(Arch::new(), operands)
    }

    fn forward_on(&self, unit: impl Unit, operands: &Operands<'_>) -> (Vec<f32>, Vec<f32>) {
        let views = operands.views(self);
        let mut output = UninitBuffer::new(self.batch * self.time * self.heads * self.width);
        let mut sums = UninitBuffer::new(self.batch * self.heads * self.time);
        let of_output = Target::new(&mut output, 0, self.output_strides(), self.width);
        let of_sums = Target::new(&mut sums, 0, Strides::apart(self.heads, self.time, 1), 1);
        self.for_each_head(1.0, |batch, head| {
            // SAFETY: only this call accesses this batch and head, and the buffers live until the end of the function.
            let (output, sums) = unsafe { (of_output.rows(batch, head), of_sums.rows(batch, head)) };
            unit.run(forward::Forward { head: self.head(&views, batch, head), output, sums });
        });
        // SAFETY: the rows of all heads are the whole buffers, and forward writes each row.
        unsafe { (output.assume_init(), sums.assume_init()) }
    }

    /// Returns the gradients of the operands: one vector per slice of `operands`, in its layout. With
    /// [`Operands::Apart`] they are `[batch, heads, time, width]` (`seen` instead of `time` for keys and values).
    /// `given` are the output and the sums that [`Self::forward`] returned, and the gradient of the output.
    ///
    /// # Panics
    /// As [`Self::forward`], and if a slice in `given` is too short.
    pub fn backward(&self, operands: &Operands<'_>, given: [&[f32]; 3]) -> Vec<Vec<f32>> {
        self.backward_on(Arch::new(), operands, given)
    }

    fn backward_on(
        &self,
        unit: impl Unit,
        operands: &Operands<'_>,
        [output, sums, gradient]: [&[f32]; 3],
    ) -> Vec<Vec<f32>> {
        let views = operands.views(self);
        let output = View::new(output, self.output_strides()).checked(self, self.time);
        let gradient = View::new(gradient, self.output_strides()).checked(self, self.time);
        assert_eq!(
            sums.len(),
            self.batch * self.heads * self.time,
            "the sums must have batch * heads * time elements"
        );
        let (gradients, targets) = operands.gradients(self);
        self.for_each_head(2.5, |batch, head| {
            // SAFETY: only this call accesses this batch and head, the targets are different parts of their buffers,
            // and the buffers live until the end of the function.
            let targets = targets.each_ref().map(|target| unsafe { target.rows(batch, head) });
            let begin = (batch * self.heads + head) * self.time;
            unit.run(backward::Backward {
                head: self.head(&views, batch, head),
                output: output.rows(batch, head),
                gradient: gradient.rows(batch, head),
                sums: &sums[begin..begin + self.time],
                targets,
            });
        });
        // SAFETY: the rows of all heads of all targets are the whole buffers, and backward writes each row.
        gradients.into_iter().map(|gradient| unsafe { gradient.assume_init() }).collect()
    }

    /// The strides of `[batch, time, heads * width]`.
    fn output_strides(&self) -> Strides {
        Strides::projected(self.time, 1, self.heads, self.width)
    }

    fn head<'b>(&'b self, [queries, keys, values]: &[View<'b>; 3], batch: usize, head: usize) -> Head<'b> {
        let dropout = self.dropout.filter(|dropout| dropout.rate > 0.0).map(|dropout| {
            let index = dropout.rows.sample(batch) * dropout.all + dropout.first + head;
            WeightDropout::new(dropout.stream, dropout.rate, (index * self.time * self.seen) as u64)
        });
        Head {
            time: self.time,
            seen: self.seen,
            width: self.width,
            past: self.past,
            hidden: self.hidden,
            dropout,
            queries: queries.rows(batch, head),
            keys: keys.rows(batch, head),
            values: values.rows(batch, head),
        }
    }

    /// Runs `body` for every batch and head, on all threads if there is enough work.
    fn for_each_head(&self, factor: f64, body: impl Fn(usize, usize) + Sync) {
        // Floating-point operations that a thread executes in about the time in which another one wakes up.
        const MIN_PARALLEL: f64 = 1e6;
        let heads = self.batch * self.heads;
        if heads < 2 || self.flops() * factor < MIN_PARALLEL || rayon::current_num_threads() == 1 {
            (0..heads).for_each(|index| body(index / self.heads, index % self.heads));
        } else {
            (0..heads).into_par_iter().for_each(|index| body(index / self.heads, index % self.heads));
        }
    }
}

/// A vector unit that runs work.
trait Unit: Copy + Sync {
    fn run(self, work: impl WithSimd<Output = ()>);
}

/// The best vector unit of the machine.
impl Unit for Arch {
    fn run(self, work: impl WithSimd<Output = ()>) {
        self.dispatch(work);
    }
}
