//! Creates a rank's engine: its groups, its blocks, and its part of the model.

use crate::autograd::Compute;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::parallel::{Engine, Groups, RankPlan};
use crate::params::{ParamBuilder, ParamStore, Placement};
use crate::servers::{ServerLink, Shard};
use regatta_comm::Group;
use regatta_plan::{Mesh, Plan};
use std::path::Path;
use std::sync::Arc;

/// Creates this rank's part of the model of `config` for `vocab` tokens or classes, with initial weights from `seed`.
/// All ranks of `group` call it.
///
/// # Errors
/// The model does not support the plan, the device does not exist, or communication fails.
pub(crate) fn engine(
    config: &Config,
    plan: &Plan,
    (group, servers): (&Group, Option<&ServerLink>),
    vocab: usize,
    seed: u64,
) -> Result<Engine> {
    config.check_plan(plan, vocab)?;
    // A worker that waits for nobody is a job of its own.
    let alone = plan.servers.is_free().then(|| Plan { mesh: Mesh::data(1), ..plan.clone() });
    let plan = alone.as_ref().unwrap_or(plan);
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
    let servers = servers.map(|link| (link.clone(), config.optimizer.moments()));
    let mut engine = Engine::new(model, rank, plan, (groups, servers), compute)?;
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

/// The `index`-th server's shard of the model of `config` for `vocab` tokens or classes. Its numbers come from the first
/// worker. With `offload`, the optimizer's state is in files in that folder.
///
/// # Errors
/// The model does not support the plan, or the files cannot be created.
pub(crate) fn shard(
    config: &Config,
    plan: &Plan,
    index: usize,
    vocab: usize,
    offload: Option<&Path>,
) -> Result<Shard> {
    config.check_plan(plan, vocab)?;
    let params = config.model.describe(vocab, Placement::whole())?;
    let rank = RankPlan::new(params, plan, &config.model.costs(vocab), 0)?;
    let units = Arc::new(rank.units.sharded_over(plan.servers.count));
    Shard::new(units, index, &config.optimizer, offload)
}
