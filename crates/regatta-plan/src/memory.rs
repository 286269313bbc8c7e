//! An estimate of how much memory a plan needs on a rank, by kind, before anything runs.
//!
//! Parameters, gradients and optimizer state follow Rajbhandari et al. 2020, "ZeRO", section 5, with f32 for
//! everything. AdamW needs 4 + 4 + 8 bytes per parameter. Stage 1 divides the 8 bytes by the ranks of the axis
//! `data`, stage 2 also the 4 bytes of gradients, and stage 3 everything. Activations are those of the micro-batches
//! that the schedule holds at the same time.
//!
//! Starting a job needs no more memory: a rank initialises only the parameters that it keeps, in place.

use crate::{Plan, Recompute, Schedule, Task};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of one element.
const ELEMENT: usize = size_of::<f32>();

/// Memory in bytes on one rank, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Footprint {
    /// Parameters that are kept.
    pub parameters: usize,
    /// Gradients that are kept.
    pub gradients: usize,
    /// Moments of the optimizer; 0 if they are in a file.
    pub optimizer: usize,
    /// The peak of temporary buffers: gathered parameters, and gradients that are being reduced.
    pub working: usize,
    /// The peak of activations that forward keeps for backward.
    pub activations: usize,
}

impl Footprint {
    /// The sum of all kinds, in bytes.
    pub fn total(&self) -> usize {
        [self.gradients, self.optimizer, self.working, self.activations]
            .into_iter()
            .fold(self.parameters, usize::saturating_add)
    }

    /// Parameters, gradients and moments together, in bytes. This part depends on neither the batch nor the schedule.
    pub fn least(&self) -> usize {
        self.parameters.saturating_add(self.gradients).saturating_add(self.optimizer)
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
        Ok(())
    }
}

/// A number of bytes as text in mebibytes, as in `1.50 MiB`.
pub fn mebibytes(bytes: usize) -> String {
    format!("{:.2} MiB", bytes as f64 / (1 << 20) as f64)
}

/// What a rank of a stage would hold if nothing were sharded over the axis `data`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Load {
    /// Elements of every unit. A unit is a set of parameters that are gathered together and whose gradients are
    /// reduced together.
    pub units: Vec<usize>,
    /// The blocks of each chunk, in order.
    pub chunks: Vec<Vec<BlockLoad>>,
}

/// What a rank holds of a block.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BlockLoad {
    /// Elements of the units that the block uses.
    pub parameters: usize,
    /// Elements that forward keeps for backward, per sample.
    pub kept: f64,
    /// Elements of the block's input, per sample.
    pub input: f64,
}

impl Plan {
    /// Memory of a rank of `stage` that has `load`. `moments` is the number of optimizer moments per parameter: 2 for
    /// AdamW, 1 for SGD with momentum, 0 for SGD without. `schedule` is the plan's [`pipeline`](Self::pipeline).
    pub fn footprint(&self, schedule: &Schedule, stage: usize, load: &Load, moments: usize) -> Footprint {
        let exchange = self.exchange();
        let kept = exchange.kept(load.units.iter().sum());
        let bytes = |numbers: usize| numbers.saturating_mul(ELEMENT);
        Footprint {
            parameters: bytes(kept.parameters),
            gradients: bytes(kept.gradients),
            optimizer: if self.offload { 0 } else { moments.saturating_mul(bytes(kept.updated)) },
            working: bytes(exchange.buffers(self, load)),
            activations: bytes(self.activations(schedule, stage, load)),
        }
    }

