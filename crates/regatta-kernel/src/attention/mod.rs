//! Attention over heads, forward and backward in tiles: neither scores nor weights are ever whole in memory (Dao et al.
//! 2022, "FlashAttention"; Dao 2023, "FlashAttention-2"; the softmax in one pass is of Milakov & Gimelshein 2018).
//!
//! Queries are multiplied with a block of keys at a time; a query's largest score so far and its sum of exponentials are
//! kept, and what it has gathered of the values is scaled down when a larger score comes. Forward leaves the logarithm of
//! the sum, from which backward gets the weights of any tile again. Memory beside inputs and outputs is linear in the
//! number of queries and keys. Scores that a causal mask hides are not computed, but for those beside the diagonal.

mod backward;
mod forward;
mod pack;
mod product;
mod softmax;
#[cfg(test)]
mod tests;
mod view;

use crate::random::Stream;
use pulp::{Arch, WithSimd};
use rayon::prelude::*;
use softmax::Drops;
pub use view::{Operands, Strides, View};
use view::{Room, Rows, Target};

/// Attention of `time` queries to `seen` keys in each of `heads` heads: `softmax(q k^T / sqrt(width)) v`.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Sequences.
    pub batch: usize,
    /// Heads of each.
    pub heads: usize,
    /// Queries of each.
    pub time: usize,
    /// Keys and values of each.
    pub seen: usize,
    /// Numbers of a query, a key or a value.
    pub width: usize,
    /// Causal, where given: query `i` sees the keys `0..=past + i`. Else all see all.
    pub past: Option<usize>,
    /// Keys that are hidden from queries beside, `[time, seen]`. A query that sees nothing gets zeros.
    pub hidden: Option<&'a [bool]>,
    /// Drops some of the weights.
    pub dropout: Option<Dropout>,
}

/// Zeroes weights with probability `rate` and scales the others by `1 / (1 - rate)`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Its `i`-th number decides on the `i`-th weight of `[batch, all heads, time, seen]`.
    pub stream: Stream,
    /// The probability.
    pub rate: f64,
    /// The first of the heads, among all: there may be others elsewhere.
    pub first: usize,
    /// All heads.
    pub all: usize,
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Pair<'a> {
    time: usize,
    seen: usize,
    width: usize,
    past: Option<usize>,
    hidden: Option<&'a [bool]>,
    drops: Option<Drops>,
    queries: Rows<'a>,
    keys: Rows<'a>,
    values: Rows<'a>,
}

impl Pair<'_> {
    /// How many keys query `i` sees; those behind the last see as many as it.
    #[inline(always)]
    fn visible(&self, i: usize) -> usize {
        self.past.map_or(self.seen, |past| self.seen.min(past + 1 + i.min(self.time - 1)))
    }

    /// What a query is multiplied with, so that scores are exponents of two: faster than those of e.
    fn scale(&self) -> f32 {
        (std::f64::consts::LOG2_E / (self.width as f64).sqrt()) as f32
    }
}

