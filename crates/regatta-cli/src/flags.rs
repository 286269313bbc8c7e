//! How the work is spread, as the command line says it: for training and for looking at plans.

use crate::cores;
use crate::error::Result;
use clap::Args;
use regatta::plan::{Mesh, Plan, PlanError, ScheduleKind, default_workers};
use regatta::train::Config;
use std::path::{Path, PathBuf};

/// A configuration, and flags that change how its work is spread.
#[derive(Args)]
pub struct PlanFlags {
    /// The configuration, a TOML file.
    config: PathBuf,
    /// Local workers; left out: what the machine serves best.
    #[arg(long)]
    workers: Option<usize>,
    /// Named axes and their sizes, as in data=2,tensor=2,pipe=2; left out: all workers along data.
    #[arg(long)]
    mesh: Option<Mesh>,
    /// What is sharded over data: 1 optimizer state, 2 gradients too, 3 parameters too.
    #[arg(long)]
    zero: Option<u8>,
    /// In which order pipeline stages work: gpipe, 1f1b, interleaved or zero-bubble.
    #[arg(long)]
    schedule: Option<ScheduleKind>,
    /// Micro-batches that each worker's samples are cut into, instead of train.accumulate.
    #[arg(long)]
    micro_batches: Option<usize>,
    /// Change a key of the configuration.
    #[arg(long = "set", value_name = "key.path=value")]
    sets: Vec<String>,
}

impl PlanFlags {
    /// The configuration's file.
    pub fn path(&self) -> &Path {
        &self.config
    }

    /// The configuration, with the flags and with `more` changes.
    pub fn config(&self, more: impl IntoIterator<Item = String>) -> Result<Config> {
        let mut sets = self.sets.clone();
        sets.extend(self.workers.map(|workers| format!("parallel.workers={workers}")));
        sets.extend(self.mesh.as_ref().map(|mesh| format!("parallel.mesh={mesh}")));
        sets.extend(self.zero.map(|zero| format!("parallel.zero={zero}")));
        sets.extend(self.schedule.map(|schedule| format!("parallel.schedule={schedule}")));
        sets.extend(self.micro_batches.map(|micros| format!("train.accumulate={micros}")));
        sets.extend(more);
        Ok(Config::load(&self.config, &sets)?)
    }
}

/// The ranks of a job that nobody else has started: as many as asked for, or as the mesh has, or as the machine serves
/// best.
pub fn workers(config: &Config) -> Result<usize> {
    let batch = config.train.batch.map(|batch| batch / config.train.accumulate.max(1));
    let mesh = config.parallel.mesh.as_deref().map(str::parse::<Mesh>).transpose()?;
    let workers = config.parallel.workers.or(mesh.map(|mesh| mesh.size()));
    Ok(workers.unwrap_or_else(|| default_workers(cores::available(), batch)))
}

/// The plan of a job of `workers` ranks.
pub fn plan(config: &Config, workers: usize) -> Result<Plan> {
    config.plan(workers).map_err(|error| match error {
        PlanError::BatchDoesNotDivide { .. } => format!("train.batch: {error}").into(),
        _ => format!("parallel: {error}").into(),
    })
}

/// Checks that the model can follow the plan and that the plan fits, before anything runs; `vocab` is the data's.
pub fn check(config: &Config, plan: &Plan, vocab: usize) -> Result<()> {
    config.check_plan(plan, vocab).map_err(|error| format!("parallel: {error}"))?;
    Ok(config.check_memory(plan, vocab)?)
}
