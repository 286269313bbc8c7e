//! What the thread does with a unit: encode, exchange, decode.

use super::codes::Codes;
use super::sparse::Sparse;
use crate::error::Result;
use crate::params::UnitShapes;
use regatta_comm::{Element, Group, ReduceOp, bf16, f16};
use regatta_kernel::bias::accumulate;
use regatta_kernel::compress::half;
use regatta_kernel::random::Stream;
use regatta_plan::{Compress, CompressKind};
use std::ops::Range;

/// Tells the random numbers of this from all others of a run.
const SEED: u64 = 0x636f_6d70;

/// Encodes, exchanges and decodes the gradients of units, one at a time.
pub(super) struct Coder {
    pub(super) workers: Group,
    shapes: Vec<UnitShapes>,
    pub(super) compress: Compress,
    /// What is encoded of a unit, one after the other.
    packed: Vec<f32>,
    /// Numbers that are exchanged as they are.
    plain: Vec<f32>,
}

/// One unit in one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub unit: usize,
    pub step: u64,
}

impl Turn {
    /// Random numbers that all workers have.
    pub(super) fn random(self) -> Stream {
        Stream::new(SEED).at(self.step).at(self.unit as u64)
    }
}

/// Copies the numbers of `ranges`, one after the other.
pub(super) fn pack<'a>(from: &[f32], ranges: impl Iterator<Item = &'a Range<usize>>, into: &mut Vec<f32>) {
    into.clear();
    ranges.for_each(|range| into.extend_from_slice(&from[range.clone()]));
}

/// The reverse of [`pack`].
pub(super) fn unpack<'a>(from: &[f32], ranges: impl Iterator<Item = &'a Range<usize>>, into: &mut [f32]) {
    let mut at = 0;
    for range in ranges {
        into[range.clone()].copy_from_slice(&from[at..at + range.len()]);
        at += range.len();
    }
}

impl Coder {
    pub(super) fn new(workers: Group, shapes: Vec<UnitShapes>, compress: Compress) -> Self {
        Self { workers, shapes, compress, packed: vec![], plain: vec![] }
    }

    /// Replaces the gradients of `unit` by their mean over the workers. `kept` is what is kept of the unit from step to step.
    pub(super) fn mean(
        &mut self,
        unit: usize,
        step: u64,
        gradients: &mut [f32],
        kept: &mut [Vec<f32>],
    ) -> Result<()> {
        let shapes = self.shapes[unit].clone();
        let turn = Turn { unit, step };
        if self.compress.kind == CompressKind::Onebit && step < self.compress.warm_up {
            return Ok(self.workers.all_reduce(gradients, ReduceOp::Mean)?);
        }
        if self.compress.kind == CompressKind::Powersgd {
            return self.factored(turn, &shapes, gradients, kept);
        }
        let vectors: Vec<Range<usize>> = shapes.vectors;
        let ranges: Vec<Range<usize>> = shapes.matrices.into_iter().map(|(range, _)| range).collect();
        self.as_they_are(&vectors, gradients)?;
        let mut packed = std::mem::take(&mut self.packed);
        pack(gradients, ranges.iter(), &mut packed);
        let outcome = match packed.is_empty() {
            true => Ok(()),
            false => self.packed_mean(turn, &ranges, &mut packed, kept),
        };
        unpack(&packed, ranges.iter(), gradients);
        self.packed = packed;
        outcome
    }

    /// Averages the numbers of `ranges` without an encoding.
    pub(super) fn as_they_are(&mut self, ranges: &[Range<usize>], gradients: &mut [f32]) -> Result<()> {
        pack(gradients, ranges.iter(), &mut self.plain);
        if !self.plain.is_empty() {
            self.workers.all_reduce(&mut self.plain, ReduceOp::Mean)?;
        }
        unpack(&self.plain, ranges.iter(), gradients);
        Ok(())
    }

