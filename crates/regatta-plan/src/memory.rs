//! How much memory a plan takes on a rank, by kind, before anything runs.
//!
//! Parameters, gradients and optimizer state follow Rajbhandari et al. 2020, "ZeRO", section 5, here in f32 throughout:
//! of 4 + 4 + 8 bytes a parameter under AdamW, stage 1 divides the 8 by the ranks of the axis data, stage 2 the second
//! 4 too, and stage 3 everything. Activations are those of the micro-batches that the schedule holds at once.
//!
//! At the start every rank makes the parameters of its blocks whole, and moves them into memory of their units, before it
//! drops what other ranks own. Under stage 3 this may be more than training takes.

use crate::{Plan, Recompute, Schedule, ScheduleKind, Task};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a number.
const NUMBER: usize = size_of::<f32>();
/// Units whose gradients are away from their place at once, from stage 2 on: two on their way, one being filled, and one
/// that waits for its other uses (a tied embedding).
const REDUCED_AT_ONCE: usize = 4;

/// Bytes on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Footprint {
    /// Parameters.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Moments of the optimizer, as far as they are in memory.
    pub optimizer: usize,
    /// Parameters that are gathered and gradients on their way, at most.
    pub working: usize,
    /// What forward leaves for backward, at most.
    pub activations: usize,
    /// What making the parameters takes, before training begins: it does not come on top of the others.
    pub start: usize,
}

impl Footprint {
    /// The most at any time: all kinds together while it trains, or the start where that takes more.
    pub fn total(&self) -> usize {
        self.training().max(self.start)
    }

    /// All kinds together while it trains.
    pub fn training(&self) -> usize {
        [self.gradients, self.optimizer, self.working, self.activations]
            .into_iter()
            .fold(self.parameters, usize::saturating_add)
    }

    /// What no batch and no schedule makes smaller: parameters, gradients and moments, or the start where that takes more.
    pub fn least(&self) -> usize {
        self.parameters.saturating_add(self.gradients).saturating_add(self.optimizer).max(self.start)
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bytes, kind) in [
            (self.parameters, " of parameters, "),
            (self.gradients, " of gradients, "),
            (self.optimizer, " of optimizer state, "),
            (self.working, " of buffers for communication, "),
            (self.activations, " of activations"),
        ] {
            write!(f, "{}{kind}", mebibytes(bytes))?;
        }
        if self.start > self.training() {
            write!(f, "; {} at the start, when it makes its parameters whole", mebibytes(self.start))?;
        }
        Ok(())
    }
}

/// Bytes as text, as in `1.50 MiB`.
pub fn mebibytes(bytes: usize) -> String {
    format!("{:.2} MiB", bytes as f64 / (1 << 20) as f64)
}

/// What a rank of a stage would hold if nothing were sharded over data.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Load {
    /// Numbers of every unit: parameters that are gathered, and whose gradients are reduced, together.
    pub units: Vec<usize>,
    /// The blocks of each chunk.
    pub chunks: Vec<Vec<BlockLoad>>,
    /// Numbers of the largest parameter in the whole model, where a rank holds a part of it: it is drawn whole, then cut.
    pub drawn: usize,
}

/// What a rank holds of a block.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BlockLoad {
    /// Numbers of the units that it uses.
    pub parameters: usize,
    /// Numbers that forward keeps of one sample for backward.
    pub kept: f64,
    /// Numbers that come in from the block before, of one sample.
    pub input: f64,
}

impl Plan {
    /// Bytes of a rank of `stage` that has `load`, with `moments` numbers of optimizer state a parameter (2 for AdamW, 1
    /// for SGD with momentum, 0 without). `schedule` is the plan's [`pipeline`](Self::pipeline).
    pub fn footprint(&self, schedule: &Schedule, stage: usize, load: &Load, moments: usize) -> Footprint {
        let shards = self.shards();
        let zero = if shards > 1 { self.zero } else { 0 };
        let all: usize = load.units.iter().sum();
        let bytes = |numbers: usize| numbers.saturating_mul(NUMBER);
        let sharded = |from: u8| bytes(if zero >= from { all.div_ceil(shards) } else { all });
        Footprint {
            parameters: sharded(3),
            gradients: sharded(2),
            optimizer: if self.offload { 0 } else { moments.saturating_mul(sharded(1)) },
            working: bytes(self.working(zero, load)),
            activations: bytes(self.activations(schedule, stage, load)),
            start: bytes(all.saturating_mul(2).saturating_add(load.drawn)),
        }
    }

