//! The engine trains one rank under any plan. It runs the tasks of the pipeline's schedule, block by block.
//!
//! Every block has a graph of its own, separate from those of its neighbours. So one loop serves all strategies: parameters
//! are gathered before a block and released after it (ZeRO 3), gradients are sent after a block has gone backward (data
//! parallelism), the input of a block may come from another rank (pipelines), and a block may be recomputed (recomputation).

mod blocks;
mod evaluate;
mod kept;
mod ownership;
mod step;

pub use kept::MicroBatch;

use super::carried::{Carried, Purpose};
use super::exchange::{self, GradientExchange, NamedState};
use super::gradients::Gradients;
use super::groups::Groups;
use super::links::Links;
use super::rank_plan::{BlockUse, RankPlan};
use super::timeline::Timeline;
use crate::autograd::{Compute, Deferred};
use crate::error::Result;
use crate::models::{Activation, BuiltModel, Model};
use crate::optim::FlatOptimizer;
use crate::params::{Leaves, ParamStore, Units};
use crate::servers::ServerLink;
use kept::{Kept, MicroChunk};
use regatta_plan::{Plan, Schedule};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// A model on one rank, ready to train.
pub struct Engine {
    plan: Plan,
    groups: Groups,
    compute: Compute,
    /// This rank's stage in the pipeline.
    stage: usize,
    schedule: Arc<Schedule>,
    /// The schedule of evaluation: one micro-batch forward through all stages.
    evaluation: Arc<Schedule>,
    /// The blocks of each chunk of this stage.
    chunks: Vec<Range<usize>>,
    model: Box<dyn Model>,
    /// The same model without autodiff.
    evaluator: Box<dyn Model>,
    leaves: Leaves,
    units: Arc<Units>,
    store: ParamStore,
    exchange: Box<dyn GradientExchange>,
    gradients: Gradients,
    links: Links,
    /// The remaining uses of blocks in this step, in order.
    uses: VecDeque<BlockUse>,
    kept: HashMap<MicroChunk, Vec<Kept>>,
    /// The output gradients of chunks whose next chunk is on this rank too.
    local_gradients: HashMap<MicroChunk, Activation>,
    /// The deferred weight gradients of each block.
    deferred: HashMap<MicroChunk, Vec<(usize, Vec<Deferred>)>>,
    in_flight: usize,
    peak_in_flight: usize,
    /// The factor on the loss, and thus on the gradients, in the backward pass.
    pub loss_scale: f64,
    /// The timeline of the last step.
    pub timeline: Timeline,
}

