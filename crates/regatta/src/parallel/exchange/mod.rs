//! The exchange between workers: gradients between the backward pass and the update, parameters after the update.
//!
//! The producer of gradients (the engine, or the optimizer wrapper for any Burn module) fills a buffer for each unit and
//! pushes it. An exchange combines the buffers of the workers, and fetches the parameters that other workers updated. Its
//! [`ExchangePlan`](regatta_plan::ExchangePlan) predicts what it communicates and keeps.

mod compressed;
mod gather;
mod islands;
mod mean;
mod pool;
mod served;
mod sharded;

pub use compressed::CompressedExchange;
pub use islands::IslandsExchange;
pub use mean::MeanExchange;
pub use served::ServedExchange;
pub use sharded::ShardedExchange;

use super::carried::Carried;
use super::groups::{Groups, Role};
use crate::error::Result;
use crate::params::ParamStore;
use crate::servers::ServerLink;
use regatta_comm::{Buffer, Group, ReduceOp};
use regatta_plan::{Axis, AxisSet, Plan};
use std::time::Duration;

/// The time that communication took in one step.
#[derive(Debug, Clone, Copy, Default)]
pub struct CommTime {
    /// The time that communication ran.
    pub busy: Duration,
    /// The time that the step waited for communication, because computation did not hide it.
    pub exposed: Duration,
}

impl CommTime {
    /// Adds the time of other communication.
    pub(crate) fn add(&mut self, more: Self) {
        self.busy += more.busy;
        self.exposed += more.exposed;
    }

    /// Adds the time of blocking communication, which computation did not hide.
    pub(crate) fn add_exposed(&mut self, time: Duration) {
        self.busy += time;
        self.exposed += time;
    }
}

/// State of an exchange for checkpoints.
pub type NamedState<'a> = Vec<StateOf<'a>>;

/// One kind of state.
pub struct StateOf<'a> {
    /// Its name in checkpoints.
    pub name: &'static str,
    /// Whose numbers they are.
    pub whose: Whose,
    /// For each unit, numbers for the part that this rank updates.
    pub units: Vec<&'a mut [f32]>,
}

/// Whose numbers a kind of state has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// All workers have the same, or parts of one whole.
    All,
    /// Every worker has numbers of its own.
    Worker(Combine),
    /// Every island has numbers of its own, and their mean is what another number of islands begins with.
    Island,
}

/// What workers begin with when they are another number than those that wrote a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combine {
    /// The mean of what there was: its mean over the workers stays what it was.
    Mean,
    /// The sum.
    Sum,
}

impl StateOf<'_> {
    /// Numbers of this worker alone.
    pub(crate) fn worker(name: &'static str, combine: Combine) -> Self {
        Self { name, whose: Whose::Worker(combine), units: vec![] }
    }
}

/// Combines the gradients of units over the workers, and distributes the updated parameters. All ranks of a group must make
/// the same calls in the same order.
///
/// An exchange need not wait for the other workers: [`combined`](Self::combined) returns none for a unit whose result comes
/// in a later step, or is applied elsewhere.
pub trait GradientExchange: Send {
    /// Begins a step, of which `step` have been done before.
    fn begin(&mut self, _step: u64) {}

    /// A buffer for the gradients of `unit`. Padding is 0, the other elements are undefined.
    ///
    /// # Errors
    /// Memory runs out.
    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>>;

    /// Whether the gradients of each micro-batch are pushed separately, instead of the sum over a step.
    fn takes_each_micro_batch(&self) -> bool {
        false
    }

    /// Starts to combine the gradients of `unit`.
    ///
    /// # Errors
    /// Communication fails.
    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()>;

    /// Waits for the results that this step needs.
    ///
    /// # Errors
    /// Communication fails.
    fn finish(&mut self) -> Result<()>;

    /// The combined gradients of the part of `unit` that this rank updates; none if there is nothing to apply now.
    fn combined(&mut self, unit: usize) -> Option<&mut [f32]>;

    /// Called after this rank has updated its part of `unit`.
    fn updated(&mut self, _unit: usize) {}

    /// The sum of squares of the combined gradients, if other ranks have them.
    fn squares(&self) -> Option<f64> {
        None
    }

    /// The first worker whose gradients of this step are not finite, if another rank has found one.
    fn not_finite(&self) -> Option<usize> {
        None
    }

    /// Makes other ranks update the parameters, if they do that; or, if this step's gradients do not apply, forget them.
    ///
    /// # Errors
    /// Communication fails.
    fn update_elsewhere(&mut self, _applies: bool, _lr: f64, _scale: f64) -> Result<()> {
        Ok(())
    }

    /// Where workers train each at its own speed: steps of all workers that are done, and whether this worker shall end.
    fn progress(&self) -> Option<(u64, bool)> {
        None
    }

    /// Called before the first step, after a checkpoint was read; `updates` were made before.
    ///
    /// # Errors
    /// Communication fails.
    fn ready(&mut self, _store: &mut ParamStore, _updates: u64) -> Result<()> {
        Ok(())
    }

