//! Token embedding and output projection over a vocabulary that may be split over ranks (Shoeybi et al. 2019, section 3).

use super::{Init, Split};
use crate::autograd::{add_positions, cross_entropy, linear_by_rows, rows_of};
use burn::tensor::{Int, Tensor};
use std::ops::Range;

/// The vocabulary as a rank holds it.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    split: Split,
    size: usize,
    part: Range<usize>,
}

impl Vocabulary {
    /// Of `size` tokens.
    pub fn new(init: &Init, size: usize) -> Self {
        let split = init.split("vocab");
        Self { part: split.part(size), size, split }
    }

    /// Rows of `table` `[vocab, embed]` for `ids` `[batch, time]`, `[batch, time, embed]`; in a region that is split by
    /// time, this rank's part of it.
    pub fn embed(&self, table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
        self.split.leave(rows_of(table, ids, self.part.start))
    }

    /// `x` plus the rows `places` of `table` `[positions, embed]`, in every sequence.
    pub fn add_positions(&self, x: Tensor<3>, table: Tensor<2>, places: Range<usize>) -> Tensor<3> {
        add_positions(x, table, places)
    }

    /// Logits `[batch, time, vocab]` of `x` `[batch, time, embed]` for this rank's tokens.
    pub fn logits(&self, x: Tensor<3>, table: Tensor<2>) -> Tensor<3> {
        linear_by_rows(self.split.enter(x), table)
    }

    /// Mean cross entropy of [`logits`](Self::logits) against `targets` `[batch, time]`, with label
    /// smoothing.
    pub fn loss(&self, logits: Tensor<3>, targets: Tensor<2, Int>, smoothing: f32) -> Tensor<1> {
        let [rows, time, vocab] = logits.dims();
        let split = self.split.axis().map(|axis| (axis, self.part.start, self.size));
        cross_entropy(logits.reshape([rows * time, vocab]), targets.reshape([rows * time]), smoothing, split)
    }
}