impl Engine {
    /// Sets up `model` on the rank that `rank` describes.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn new(
        model: BuiltModel,
        rank: RankPlan,
        plan: &Plan,
        (groups, servers): (Groups, Option<(ServerLink, usize)>),
        compute: Compute,
    ) -> Result<Self> {
        let RankPlan { stage, schedule, chunks, ties, flushes, .. } = rank;
        let BuiltModel { model, evaluator, leaves, store, .. } = model;
        let units = store.units().clone();
        let evaluation = Schedule::forward_only(schedule.stages, schedule.chunks, 1);
        Ok(Self {
            gradients: Gradients::new(units.clone(), &groups, &ties, flushes)?,
            links: Links::new(&groups, &[&schedule, &evaluation], plan.compress.pipeline)?,
            exchange: exchange::connect(plan, &store, &groups, servers)?,
            plan: plan.clone(),
            groups,
            compute,
            stage,
            schedule: Arc::new(schedule),
            evaluation: Arc::new(evaluation),
            chunks,
            model,
            evaluator,
            leaves,
            units,
            store,
            uses: VecDeque::new(),
            kept: HashMap::new(),
            local_gradients: HashMap::new(),
            deferred: HashMap::new(),
            in_flight: 0,
            peak_in_flight: 0,
            loss_scale: 1.0,
            timeline: Timeline::default(),
        })
    }

    /// The parameters and their units.
    pub fn units(&self) -> &Arc<Units> {
        &self.units
    }

    /// The groups of this rank.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The device of this rank.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// The model without autodiff, for a rank that holds all of it.
    pub fn evaluator(&self) -> &dyn Model {
        &*self.evaluator
    }

    /// Whether islands train on their own.
    pub fn has_islands(&self) -> bool {
        self.plan.local().is_some()
    }

    /// Whether this rank computes the loss.
    pub fn is_last(&self) -> bool {
        self.stage + 1 == self.schedule.stages
    }

    /// The index of the shard that this rank owns in every unit.
    pub fn shard(&self) -> usize {
        self.store.shard()
    }

    /// The shard of `unit` that this rank owns and updates.
    pub fn own(&self, unit: usize) -> &[f32] {
        self.store.own(unit)
    }

    /// The shard of `unit` that this rank owns and updates, to write. The shards of other ranks are fetched before the next
    /// use.
    pub fn own_mut(&mut self, unit: usize) -> &mut [f32] {
        self.exchange.updated(unit);
        self.store.own_mut(unit)
    }

    /// The state of the exchange for checkpoints: by name, for each unit the part that this rank updates.
    pub(crate) fn exchange_state(&mut self) -> NamedState<'_> {
        self.exchange.state()
    }

    /// Makes the state of the exchange ready to be copied. All ranks call it.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn before_save(&mut self) -> Result<()> {
        self.exchange.before_save(&mut self.store)
    }

    /// Broadcasts the parameters of rank 0 to all ranks, which hold the same parameters.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn broadcast_parameters(&mut self) -> Result<()> {
        let world = self.groups.world().clone();
        for unit in 0..self.units.units.len() {
            world.broadcast(self.store.unit_mut(unit), 0)?;
        }
        Ok(())
    }

    /// Whether the vocabulary is split, so that each rank of the tensor axis has the logits of a part of the tokens.
    pub(crate) fn splits_vocabulary(&self) -> bool {
        self.plan.layout.axis(&self.plan.mesh, "vocab").is_some()
    }

    /// The tasks of all stages in a step.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The peak number of micro-batches whose activations were kept, where each counts once for each chunk.
    pub fn peak_in_flight(&self) -> usize {
        self.peak_in_flight
    }

    /// Updates the parameters that this rank owns from their gradients, multiplied by `scale`. The updates of other ranks are
    /// fetched while the next step begins.
    ///
    /// # Errors
    /// Memory runs out, or communication fails.
    pub fn update(&mut self, optimizer: &mut FlatOptimizer, lr: f64, scale: f64) -> Result<()> {
        optimizer.begin();
        self.exchange.update_elsewhere(true, lr, scale)?;
        self.exchange.before_update(&self.store);
        for unit in 0..self.units.units.len() {
            if let Some(gradients) = self.exchange.combined(unit) {
                optimizer.update(unit, self.store.own_mut(unit), gradients, lr, scale);
            }
            self.exchange.updated(unit);
        }
        self.exchange.after_update(&mut self.store)?;
        if self.exchange.gathers_on_use() {
            return Ok(());
        }
        // The next step uses these units first.
        let first = 0..self.units.units.len().min(1 + self.plan.prefetch);
        first.into_iter().try_for_each(|unit| self.exchange.prefetch(unit, &self.store))
    }

    /// The first worker whose gradients of this step are not finite, if another rank has found one.
    pub fn not_finite(&self) -> Option<usize> {
        self.exchange.not_finite()
    }

    /// Forgets the gradients of this step.
    ///
    /// # Errors
    /// Communication fails.
    pub fn skip_update(&mut self) -> Result<()> {
        self.exchange.update_elsewhere(false, 0.0, 0.0)
    }

    /// Where workers train each at its own speed: steps of all workers that are done, and whether this worker shall end.
    pub fn progress(&self) -> Option<(u64, bool)> {
        self.exchange.progress()
    }

    /// Called before the first step, after a checkpoint was read; `updates` were made before.
    ///
    /// # Errors
    /// Communication fails.
    pub fn ready(&mut self, updates: u64) -> Result<()> {
        self.exchange.ready(&mut self.store, updates)
    }

    /// Called after the last step. `ends` says whether workers that train at their own speed shall end, too.
    ///
    /// # Errors
    /// Communication fails.
    pub fn leave(&mut self, ends: bool) -> Result<()> {
        self.exchange.leave(ends)
    }

    /// The number of updates in the checkpoint that is being written, if other ranks make them.
    pub fn updates(&self) -> Option<u64> {
        self.exchange.updates()
    }

    /// Bytes of parameters and of gradients that are kept from step to step, and the peak bytes of temporary buffers.
    pub fn bytes(&self) -> (usize, usize, usize) {
        let (gradients, buffers) = self.exchange.bytes();
        (self.store.bytes(), gradients, buffers)
    }

    /// The communication of this rank's groups so far, by purpose. Kept parameters that other ranks have updated are fetched
    /// first, so that they count in the step that updated them.
    ///
    /// # Errors
    /// Communication fails.
    pub fn carried(&mut self) -> Result<Carried> {
        self.exchange.wait_all(&mut self.store)?;
        let mut carried = self.exchange.carried();
        self.groups.count(&mut carried);
        for group in self.gradients.ties() {
            carried.group(&group.traffic(), |_| Purpose::Gradients);
        }
        for group in self.links.groups() {
            carried.group(&group.traffic(), |_| Purpose::Pipeline);
        }
        Ok(carried)
    }
}
