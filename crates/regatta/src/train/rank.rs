//! One rank's part of a plan: its groups, its blocks, and how its layers are split.

use super::config::Config;
use crate::autograd::Compute;
use crate::error::{Error, Result};
use crate::layers::{Init, Placement};
use crate::models::Model;
use crate::parallel::{Axes, Engine};
use regatta_comm::Group;
use regatta_plan::Plan;
use std::ops::Range;

/// One rank's part of a plan, before it has a model.
pub(crate) struct Rank {
    plan: Plan,
    axes: Axes,
    cut: Vec<Range<usize>>,
    compute: Compute,
}

impl Rank {
    /// Connects the rank. All ranks of `group` call it.
    ///
    /// # Errors
    /// A plan that the model cannot follow, a device that is not there, or a failure of communication.
    pub(crate) fn new(config: &Config, plan: &Plan, group: &Group, vocab: usize) -> Result<Self> {
        let usage = |error: regatta_plan::PlanError| Error::Usage(error.to_string());
        config.check_plan(plan, vocab).map_err(usage)?;
        let costs: Vec<f64> = config.model.costs(vocab).iter().map(|cost| cost.flops).collect();
        let train = &config.train;
        let compute = Compute::open(train.device, train.precision, group.local_rank())?;
        let axes = Axes::new(group, &plan.mesh, plan.shards() > 1)?;
        Ok(Self { cut: plan.cut(&costs).map_err(usage)?, plan: plan.clone(), axes, compute })
    }

    /// For the model of this rank, with weights of `seed`.
    pub(crate) fn init(&self, seed: u64) -> Init {
        let placement = Placement {
            mesh: self.plan.mesh.clone(),
            layout: self.plan.layout.clone(),
            rank: self.axes.world.rank(),
            tensor: self.axes.tensor.clone(),
            sequence: self.plan.sequence,
        };
        let stage = self.axes.coordinate("pipe");
        let own = self.cut.iter().skip(stage).step_by(self.plan.stages());
        Init::placed(seed, placement, Some(own.cloned().flatten().collect()))
    }

    /// The engine of the model that `init` was used for.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub(crate) fn engine<M: Model>(self, model: M, init: &Init) -> Result<Engine<M>> {
        Engine::new(model, init.made(), &self.plan, self.axes, &self.cut, self.compute)
    }
}