    /// The most elements of activations that are held at the same time.
    fn activations(&self, schedule: &Schedule, stage: usize, load: &Load) -> usize {
        let rows = self.micro_batch() as f64;
        let is_last = |chunk: usize| schedule.virtual_stage(stage, chunk) + 1 == schedule.virtual_stages();
        // Per sample: elements that are kept between forward and backward, and more that are kept during backward.
        let costs = |chunk: usize| -> (f64, f64) {
            let blocks = load.chunks.get(chunk).map_or(&[][..], |blocks| blocks);
            if self.recompute == Recompute::None {
                return (blocks.iter().map(|block| block.kept).sum(), 0.0);
            }
            // The last block is not recomputed: its backward begins directly after its forward.
            let (last, others) = match blocks.split_last().filter(|_| is_last(chunk)) {
                Some((last, others)) => (last.kept, others),
                None => (0.0, blocks),
            };
            let inputs = others.iter().map(|block| block.input).sum::<f64>() + last;
            let extra = others.iter().map(|block| block.kept).fold(0.0, f64::max);
            if self.recompute == Recompute::Block {
                return (inputs, extra);
            }
            let first = blocks.first().map_or(0.0, |block| block.input);
            (first, inputs + extra)
        };
        let costs: Vec<(f64, f64)> = (0..schedule.chunks).map(costs).collect();
        let (mut held, mut peak) = (0.0f64, 0.0f64);
        for task in schedule.tasks.get(stage).into_iter().flatten() {
            let (kept, extra) = costs[task.chunk()];
            match task {
                Task::Forward { .. } => held += kept,
                Task::Backward { .. } | Task::BackwardInput { .. } => peak = peak.max(held + extra),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, ScheduleKind};

    /// Four units, each with one block.
    fn load() -> Load {
        let block = |parameters| BlockLoad { parameters, kept: 10.0, input: 1.0 };
        let chunks = vec![[400, 100, 100, 200].map(block).to_vec()];
        Load { units: vec![400, 100, 100, 200], chunks }
    }

    fn plan(mesh: &str, zero: u8) -> Plan {
        Plan { zero, ..Plan::new(mesh.parse().unwrap(), Batch::global(16, 4), 25 << 20).unwrap() }
    }

    fn footprint(plan: &Plan, moments: usize) -> Footprint {
        plan.footprint(&plan.pipeline().unwrap(), 0, &load(), moments)
    }

    #[test]
    fn states_agree_with_the_zero_paper() {
        // AdamW in f32: 4 + 4 + 8, 4 + 4 + 8/N, 4 + 4/N + 8/N and 16/N bytes per parameter.
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
        // SGD has no state, or one velocity per parameter. State in a file takes no memory.
        for (moments, bytes) in [(0, 0), (1, 4 * all / 2)] {
            assert_eq!(footprint(&plan("data=2", 1), moments).optimizer, bytes);
        }
        assert_eq!(footprint(&Plan { offload: true, ..plan("data=2", 1) }, 2).optimizer, 0);
        // With one rank along `data`, nothing is sharded.
        let alone = footprint(&plan("data=1", 3), 2);
        assert_eq!((alone.parameters, alone.optimizer, alone.working), (4 * all, 8 * all, 0));
        // Replicas hold the same shards.
        assert_eq!(footprint(&plan("replica=2,data=2", 3), 2).parameters, 4 * all / 2);
    }

    #[test]
    fn buffers_hold_what_is_being_communicated() {
        let working = |plan: Plan| footprint(&plan, 2).working / ELEMENT;
        assert_eq!(working(plan("data=2", 0)), 0);
        assert_eq!(working(plan("data=2", 1)), (600 + 300) + 400);
        assert_eq!(working(plan("data=2", 2)), (600 + 300) + (800 + 400));
        // The current block and the next are gathered, each both in use and in its receive buffer.
        assert_eq!(working(plan("data=2", 3)), 600 + (600 + 300) + (800 + 400));
        assert_eq!(working(Plan { prefetch: 0, ..plan("data=2", 3) }), 400 + (400 + 200) + (800 + 400));
    }

    #[test]
    fn activations_are_those_of_the_micro_batches_held() {
        let bytes = |plan: &Plan, stage: usize| {
            let chunk = load().chunks[0][..2].to_vec();
            let load = Load { units: vec![], chunks: vec![chunk; plan.chunks] };
            plan.footprint(&plan.pipeline().unwrap(), stage, &load, 0).activations / ELEMENT
        };
        let of = |mesh: &str, schedule: ScheduleKind| Plan {
            schedule,
            chunks: if schedule == ScheduleKind::Interleaved { 2 } else { 1 },
            ..plan(mesh, 0)
        };
        // Each of the two blocks keeps 10 elements for each of the 4 samples of a micro-batch.
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
        // With recomputation: the inputs of both blocks and, during backward, everything of one block. The last stage
        // keeps everything of the block before the loss.
        let again = |mesh: &str| Plan { recompute: Recompute::Block, ..of(mesh, ScheduleKind::OneFOneB) };
        assert_eq!(bytes(&again("pipe=2"), 0), (2 * (1 + 1) + 10) * 4);
        assert_eq!(bytes(&again("pipe=2"), 1), (1 + 10 + 10) * 4);
        // Recomputed from the input of the stage: the inputs of both blocks are kept only during backward.
        let all = |mesh: &str| Plan { recompute: Recompute::All, ..again(mesh) };
        assert_eq!(bytes(&all("pipe=2"), 0), (2 + (1 + 1) + 10) * 4);
        assert_eq!(bytes(&all("pipe=2"), 1), (1 + (1 + 10) + 10) * 4);
        // Half the samples in a micro-batch take half the memory.
        let halves = Plan { accumulate: 8, ..of("data=1", ScheduleKind::OneFOneB) };
        assert_eq!(bytes(&halves, 0), one / 2);
    }

    #[test]
    fn a_footprint_is_displayed_by_kind() {
        let footprint = Footprint { parameters: 3 << 19, activations: 1 << 20, ..Footprint::default() };
        assert_eq!(
            footprint.to_string(),
            "1.50 MiB of parameters, 0.00 MiB of gradients, 0.00 MiB of optimizer state, 0.00 MiB of buffers for \
             communication, 1.00 MiB of activations"
        );
        assert_eq!(footprint.total(), 5 << 19);
        assert_eq!(footprint.least(), 3 << 19);
    }
}
