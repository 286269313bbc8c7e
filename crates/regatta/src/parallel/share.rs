//! What one rank holds and does under a plan, as far as it can be told on paper: the engine sets itself up by it, and
//! what a step communicates is counted from it.

use super::units::Units;
use crate::layers::Made;
use regatta_plan::{Plan, PlanError, Recompute, Schedule, Task};
use std::ops::Range;

/// One rank's share of a plan.
#[derive(Debug, Clone)]
pub struct Share {
    /// Its stage in the pipeline.
    pub stage: usize,
    /// What the stages do in a step.
    pub schedule: Schedule,
    /// The blocks of each chunk of its stage.
    pub chunks: Vec<Range<usize>>,
    /// Its parameters.
    pub units: Units,
    /// What is sharded over `data`: the plan's `zero`, or 0 where there is one rank to shard over.
    pub zero: u8,
    /// By unit: the stages that share it, where these are several.
    pub ties: Vec<Vec<usize>>,
    /// By unit: how often a micro-batch of a step leaves gradients for it.
    pub flushes: Vec<usize>,
}

impl Share {
    /// That of the rank at `stage`, which has `made` these parameters; `cut` are the blocks of every virtual stage.
    ///
    /// # Errors
    /// A number of chunks that the schedule does not take.
    pub fn new(made: Vec<Made>, plan: &Plan, cut: &[Range<usize>], stage: usize) -> Result<Self, PlanError> {
        let schedule = plan.pipeline()?;
        let chunks: Vec<_> =
            (0..schedule.chunks).map(|chunk| cut[schedule.virtual_stage(stage, chunk)].clone()).collect();
        let zero = if plan.shards() > 1 { plan.zero } else { 0 };
        let units = Units::of_plan(made, &chunks, plan);
        let stage_of = |block: usize| {
            let held = cut.iter().position(|blocks| blocks.contains(&block));
            held.map_or(0, |virtual_stage| schedule.place(virtual_stage).0)
        };
        let stages_of = |shared: &[usize]| {
            let mut stages: Vec<usize> = shared.iter().map(|&block| stage_of(block)).collect();
            stages.sort_unstable();
            stages.dedup();
            if stages.len() > 1 { stages } else { vec![] }
        };
        let touched = |blocks: &[usize]| {
            chunks.iter().filter(|chunk| blocks.iter().any(|block| chunk.contains(block))).count()
        };
        Ok(Self {
            stage,
            ties: units.units.iter().map(|unit| stages_of(&unit.shared)).collect(),
            flushes: units.units.iter().map(|unit| touched(&unit.blocks) * plan.accumulate).collect(),
            schedule,
            chunks,
            units,
            zero,
        })
    }

    /// The blocks in the order in which a step uses their parameters, each going forward or not.
    pub fn uses(&self, recompute: Recompute) -> Vec<(usize, bool)> {
        uses(&self.schedule, self.stage, &self.chunks, recompute)
    }

    /// The chunk that holds `block`, if this rank does.
    pub fn chunk_of(&self, block: usize) -> Option<usize> {
        self.chunks.iter().position(|chunk| chunk.contains(&block))
    }
}

/// The blocks of `stage` in the order in which a step uses their parameters, each going forward or not; `chunks` are the
/// blocks of its chunks.
pub fn uses(
    schedule: &Schedule,
    stage: usize,
    chunks: &[Range<usize>],
    recompute: Recompute,
) -> Vec<(usize, bool)> {
    let mut uses = vec![];
    for task in &schedule.tasks[stage] {
        let blocks = chunks[task.chunk()].clone();
        match task {
            Task::Forward { .. } => uses.extend(blocks.map(|block| (block, true))),
            Task::Backward { .. } | Task::BackwardInput { .. } => {
                if recompute == Recompute::All {
                    let again = run_again(schedule, stage, task.chunk(), blocks.clone());
                    uses.extend(again.map(|block| (block, true)));
                }
                uses.extend(blocks.rev().map(|block| (block, false)));
            }
            Task::BackwardWeight { .. } => {}
        }
    }
    uses
}

/// The blocks of a chunk that run again before it goes backward, where only its input is kept: all that have one behind
/// them, and the one before the loss.
pub fn run_again(schedule: &Schedule, stage: usize, chunk: usize, blocks: Range<usize>) -> Range<usize> {
    let last = schedule.virtual_stage(stage, chunk) + 1 == schedule.virtual_stages();
    blocks.start..blocks.end - usize::from(!last && !blocks.is_empty())
}