    /// Replaces `packed`, the numbers of `ranges`, by their mean over the workers.
    fn packed_mean(
        &mut self,
        turn: Turn,
        ranges: &[Range<usize>],
        packed: &mut [f32],
        kept: &mut [Vec<f32>],
    ) -> Result<()> {
        let workers = &self.workers;
        match self.compress.kind {
            CompressKind::Bf16 => {
                return in_16_bits::<bf16>(workers, packed, half::to_bf16, half::from_bf16);
            }
            CompressKind::F16 => return in_16_bits::<f16>(workers, packed, half::to_f16, half::from_f16),
            _ => {}
        }
        // What is kept, packed like the gradients.
        let mut states: Vec<Vec<f32>> = kept
            .iter()
            .map(|numbers| {
                let mut state = vec![];
                pack(numbers, ranges.iter(), &mut state);
                state
            })
            .collect();
        let outcome = match (self.compress.kind, &mut states[..]) {
            (CompressKind::Topk, [unsent]) => {
                accumulate(packed, unsent);
                Sparse::new(self).largest(self.compress.millionths, packed, unsent)
            }
            (CompressKind::Randomk, [unsent]) => {
                accumulate(packed, unsent);
                Sparse::new(self).random(turn, packed, unsent)
            }
            (CompressKind::Dgc, [velocity, unsent]) => {
                let momentum = self.compress.momentum as f32 / 1e6;
                for ((velocity, unsent), gradient) in velocity.iter_mut().zip(&mut *unsent).zip(&*packed) {
                    *velocity = momentum * *velocity + gradient;
                    *unsent += *velocity;
                }
                packed.copy_from_slice(unsent);
                let part = warming_up(self.compress.millionths, turn.step, self.compress.warm_up);
                let outcome = Sparse::new(self).largest(part, packed, unsent);
                // What has been sent begins anew (momentum factor masking, section 3.2 of the paper).
                let sent = velocity.iter_mut().zip(&*unsent).filter(|(_, unsent)| **unsent == 0.0);
                sent.for_each(|(velocity, _)| *velocity = 0.0);
                outcome
            }
            (_, [unsent, unsent_mean]) => {
                accumulate(packed, unsent);
                Codes::new(self, turn).mean(packed, Some((unsent, unsent_mean)))
            }
            _ => Codes::new(self, turn).mean(packed, None),
        };
        for (numbers, state) in kept.iter_mut().zip(&states) {
            unpack(state, ranges.iter(), numbers);
        }
        outcome
    }
}

/// Replaces `packed` by its mean over the workers, which travels as `T`.
fn in_16_bits<T: Element>(
    workers: &Group,
    packed: &mut [f32],
    narrow: impl Fn(&[f32], &mut [u16]),
    widen: impl Fn(&[u16], &mut [f32]),
) -> Result<()> {
    let mut bits = vec![0; packed.len()];
    narrow(packed, &mut bits);
    workers.all_reduce::<T>(bytemuck::cast_slice_mut(&mut bits), ReduceOp::Mean)?;
    widen(&bits, packed);
    Ok(())
}

/// The part that `dgc` sends at `step`, in millionths: a quarter, then a quarter of that and so on, until it is `part` after
/// `warm_up` steps (Lin et al. 2018, "Deep Gradient Compression", section 3.3).
fn warming_up(part: u32, step: u64, warm_up: u64) -> u32 {
    if step >= warm_up {
        return part;
    }
    let stages = (f64::from(part.max(1)) / 1e6).log(0.25).ceil().max(1.0);
    let stage = (step as f64 * stages / warm_up as f64).floor() + 1.0;
    part.max((1e6 * 0.25f64.powf(stage)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_shrinks_to_the_plans() {
        let parts: Vec<u32> = (0..11).map(|step| warming_up(1000, step, 10)).collect();
        assert_eq!(parts, [250_000, 250_000, 62_500, 62_500, 15_625, 15_625, 3906, 3906, 1000, 1000, 1000]);
        assert_eq!(warming_up(1000, 0, 0), 1000);
        assert_eq!(warming_up(500_000, 0, 5), 500_000);
    }
}
