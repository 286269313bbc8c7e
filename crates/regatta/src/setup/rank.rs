//! Creates a rank's engine: its groups, its blocks, and its part of the model.

use crate::autograd::Compute;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::parallel::{Engine, Groups, RankPlan};
use crate::params::{ParamBuilder, ParamStore, Placement};
use regatta_comm::Group;
use regatta_plan::Plan;
use std::sync::Arc;

/// Creates this rank's part of the model of `config` for `vocab` tokens or classes, with initial weights from `seed`.
/// All ranks of `group` call it.
///
/// # Errors
/// The model does not support the plan, the device does not exist, or communication fails.
pub(crate) fn engine(config: &Config, plan: &Plan, group: &Group, vocab: usize, seed: u64) -> Result<Engine> {
    config.check_plan(plan, vocab)?;
    let train = &config.train;
    let compute = Compute::open(train.device, train.precision, group.local_rank())?;
    let groups = Groups::connect(group, plan)?;
    let placement = Placement {
        mesh: plan.mesh.clone(),
        layout: plan.layout.clone(),
        rank: group.rank(),
        tensor: groups.tensor().cloned(),
        sequence: plan.sequence,
    };
    let params = config.model.describe(vocab, placement.clone())?;
    let rank = RankPlan::new(params, plan, &config.model.costs(vocab), group.rank())?;
    let gathers_on_use = plan.exchange().gathers_on_use();
    let store = ParamStore::new(Arc::new(rank.units.clone()), rank.shard, gathers_on_use);
    let params = ParamBuilder::filling(seed, placement, Some(rank.blocks()), store);
    let model = config.model.build(vocab, params, &compute)?;
    let has_undeclared = model.has_undeclared;
    let mut engine = Engine::new(model, rank, plan, groups, compute)?;
    if has_undeclared {
        if gathers_on_use {
            return Err(Error::Usage(
                "parallel.zero = 3 needs a model whose parameters the ParamBuilder creates; use zero 0, 1 or 2".into(),
            ));
        }
        // Their initial values may not depend on the seed alone.
        engine.broadcast_parameters()?;
    }
    Ok(engine)
}
