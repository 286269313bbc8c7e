//! How workers combine gradients and store parameters: what a step communicates for each unit of parameters, and how
//! much of it a rank keeps. The training loop and the estimates of memory and traffic use the same rules.

use crate::{Axis, AxisSet, Load, Plan, ScheduleKind};
use std::fmt;

/// If only shards of gradients are kept: units whose full gradients are in buffers at the same time. Two are being
/// reduced, one is being filled, and one waits for its other uses (a tied embedding).
const REDUCED_AT_ONCE: usize = 4;
/// Bytes of an f32.
const F32: usize = size_of::<f32>();

/// A collective operation of a group of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// All ranks get the sum or the mean.
    AllReduce,
    /// Each rank gets its part of the sum or of the mean.
    ReduceScatter,
    /// All ranks get the parts of all ranks.
    AllGather,
    /// Each rank gets a part of each rank.
    AllToAll,
    /// Each rank sends the same to the ranks before and after it, in a ring.
    Neighbours,
    /// Each rank sends to the parameter servers.
    ToServers,
    /// Each rank gets from the parameter servers.
    FromServers,
}

/// What an operation transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Gradients.
    Gradients,
    /// Parameters.
    Parameters,
}

/// Identical operations that a step executes for one unit of parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitOperation {
    /// What the operations transfer.
    pub content: Content,
    /// The axes whose ranks take part.
    pub over: AxisSet,
    /// The kind of operation.
    pub operation: Operation,
    /// How many operations a step executes.
    pub count: usize,
    /// Steps from one that executes them to the next.
    pub every: u64,
    /// Elements per operation: the larger of input and output.
    pub numbers: usize,
    /// Bytes of an element.
    pub width: usize,
    /// What the operations are for, as in `gradients`. For display.
    pub what: &'static str,
}

/// How a step uses one unit of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitUse<'a> {
    /// Elements of the unit, padding included.
    pub len: usize,
    /// How often a step has new gradients of the unit to reduce, if those of every micro-batch are reduced separately.
    pub flushes: usize,
    /// How often a step needs the unit's full parameters on ranks that keep only a shard.
    pub gathers: usize,
    /// Rows and columns of the unit's parameters that have two dimensions or more.
    pub matrices: &'a [[usize; 2]],
    /// Elements of the others, without padding.
    pub vectors: usize,
}

/// Elements that a rank keeps from one step to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Elements of parameters.
    pub parameters: usize,
    /// Elements of gradients.
    pub gradients: usize,
    /// Elements of each moment of the optimizer: as many as parameters that this rank updates.
    pub updated: usize,
}

/// A way to combine gradients and to store parameters.
pub trait ExchangePlan: fmt::Debug + Send + Sync {
    /// Whether the gradients of every micro-batch are reduced separately, because no rank keeps the full gradients.
    fn sends_each_micro_batch(&self) -> bool {
        false
    }

    /// Whether full parameters are gathered before each use and freed after it.
    fn gathers_on_use(&self) -> bool {
        false
    }

    /// The operations that a step executes for a unit.
    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation>;

    /// What a rank keeps of a unit that has `numbers` elements.
    fn kept(&self, numbers: usize) -> Kept;

    /// The most elements that are in temporary buffers at the same time, on a rank of `plan` that has `load`.
    fn buffers(&self, plan: &Plan, load: &Load) -> usize;
}

/// Nothing is sharded: every worker keeps everything, and gradients are averaged over all workers.
#[derive(Debug, Clone, Copy)]
pub struct Mean;

impl ExchangePlan for Mean {
    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation> {
        vec![UnitOperation {
            content: Content::Gradients,
            over: AxisSet::WORKERS,
            operation: Operation::AllReduce,
            count: 1,
            every: 1,
            numbers: unit.len,
            width: F32,
            what: "gradients",
        }]
    }

    fn kept(&self, numbers: usize) -> Kept {
        Kept { parameters: numbers, gradients: numbers, updated: numbers }
    }