    /// Numbers in buffers of gathered parameters and of gradients on their way.
    fn working(&self, zero: u8, load: &Load) -> usize {
        let shards = self.shards();
        let all: usize = load.units.iter().sum();
        // A rank's part goes out of one buffer, or into it, beside the one with all parts.
        let both = |numbers: usize| numbers + numbers.div_ceil(shards);
        let gathered = match zero {
            0 => 0,
            // Updated units are fetched one ahead of the other.
            1 | 2 => both(largest(load.units.clone(), self.prefetch.saturating_add(1))),
            _ => {
                let blocks = load.chunks.iter().flatten().map(|block| block.parameters);
                let here = largest(blocks.collect(), self.prefetch.saturating_add(1));
                // Each is copied to its place from the buffer that it came in.
                here + both(here)
            }
        };
        let reduced = match zero {
            0 => 0,
            1 => all.div_ceil(shards),
            // The first half of a backward leaves gradients of some parameters of every unit.
            _ if self.schedule == ScheduleKind::ZeroBubble => both(all),
            _ => both(largest(load.units.clone(), REDUCED_AT_ONCE)),
        };
        gathered + reduced
    }

    /// Most numbers of activations at once.
    fn activations(&self, schedule: &Schedule, stage: usize, load: &Load) -> usize {
        let rows = self.micro_batch() as f64;
        let end = |chunk: usize| schedule.virtual_stage(stage, chunk) + 1 == schedule.virtual_stages();
        // Of a micro-batch between its forward and its backward; and beside that, while it goes backward.
        let costs = |chunk: usize| -> (f64, f64) {
            let blocks = load.chunks.get(chunk).map_or(&[][..], |blocks| blocks);
            if self.recompute == Recompute::None {
                return (blocks.iter().map(|block| block.kept).sum(), 0.0);
            }
            // What the loss is computed from is not computed again just before its backward.
            let (last, others) = match blocks.split_last().filter(|_| end(chunk)) {
                Some((last, others)) => (last.kept, others),
                None => (0.0, blocks),
            };
            let inputs = others.iter().map(|block| block.input).sum::<f64>() + last;
            let beside = others.iter().map(|block| block.kept).fold(0.0, f64::max);
            if self.recompute == Recompute::Block {
                return (inputs, beside);
            }
            let first = blocks.first().map_or(0.0, |block| block.input);
            (first, inputs + beside)
        };
        let costs: Vec<(f64, f64)> = (0..schedule.chunks).map(costs).collect();
        let (mut held, mut peak) = (0.0f64, 0.0f64);
        for task in schedule.tasks.get(stage).into_iter().flatten() {
            let (kept, beside) = costs[task.chunk()];
            match task {
                Task::Forward { .. } => held += kept,
                Task::Backward { .. } | Task::BackwardInput { .. } => peak = peak.max(held + beside),
                Task::BackwardWeight { .. } => {}
            }
            peak = peak.max(held);
            if matches!(task, Task::Backward { .. } | Task::BackwardWeight { .. }) {
                held -= kept;
            }
        }
        (peak * rows).ceil() as usize
    }
}

