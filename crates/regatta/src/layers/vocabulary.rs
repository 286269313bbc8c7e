//! Token embedding and output projection over a vocabulary that may be split over ranks (Shoeybi et al. 2019, section 3).

use super::{ParamBuilder, Split};
use crate::autograd::{add_positions, cross_entropy, linear_by_rows, rows_of};
use burn::tensor::{Int, Tensor};
use std::ops::Range;

/// A vocabulary that may be split over the tensor axis. It has no parameters: its methods take the table of embeddings.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    split: Split,
    /// Tokens in the vocabulary.
    size: usize,
    /// The tokens that this rank holds.
    part: Range<usize>,
}

impl Vocabulary {
    /// A vocabulary of `size` tokens.
    pub fn new(params: &ParamBuilder, size: usize) -> Self {
        let split = params.split("vocab");
        Self { part: split.part(size), size, split }
    }

    /// The rows of `table` for `ids` `[batch, time]`, as `[batch, time, embed]`. `table` `[vocab, embed]` has the rows of
    /// this rank's tokens. In a region that is split by time, the result is this rank's part of the time.
    pub fn embed(&self, table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
        self.split.leave(rows_of(table, ids, self.part.start))
    }

    /// Adds the rows `places` of `table` `[positions, embed]` to every sequence of `x` `[batch, time, embed]`, where `places`
    /// has `time` elements.
    ///
    /// # Panics
    /// `places` is not within the table.
    pub fn add_positions(&self, x: Tensor<3>, table: Tensor<2>, places: Range<usize>) -> Tensor<3> {
        add_positions(x, table, places)
    }

    /// The logits of this rank's tokens, `[batch, time, vocab]`, for `x` `[batch, time, embed]` and `table` `[vocab, embed]`.
    pub fn logits(&self, x: Tensor<3>, table: Tensor<2>) -> Tensor<3> {
        linear_by_rows(self.split.enter(x), table)
    }

    /// Mean cross entropy (natural logarithm) of [`logits`](Self::logits) against `targets` `[batch, time]`, as `[1]`.
    /// `smoothing`, 0 to below 1, is the part of the probability that is spread over all tokens (Szegedy et al. 2016,
    /// "Rethinking the Inception Architecture for Computer Vision", section 7). The mean leaves out targets that are
    /// [`IGNORED`](crate::models::IGNORED).
    pub fn loss(&self, logits: Tensor<3>, targets: Tensor<2, Int>, smoothing: f32) -> Tensor<1> {
        let [rows, time, vocab] = logits.dims();
        let split = self.split.axis().map(|axis| (axis, self.part.start, self.size));
        cross_entropy(logits.reshape([rows * time, vocab]), targets.reshape([rows * time]), smoothing, split)
    }
}
