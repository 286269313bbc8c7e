//! Parameter servers: ranks that keep the parameters and the optimizer, to which workers push gradients.

use crate::exchange::{Content, ExchangePlan, Kept, Operation, UnitOperation, UnitUse};
use crate::{AxisSet, Load, Plan};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();

/// Whom a worker waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SyncMode {
    /// For all workers, in every step: the servers update with the mean of their gradients.
    #[default]
    Sync,
    /// For nobody: the servers update with the gradients of each worker as they come (Dean et al. 2012, "Large Scale
    /// Distributed Deep Networks", section 4.1).
    Async,
    /// For workers that are more than a number of steps behind (Ho et al. 2013, "More Effective Distributed ML via a Stale
    /// Synchronous Parallel Parameter Server").
    Ssp,
}

impl SyncMode {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Async => "async",
            Self::Ssp => "ssp",
        }
    }
}

impl fmt::Display for SyncMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The parameter servers of a job. They are its last ranks, behind those of the mesh (Li et al. 2014, "Scaling Distributed
/// Machine Learning with the Parameter Server").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Servers {
    /// Their number; 0: workers exchange gradients with each other.
    pub count: usize,
    /// Whom a worker waits for.
    pub mode: SyncMode,
    /// With [`SyncMode::Ssp`]: steps that a worker may be ahead of the slowest, at least 1.
    pub staleness: u64,
}

impl Servers {
    /// Whether workers train each at its own speed.
    pub fn is_free(self) -> bool {
        self.count > 0 && self.mode != SyncMode::Sync
    }

    /// Of so many workers, those that a job goes on without: nobody waits for them, and the first one leads.
    pub fn spared(self, workers: usize) -> Range<usize> {
        if self.is_free() { 1..workers } else { 0..0 }
    }
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parameter server{}", self.count, if self.count == 1 { "" } else { "s" })?;
        match self.mode {
            SyncMode::Sync => Ok(()),
            SyncMode::Async => write!(f, ", asynchronous"),
            SyncMode::Ssp => write!(f, ", at most {} steps ahead of the slowest worker", self.staleness),
        }
    }
}

/// Servers keep the parameters and the optimizer; workers keep a copy of the parameters.
#[derive(Debug, Clone, Copy)]
pub struct Served;

impl ExchangePlan for Served {
    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation> {
        let one = |content, operation, what| UnitOperation {
            content,
            over: AxisSet::WORKERS,
            operation,
            count: 1,
            every: 1,
            numbers: unit.len,
            width: F32,
            what,
        };
        vec![
            one(Content::Gradients, Operation::ToServers, "gradients, to the servers"),
            one(Content::Parameters, Operation::FromServers, "parameters, from the servers"),
        ]
    }

    fn kept(&self, numbers: usize) -> Kept {
        Kept { parameters: numbers, gradients: 0, updated: 0 }
    }

    fn buffers(&self, _: &Plan, load: &Load) -> usize {
        // All gradients may wait for the servers, and all parameters for the next forward.
        2 * load.units.iter().sum::<usize>()
    }
}

impl Plan {
    /// The workers' part of a job of `world` ranks whose last ranks are its servers; none if no worker is left.
    pub fn workers_of(world: usize, servers: usize) -> Option<usize> {
        world.checked_sub(servers).filter(|workers| *workers > 0)
    }

    /// Ranks of the job: those of the mesh and the servers.
    pub fn ranks(&self) -> usize {
        self.world() + self.servers.count
    }
}
