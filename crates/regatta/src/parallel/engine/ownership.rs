//! Decides which of the ranks with the same parameters counts and writes them, and checks that they are identical.

use super::Engine;
use crate::error::{Error, Result};
use crate::parallel::groups::Role;
use regatta_comm::ReduceOp;
use regatta_plan::{Axis, AxisSet};

/// The offset basis and the prime of the 64-bit FNV-1a hash.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

impl Engine {
    /// Whether this rank is the first of those that own the same elements of `param` along the axes of `set`.
    fn is_first_owner(&self, unit: usize, param: usize, set: AxisSet) -> bool {
        let replicated = self.units.params[param].replicated_over();
        // Ranks that shard a unit own different numbers.
        let sharded = if self.units.shards > 1 { Axis::Data.into() } else { AxisSet::NONE };
        let others = AxisSet::of(&set.iter().filter(|axis| replicated.contains(*axis)).collect::<Vec<_>>());
        let first = self.groups.is_first_along(others.without(sharded));
        // Among the stages that share a unit, the first owner is the stage with the first of its blocks.
        let shared = &self.units.units[unit].shared;
        let first_stage =
            shared.first().is_none_or(|block| self.chunks.iter().any(|blocks| blocks.contains(block)));
        first && (first_stage || !set.contains(Axis::Pipe))
    }

    /// Whether this rank writes its worker's own numbers for its part of `param` in `unit` to checkpoints.
    pub fn writes_of_worker(&self, unit: usize, param: usize) -> bool {
        self.is_first_owner(unit, param, AxisSet::of(&[Axis::Pipe, Axis::Tensor]))
    }

    /// Whether this rank writes its island's own numbers for its part of `param` in `unit` to checkpoints.
    pub fn writes_of_island(&self, unit: usize, param: usize) -> bool {
        self.is_first_owner(unit, param, AxisSet::ALL.without(Axis::Replica.into()))
    }

    /// Whether this rank writes its part of `param` in `unit` to checkpoints.
    pub fn writes(&self, unit: usize, param: usize) -> bool {
        self.is_first_owner(unit, param, AxisSet::ALL)
    }

    /// The global norm of the averaged gradients: the square root of the sum of their squares. Each gradient counts once.
    ///
    /// # Errors
    /// Communication fails.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        if let Some(squares) = self.exchange.squares() {
            return Ok(squares.sqrt());
        }
        let units = self.units.clone();
        let model = AxisSet::of(&[Axis::Pipe, Axis::Tensor]);
        let mut squares = 0.0;
        for unit in 0..units.units.len() {
            for segment in units.segments(unit, units.shard(unit, self.shard())) {
                let is_statistic = units.params[segment.param].statistic;
                let counts = !is_statistic && self.is_first_owner(unit, segment.param, model);
                if let (true, Some(gradients)) = (counts, self.exchange.combined(unit)) {
                    squares += regatta_kernel::optimizer::sum_of_squares(&gradients[segment.within]);
                }
            }
        }
        let mut sum = [squares];
        let model = self.groups.model()?;
        if model.size() > 1 {
            model.all_reduce(&mut sum, ReduceOp::Sum)?;
        }
        Ok(sum[0].sqrt())
    }

    /// Checks that ranks with the same parameters have identical bits, and returns a hash of the parameters of all ranks.
    ///
    /// # Errors
    /// Some ranks differ from the first of their group, or communication fails. The error names the ranks.
    pub fn check_identical(&mut self) -> Result<u64> {
        self.exchange.wait_all(&mut self.store)?;
        let fold = |hash: u64, word: u64| (hash ^ word).wrapping_mul(FNV_PRIME);
        let bits =
            (0..self.units.units.len()).flat_map(|unit| self.store.own(unit)).map(|x| u64::from(x.to_bits()));
        let mine = bits.fold(FNV_OFFSET, fold);
        let same = if self.units.shards > 1 { Axis::Replica.into() } else { AxisSet::WORKERS };
        let parted = if self.exchange.has_parted() { Axis::Replica.into() } else { AxisSet::NONE };
        let same = same.without(parted);
        if let Some(same) = self.groups.over_several(same, Role::Exchange)? {
            let mut hashes = vec![0i64; same.size()];
            same.all_gather(&[mine.cast_signed()], &mut hashes)?;
            let differ = (0..hashes.len()).filter(|&worker| hashes[worker] != hashes[0]);
            let differ: Vec<String> = differ.map(|worker| same.members()[worker].to_string()).collect();
            if !differ.is_empty() {
                return Err(Error::Numeric(format!(
                    "the parameters of rank {} differ from rank {}'s (hashes {hashes:x?}); \
                     resume from the last checkpoint",
                    differ.join(", "),
                    same.members()[0]
                )));
            }
        }
        let world = self.groups.world();
        let mut all = vec![0i64; world.size()];
        world.all_gather(&[mine.cast_signed()], &mut all)?;
        let worker = |rank: &usize| self.units.shards > 1 || self.groups.mesh().worker(*rank) == 0;
        let counted = (0..world.size()).filter(worker).map(|rank| all[rank].cast_unsigned());
        Ok(counted.fold(FNV_OFFSET, fold))
    }
}