    /// Called after the last step. `ends` says whether the other workers shall end, too.
    ///
    /// # Errors
    /// Communication fails.
    fn leave(&mut self, _ends: bool) -> Result<()> {
        Ok(())
    }

    /// The number of updates at the time of [`before_save`](Self::before_save), if other ranks make them.
    fn updates(&self) -> Option<u64> {
        None
    }

    /// What was sent and received besides the operations of groups.
    fn carried(&self) -> Carried {
        Carried::default()
    }

    /// Called before this rank updates its parts of all units.
    fn before_update(&mut self, _store: &ParamStore) {}

    /// Called after this rank has updated its parts of all units.
    ///
    /// # Errors
    /// Communication fails.
    fn after_update(&mut self, _store: &mut ParamStore) -> Result<()> {
        Ok(())
    }

    /// Whether ranks with the same coordinates but along the axis `replica` may have different parameters now.
    fn has_parted(&self) -> bool {
        false
    }

    /// Starts to fetch the parameters of `unit`, if they are missing or out of date.
    ///
    /// # Errors
    /// Memory runs out.
    fn prefetch(&mut self, _unit: usize, _store: &ParamStore) -> Result<()> {
        Ok(())
    }

    /// Waits until the parameters of `unit` are in the store and up to date.
    ///
    /// # Errors
    /// Communication fails.
    fn acquire(&mut self, _unit: usize, _store: &mut ParamStore) -> Result<()> {
        Ok(())
    }

    /// Called when the parameters of `unit` are not used for a while.
    fn release(&mut self, _unit: usize, _store: &mut ParamStore) {}

    /// Whether parameters are gathered before each use and released after it.
    fn gathers_on_use(&self) -> bool {
        false
    }

    /// Waits for all operations that are in flight. After it, parameters that are not released are up to date.
    ///
    /// # Errors
    /// Communication fails.
    fn wait_all(&mut self, _store: &mut ParamStore) -> Result<()> {
        Ok(())
    }

    /// Called before the state is copied into a checkpoint.
    ///
    /// # Errors
    /// Communication fails.
    fn before_save(&mut self, _store: &mut ParamStore) -> Result<()> {
        Ok(())
    }

    /// The state that a checkpoint must contain besides the optimizer's. It is zero if a checkpoint does not contain it.
    fn state(&mut self) -> NamedState<'_> {
        vec![]
    }

    /// The time that communication took since the last call.
    fn take_time(&mut self) -> CommTime;

    /// Bytes of gradients that are kept from step to step, and the peak bytes of temporary buffers.
    fn bytes(&self) -> (usize, usize);
}

/// Replaces the combined gradients of all units by their mean over `group`, whose ranks update the same parts.
fn mean_over(exchange: &mut dyn GradientExchange, units: usize, group: &Group) -> Result<()> {
    for unit in 0..units {
        if let Some(own) = exchange.combined(unit) {
            group.all_reduce(own, ReduceOp::Mean)?;
        }
    }
    Ok(())
}

/// Connects the exchange of `plan` for the units of `store`: to the parameter servers, whose optimizer has so many moments, or
/// to the other workers.
///
/// # Errors
/// Communication fails.
pub(crate) fn connect(
    plan: &Plan,
    store: &ParamStore,
    groups: &Groups,
    servers: Option<(ServerLink, usize)>,
) -> Result<Box<dyn GradientExchange>> {
    let units = store.units();
    match servers {
        Some((link, moments)) => return Ok(Box::new(ServedExchange::new(link, units.clone(), moments)?)),
        None if plan.servers.count > 0 => return Err(served::no_servers()),
        None => {}
    }
    let local = plan.local();
    let workers = if local.is_some() { Axis::Data.into() } else { AxisSet::WORKERS };
    let compressed = plan.compressed().filter(|_| local.is_none());
    let inner: Box<dyn GradientExchange> = match (plan.sharded(), compressed) {
        (None, None) => {
            let workers = groups.over(workers, Role::Exchange)?;
            let lens = units.units.iter().map(|unit| unit.len).collect();
            Box::new(MeanExchange::new(workers, lens))
        }
        (None, Some(compressed)) => {
            let workers = groups.over(workers, Role::Encoded)?;
            Box::new(CompressedExchange::new(workers, units, compressed.compress)?)
        }
        (Some(sharded), _) => {
            let data = groups.over(Axis::Data.into(), Role::Exchange)?;
            let replica = groups.over_several(Axis::Replica.into(), Role::Exchange)?;
            let replica = replica.filter(|_| local.is_none());
            Box::new(ShardedExchange::new(units.clone(), sharded, data, replica))
        }
    };
    let Some(local) = local else { return Ok(inner) };
    let islands = groups.over(Axis::Replica.into(), Role::Islands)?;
    let outer = (local, plan.compress);
    Ok(Box::new(IslandsExchange::new(inner, islands, units.clone(), store.shard(), outer)?))
}