/// The sum of the `count` largest.
fn largest(mut sizes: Vec<usize>, count: usize) -> usize {
    sizes.sort_unstable_by_key(|&size| std::cmp::Reverse(size));
    sizes.iter().take(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Batch;

    /// Four units of one block each.
    fn load() -> Load {
        let block = |parameters| BlockLoad { parameters, kept: 10.0, input: 1.0 };
        let chunks = vec![[400, 100, 100, 200].map(block).to_vec()];
        Load { units: vec![400, 100, 100, 200], chunks, drawn: 0 }
    }

    fn plan(mesh: &str, zero: u8) -> Plan {
        Plan { zero, ..Plan::new(mesh.parse().unwrap(), Batch::global(16, 4), 25 << 20).unwrap() }
    }

    fn footprint(plan: &Plan, moments: usize) -> Footprint {
        plan.footprint(&plan.pipeline().unwrap(), 0, &load(), moments)
    }

    #[test]
    fn states_are_those_of_zero() {
        // AdamW in f32: 4 + 4 + 8, 4 + 4 + 8/N, 4 + 4/N + 8/N and 16/N bytes a parameter.
        let all = 800;
        for ranks in [2, 4] {
            let wanted = [
                [4 * all, 4 * all, 8 * all],
                [4 * all, 4 * all, 8 * all / ranks],
                [4 * all, 4 * all / ranks, 8 * all / ranks],
                [4 * all / ranks, 4 * all / ranks, 8 * all / ranks],
            ];
            for (zero, wanted) in wanted.into_iter().enumerate() {
                let found = footprint(&plan(&format!("data={ranks}"), zero as u8), 2);
                assert_eq!([found.parameters, found.gradients, found.optimizer], wanted, "zero {zero}");
            }
        }
        // SGD has no state, or one velocity; what is in a file is not in memory.
        for (moments, bytes) in [(0, 0), (1, 4 * all / 2)] {
            assert_eq!(footprint(&plan("data=2", 1), moments).optimizer, bytes);
        }
        assert_eq!(footprint(&Plan { offload: true, ..plan("data=2", 1) }, 2).optimizer, 0);
        // There is nothing to shard over.
        let alone = footprint(&plan("data=1", 3), 2);
        assert_eq!((alone.parameters, alone.optimizer, alone.working), (4 * all, 8 * all, 0));
        // Replicas hold the same shards.
        assert_eq!(footprint(&plan("replica=2,data=2", 3), 2).parameters, 4 * all / 2);
    }

    #[test]
    fn buffers_are_of_what_is_on_its_way() {
        let working = |plan: Plan| footprint(&plan, 2).working / NUMBER;
        assert_eq!(working(plan("data=2", 0)), 0);
        assert_eq!(working(plan("data=2", 1)), (600 + 300) + 400);
        assert_eq!(working(plan("data=2", 2)), (600 + 300) + (800 + 400));
        // One block and the next are there, each in its place and in the buffer that it came in.
        assert_eq!(working(plan("data=2", 3)), 600 + (600 + 300) + (800 + 400));
        assert_eq!(working(Plan { prefetch: 0, ..plan("data=2", 3) }), 400 + (400 + 200) + (800 + 400));
    }

    #[test]
    fn activations_are_of_the_micro_batches_held() {
        let bytes = |plan: &Plan, stage: usize| {
            let chunk = load().chunks[0][..2].to_vec();
            let load = Load { units: vec![], chunks: vec![chunk; plan.chunks], drawn: 0 };
            plan.footprint(&plan.pipeline().unwrap(), stage, &load, 0).activations / NUMBER
        };
        let of = |mesh: &str, schedule: ScheduleKind| Plan {
            schedule,
            chunks: if schedule == ScheduleKind::Interleaved { 2 } else { 1 },
            ..plan(mesh, 0)
        };
        // A block keeps 10 numbers of each of the 4 samples of a micro-batch; there are two blocks.
        let one = 2 * 10 * 4;
        assert_eq!(bytes(&of("data=1", ScheduleKind::OneFOneB), 0), one);
        assert_eq!(bytes(&of("data=1", ScheduleKind::GPipe), 0), 4 * one);
        for stage in 0..2 {
            assert_eq!(bytes(&of("pipe=2", ScheduleKind::GPipe), stage), 4 * one);
            for kind in [ScheduleKind::OneFOneB, ScheduleKind::ZeroBubble, ScheduleKind::Interleaved] {
                let plan = of("pipe=2", kind);
                let held = plan.pipeline().unwrap().peak_held(stage);
                assert_eq!(bytes(&plan, stage), held * one, "{kind} {stage}");
            }
        }
        // Computed again: inputs of both blocks and, for a while, all of one of them; the loss's block is kept.
        let again = |mesh: &str| Plan { recompute: Recompute::Block, ..of(mesh, ScheduleKind::OneFOneB) };
        assert_eq!(bytes(&again("pipe=2"), 0), (2 * (1 + 1) + 10) * 4);
        assert_eq!(bytes(&again("pipe=2"), 1), (1 + 10 + 10) * 4);
        // From the input of the stage: inputs of both blocks only while they go backward.
        let all = |mesh: &str| Plan { recompute: Recompute::All, ..again(mesh) };
        assert_eq!(bytes(&all("pipe=2"), 0), (2 + (1 + 1) + 10) * 4);
        assert_eq!(bytes(&all("pipe=2"), 1), (1 + (1 + 10) + 10) * 4);
        // Half the samples in a micro-batch, half the numbers.
        let halves = Plan { accumulate: 8, ..of("data=1", ScheduleKind::OneFOneB) };
        assert_eq!(bytes(&halves, 0), one / 2);
    }

    #[test]
    fn reads_as_a_sentence() {
        let footprint = Footprint { parameters: 3 << 19, activations: 1 << 20, ..Footprint::default() };
        assert_eq!(
            footprint.to_string(),
            "1.50 MiB of parameters, 0.00 MiB of gradients, 0.00 MiB of optimizer state, 0.00 MiB of buffers for \
             communication, 1.00 MiB of activations"
        );
        assert_eq!(footprint.total(), 5 << 19);
        let footprint = Footprint { start: 3 << 20, ..footprint };
        let text = footprint.to_string();
        assert!(text.ends_with("; 3.00 MiB at the start, when it makes its parameters whole"), "{text}");
        assert_eq!((footprint.total(), footprint.training(), footprint.least()), (3 << 20, 5 << 19, 3 << 20));
    }

    #[test]
    fn the_start_makes_parameters_whole_on_every_rank() {
        // Once as they are made and once in their units, whatever is sharded later.
        for zero in 0..=3 {
            assert_eq!(footprint(&plan("data=4", zero), 2).start, 2 * 4 * 800, "zero {zero}");
        }
        let sharded = footprint(&plan("data=4", 3), 0);
        assert!(sharded.least() == sharded.start && sharded.start > 2 * sharded.parameters, "{sharded:?}");
        let split = Load { drawn: 900, ..load() };
        let plan = plan("data=1", 0);
        assert_eq!(plan.footprint(&plan.pipeline().unwrap(), 0, &split, 2).start, 4 * (2 * 800 + 900));
    }
}