    fn buffers(&self, _: &Plan, _: &Load) -> usize {
        0
    }
}

/// What ZeRO shards over the axis `data`. Each stage also shards what the stages before it shard (Rajbhandari et al.
/// 2020, "ZeRO", section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// The optimizer state.
    Optimizer,
    /// Gradients.
    Gradients,
    /// Parameters.
    Parameters,
}

/// Every worker along `data` keeps a shard. Gradients are averaged on the rank that keeps them, and parameters are
/// gathered from the ranks that keep them.
#[derive(Debug, Clone, Copy)]
pub struct Sharded {
    /// What is sharded: everything up to this stage.
    pub stage: ZeroStage,
    /// Ranks along `data`, at least 2.
    pub shards: usize,
}

impl Sharded {
    /// Elements of two buffers: one with all `numbers`, one with this rank's shard of them. A collective operation
    /// needs both.
    fn full_and_shard(&self, numbers: usize) -> usize {
        numbers + numbers.div_ceil(self.shards)
    }
}

impl ExchangePlan for Sharded {
    fn sends_each_micro_batch(&self) -> bool {
        self.stage >= ZeroStage::Gradients
    }

    fn gathers_on_use(&self) -> bool {
        self.stage == ZeroStage::Parameters
    }

    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation> {
        let scatters = if self.sends_each_micro_batch() { unit.flushes } else { 1 };
        let gathers = if self.gathers_on_use() { unit.gathers } else { 1 };
        let one = |content, over, operation, count, numbers, what| UnitOperation {
            content,
            over,
            operation,
            count,
            every: 1,
            numbers,
            width: F32,
            what,
        };
        let (data, shard) = (AxisSet::from(Axis::Data), unit.len / self.shards);
        let what = if self.gathers_on_use() {
            "parameters, before each use"
        } else {
            "parameters, after the update"
        };
        vec![
            one(Content::Gradients, data, Operation::ReduceScatter, scatters, unit.len, "gradients"),
            one(
                Content::Gradients,
                Axis::Replica.into(),
                Operation::AllReduce,
                1,
                shard,
                "gradients of this rank's shard",
            ),
            one(Content::Parameters, data, Operation::AllGather, gathers, unit.len, what),
        ]
    }

    fn kept(&self, numbers: usize) -> Kept {
        let numbers_of =
            |stage: ZeroStage| if self.stage >= stage { numbers.div_ceil(self.shards) } else { numbers };
        Kept {
            parameters: numbers_of(ZeroStage::Parameters),
            gradients: numbers_of(ZeroStage::Gradients),
            updated: numbers_of(ZeroStage::Optimizer),
        }
    }

    fn buffers(&self, plan: &Plan, load: &Load) -> usize {
        let all: usize = load.units.iter().sum();
        let ahead = plan.prefetch.saturating_add(1);
        let gathered = if self.gathers_on_use() {
            let blocks = load.chunks.iter().flatten().map(|block| block.parameters);
            let full = largest(blocks.collect(), ahead);
            // Gathered parameters are copied from the receive buffer to where they are used.
            full + self.full_and_shard(full)
        } else {
            // While one updated unit is waited for, the next ones are already being gathered.
            self.full_and_shard(largest(load.units.clone(), ahead))
        };
        let reduced = if !self.sends_each_micro_batch() {
            all.div_ceil(self.shards)
        } else if plan.schedule == ScheduleKind::ZeroBubble {
            // The first half of a backward produces gradients for some parameters of every unit, so all units are in
            // use.
            self.full_and_shard(all)
        } else {
            self.full_and_shard(largest(load.units.clone(), REDUCED_AT_ONCE))
        };
        gathered + reduced
    }
}

/// The sum of the `count` largest sizes.
fn largest(mut sizes: Vec<usize>, count: usize) -> usize {
    sizes.sort_unstable_by_key(|&size| std::cmp::Reverse(size));
    sizes.iter().take(count).sum()
}