impl Attention<'_> {
    /// Floating-point operations of forward; backward takes 2.5 times as many. Hidden scores that are not computed do
    /// not count.
    pub fn flops(&self) -> f64 {
        let scores: usize = match self.past {
            Some(past) => (0..self.time).map(|i| self.seen.min(past + 1 + i)).sum(),
            None => self.time * self.seen,
        };
        4.0 * (self.batch * self.heads * self.width) as f64 * scores as f64
    }

    /// What the queries gather of the values, `[batch, time, heads * width]`, and for [`Self::backward`] the logarithms of
    /// the sums of exponentials of their scores, `[batch, heads, time]`.
    ///
    /// # Panics
    /// If operands are shorter than the sizes say.
    pub fn forward(&self, operands: &Operands<'_>) -> (Vec<f32>, Vec<f32>) {
        self.forward_on(Arch::new(), operands)
    }

    fn forward_on(&self, unit: impl Unit, operands: &Operands<'_>) -> (Vec<f32>, Vec<f32>) {
        let views = operands.views(self);
        let mut output = Room::new(self.batch * self.time * self.heads * self.width);
        let mut sums = Room::new(self.batch * self.heads * self.time);
        let of_output = Target::new(&mut output, 0, self.side_by_side(), self.width);
        let of_sums = Target::new(&mut sums, 0, Strides::apart(self.heads, self.time, 1), 1);
        self.share(1.0, |batch, head| {
            // SAFETY: only this call has this batch and head, and the rooms are alive until below.
            let (output, sums) = unsafe { (of_output.rows(batch, head), of_sums.rows(batch, head)) };
            unit.run(forward::Forward { pair: self.pair(&views, batch, head), output, sums });
        });
        // SAFETY: all rows of all heads together are all there is, and forward writes each of them.
        unsafe { (output.written(), sums.written()) }
    }

    /// The gradients of the operands, each in its operand's layout (one that was in parts is `[batch, heads, time, width]`),
    /// from what is given: the output and the sums of [`Self::forward`], and the output's gradient.
    ///
    /// # Panics
    /// As [`Self::forward`].
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
        let output = View::new(output, self.side_by_side()).checked(self, self.time);
        let gradient = View::new(gradient, self.side_by_side()).checked(self, self.time);
        assert_eq!(sums.len(), self.batch * self.heads * self.time, "the sums of another attention");
        let (gradients, targets) = operands.gradients(self);
        self.share(2.5, |batch, head| {
            // SAFETY: only this call has this batch and head, the targets are different parts of their rooms, and these
            // are alive until below.
            let targets = targets.each_ref().map(|target| unsafe { target.rows(batch, head) });
            let begin = (batch * self.heads + head) * self.time;
            unit.run(backward::Backward {
                pair: self.pair(&views, batch, head),
                output: output.rows(batch, head),
                gradient: gradient.rows(batch, head),
                sums: &sums[begin..begin + self.time],
                targets,
            });
        });
        // SAFETY: all rows of all heads of all targets together are all there is, and backward writes each of them.
        gradients.into_iter().map(|gradient| unsafe { gradient.written() }).collect()
    }

    /// The layout `[batch, time, heads * width]`.
    fn side_by_side(&self) -> Strides {
        Strides::projected(self.time, 1, self.heads, self.width)
    }

    fn pair<'b>(&'b self, [queries, keys, values]: &[View<'b>; 3], batch: usize, head: usize) -> Pair<'b> {
        let drops = self.dropout.filter(|dropout| dropout.rate > 0.0).map(|dropout| {
            let index = batch * dropout.all + dropout.first + head;
            Drops::new(dropout.stream, dropout.rate, (index * self.time * self.seen) as u64)
        });
        Pair {
            time: self.time,
            seen: self.seen,
            width: self.width,
            past: self.past,
            hidden: self.hidden,
            drops,
            queries: queries.rows(batch, head),
            keys: keys.rows(batch, head),
            values: values.rows(batch, head),
        }
    }

    /// Runs `body` for every batch and head, on all threads where it is worth it.
    fn share(&self, factor: f64, body: impl Fn(usize, usize) + Sync) {
        // About what a thread does while it wakes.
        const SMALL: f64 = 1e6;
        let pairs = self.batch * self.heads;
        if pairs < 2 || self.flops() * factor < SMALL || rayon::current_num_threads() == 1 {
            (0..pairs).for_each(|pair| body(pair / self.heads, pair % self.heads));
        } else {
            (0..pairs).into_par_iter().for_each(|pair| body(pair / self.heads, pair % self.heads));
        }
    }
}

/// A vector unit.
trait Unit: Copy + Sync {
    fn run(self, work: impl WithSimd<Output = ()>);
}

/// The machine's best.
impl Unit for Arch {
    fn run(self, work: impl WithSimd<Output = ()>) {
        self.dispatch(work);
    }
}
