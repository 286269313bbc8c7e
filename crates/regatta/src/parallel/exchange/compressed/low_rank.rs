//! Matrices as products of thin ones (Vogels et al. 2019, "PowerSGD", algorithms 1 and 2).

use super::coder::{Coder, Turn};
use crate::error::Result;
use crate::params::UnitShapes;
use regatta_comm::ReduceOp;
use regatta_kernel::bias::accumulate;
use regatta_kernel::compress::low_rank::{expand, orthogonalize, project, project_back};
use std::ops::Range;

impl Coder {
    /// Replaces the gradients of a unit by their mean. `kept` has what was not sent, and, where each matrix begins, its right
    /// factor of the step before.
    pub(super) fn factored(
        &mut self,
        turn: Turn,
        shapes: &UnitShapes,
        gradients: &mut [f32],
        kept: &mut [Vec<f32>],
    ) -> Result<()> {
        let [unsent, factors] = kept else { return Ok(()) };
        let rank = self.compress.rank;
        let factored = |shape: [usize; 2]| self.compress.factors(shape);
        let (thin, whole): (Vec<_>, Vec<_>) =
            shapes.matrices.iter().cloned().partition(|(_, shape)| factored(*shape));
        let whole: Vec<Range<usize>> =
            shapes.vectors.iter().cloned().chain(whole.into_iter().map(|(range, _)| range)).collect();
        self.as_they_are(&whole, gradients)?;
        if thin.is_empty() {
            return Ok(());
        }
        let lines = |side: usize| thin.iter().map(|(_, shape)| shape[side] * rank).sum::<usize>();
        let (mut left, mut right) = (vec![0.0; lines(0)], vec![0.0; lines(1)]);
        let (mut at, mut rest) = (0, &mut left[..]);
        for (range, [rows, columns]) in &thin {
            accumulate(&mut gradients[range.clone()], &unsent[range.clone()]);
            let q = &mut factors[range.start..][..columns * rank];
            if q.iter().all(|x| *x == 0.0) {
                // The same on all workers.
                turn.random().at(range.start as u64).fill_normal(0, 1.0, q);
            }
            let (p, later) = rest.split_at_mut(rows * rank);
            project(&gradients[range.clone()], *columns, q, p);
            rest = later;
        }
        self.workers.all_reduce(&mut left, ReduceOp::Mean)?;
        let (mut rest, mut q_rest) = (&mut left[..], &mut right[..]);
        for (range, [rows, columns]) in &thin {
            let (p, later) = rest.split_at_mut(rows * rank);
            let (q, q_later) = q_rest.split_at_mut(columns * rank);
            orthogonalize(p, rank);
            project_back(&gradients[range.clone()], *columns, p, q);
            (rest, q_rest) = (later, q_later);
        }
        self.workers.all_reduce(&mut right, ReduceOp::Mean)?;
        let mut q_at = 0;
        for (range, [rows, columns]) in &thin {
            let (p, q) = (&left[at..][..rows * rank], &right[q_at..][..columns * rank]);
            let (own, unsent) = (&mut gradients[range.clone()], &mut unsent[range.clone()]);
            unsent.copy_from_slice(own);
            expand(p, q, rank, own);
            unsent.iter_mut().zip(&*own).for_each(|(unsent, sent)| *unsent -= sent);
            factors[range.start..][..columns * rank].copy_from_slice(q);
            (at, q_at) = (at + rows * rank, q_at + columns * rank);
        }
        Ok(())
    }
}
