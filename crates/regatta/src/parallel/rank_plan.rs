//! One rank's part of a plan, computed without running anything. The engine is set up from it, and a step's communication
//! is predicted from it.

use crate::models::BlockCost;
use crate::params::{PlacedParam, Units};
use regatta_plan::{Axis, Plan, PlanError, Recompute, Schedule, Task};
use std::ops::Range;

/// One rank's part of a plan.
#[derive(Debug, Clone)]
pub struct RankPlan {
    /// The rank's stage in the pipeline.
    pub stage: usize,
    /// The index of the shard that the rank owns in every unit.
    pub shard: usize,
    /// The tasks of all stages in a step.
    pub schedule: Schedule,
    /// The blocks of each chunk of the rank's stage.
    pub chunks: Vec<Range<usize>>,
    /// The rank's parameters.
    pub units: Units,
    /// By unit: the stages that share it; empty if only one uses it.
    pub ties: Vec<Vec<usize>>,
    /// By unit: how often its gradients are complete for a micro-batch and a chunk, in a step.
    pub flushes: Vec<usize>,
}

impl RankPlan {
    /// The part of `rank`. `params` are its parts of the parameters of all blocks, and `costs` the costs of all blocks, by
    /// which the model is cut into stages.
    ///
    /// # Errors
    /// There are more stages than blocks, or the schedule does not support the plan's number of chunks.
    pub fn new(
        mut params: Vec<PlacedParam>,
        plan: &Plan,
        costs: &[BlockCost],
        rank: usize,
    ) -> Result<Self, PlanError> {
        let cut = plan.cut(&costs.iter().map(|cost| cost.flops).collect::<Vec<_>>())?;
        let (schedule, stage) = (plan.pipeline()?, plan.mesh.coordinate(rank, Axis::Pipe));
        let chunks: Vec<_> =
            (0..schedule.chunks).map(|chunk| cut[schedule.virtual_stage(stage, chunk)].clone()).collect();
        let held = |block: &usize| chunks.iter().any(|chunk| chunk.contains(block));
        params.retain(|param| param.blocks.iter().any(held));
        let units = Units::of_plan(params, &chunks, plan);
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
            shard: if plan.shards() > 1 { plan.mesh.coordinate(rank, Axis::Data) } else { 0 },
            ties: units.units.iter().map(|unit| stages_of(&unit.shared)).collect(),
            flushes: units.units.iter().map(|unit| touched(&unit.blocks) * plan.accumulate).collect(),
            schedule,
            chunks,
            units,
        })
    }

    /// The rank's blocks.
    pub fn blocks(&self) -> Vec<usize> {
        self.chunks.iter().cloned().flatten().collect()
    }

    /// The rank's blocks in the order in which a step uses their parameters.
    pub fn uses(&self, recompute: Recompute) -> Vec<BlockUse> {
        uses(&self.schedule, self.stage, &self.chunks, recompute)
    }
}

/// A use of a block's parameters in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockUse {
    /// The block.
    pub block: usize,
    /// The pass that uses it.
    pub pass: Pass,
}

/// A pass through blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// From the first block to the last.
    Forward,
    /// From the last block to the first.
    Backward,
}

/// The blocks of `stage` in the order in which a step uses their parameters; `chunks` has the blocks of each chunk.
pub fn uses(
    schedule: &Schedule,
    stage: usize,
    chunks: &[Range<usize>],
    recompute: Recompute,
) -> Vec<BlockUse> {
    let forward = |block| BlockUse { block, pass: Pass::Forward };
    let backward = |block| BlockUse { block, pass: Pass::Backward };
    let mut uses = vec![];
    for task in &schedule.tasks[stage] {
        let blocks = chunks[task.chunk()].clone();
        match task {
            Task::Forward { .. } => uses.extend(blocks.map(forward)),
            Task::Backward { .. } | Task::BackwardInput { .. } => {
                if recompute == Recompute::All {
                    let recomputed = recomputed_blocks(schedule, stage, task.chunk(), blocks.clone());
                    uses.extend(recomputed.map(forward));
                }
                uses.extend(blocks.rev().map(backward));
            }
            Task::BackwardWeight { .. } => {}
        }
    }
    uses
}

/// The blocks of a chunk that run forward again before its backward pass, if only the input of the chunk is kept. These are
/// all but the last, which backward recomputes itself; in the last chunk, which computes the loss, they are all blocks.
pub fn recomputed_blocks(
    schedule: &Schedule,
    stage: usize,
    chunk: usize,
    blocks: Range<usize>,
) -> Range<usize> {
    let last = schedule.virtual_stage(stage, chunk) + 1 == schedule.virtual_stages();
    blocks.start..blocks.end - usize::from(!last && !blocks.is_empty())
}
