//! Flags that say how the work is spread over ranks, for training and for showing plans.

use crate::available::{Available, Bound, available};
use crate::cores;
use crate::error::Result;
use clap::Args;
use regatta::config::{Config, Loaded, Override};
use regatta::plan::{Axis, Mesh, Plan, PlanError, ScheduleKind, default_workers, mebibytes};
use std::path::{Path, PathBuf};

/// A configuration, and flags that change how its work is spread over ranks.
#[derive(Args)]
pub struct PlanFlags {
    /// The configuration, a TOML file.
    config: PathBuf,
    /// Local workers; default: as many as are fastest on this machine.
    #[arg(long)]
    workers: Option<usize>,
    /// Named axes and their sizes, as in data=2,tensor=2,pipe=2; default: all workers along data.
    #[arg(long)]
    mesh: Option<Mesh>,
    /// What is sharded over data: 1 optimizer state, 2 also gradients, 3 also parameters.
    #[arg(long)]
    zero: Option<u8>,
    /// Schedule of pipeline stages: gpipe, 1f1b, interleaved or zero-bubble.
    #[arg(long)]
    schedule: Option<ScheduleKind>,
    /// Micro-batches of each worker per step, instead of train.accumulate.
    #[arg(long)]
    micro_batches: Option<usize>,
    /// Parameter servers besides the workers; they keep the parameters, as sync.mode says.
    #[arg(long)]
    servers: Option<usize>,
    /// Change a key of the configuration; a key's own flag overrides this.
    #[arg(long = "set", value_name = "key.path=value")]
    sets: Vec<String>,
}

impl PlanFlags {
    /// The configuration's file.
    pub fn path(&self) -> &Path {
        &self.config
    }

    /// Reads the configuration. The environment overrides the file, and the flags and `more` override both.
    pub fn load(&self, more: impl IntoIterator<Item = Override>) -> Result<Loaded> {
        let mut changes = Override::environment(|name| std::env::var(name).ok());
        changes.extend(self.sets.iter().map(|set| Override::flag("--set", set)));
        let mut flag = |name: &str, key: &str, value: Option<String>| {
            changes.extend(value.map(|value| Override::flag(name, format!("{key}={value}"))));
        };
        flag("--workers", "parallel.workers", self.workers.map(|workers| workers.to_string()));
        flag("--servers", "sync.servers", self.servers.map(|servers| servers.to_string()));
        flag("--mesh", "parallel.mesh", self.mesh.as_ref().map(Mesh::to_string));
        flag("--zero", "parallel.zero", self.zero.map(|zero| zero.to_string()));
        flag("--schedule", "parallel.schedule", self.schedule.map(|schedule| schedule.to_string()));
        flag(
            "--micro-batches",
            "train.accumulate",
            self.micro_batches.map(|micro_batches| micro_batches.to_string()),
        );
        changes.extend(more);
        Ok(Loaded::read(&self.config, &changes)?)
    }
}

/// How many workers to start: as many as the configuration asks for, as its mesh has, or as are fastest on this machine.
pub fn workers(config: &Config) -> Result<usize> {
    let batch = config.train.batch.map(|batch| batch / config.train.accumulate.max(1));
    let mesh = config.parallel.mesh.as_deref().map(str::parse::<Mesh>).transpose()?;
    let workers = config.parallel.workers.or(mesh.map(|mesh| mesh.size()));
    Ok(workers.unwrap_or_else(|| default_workers(cores::available(), batch)))
}

/// The workers of a job of `ranks` ranks; the others, its last, are its parameter servers.
pub fn workers_of(config: &Config, ranks: usize) -> Result<usize> {
    let servers = config.sync.servers;
    Plan::workers_of(ranks, servers).ok_or_else(|| {
        format!(
            "sync: a job of {ranks} rank(s) with {servers} parameter server(s) has no worker: start more ranks, or give \
             fewer --servers"
        )
        .into()
    })
}

/// The plan of a job of `workers` workers.
pub fn plan(config: &Config, workers: usize) -> Result<Plan> {
    config.plan(workers).map_err(|error| match error {
        PlanError::BatchDoesNotDivide { .. } => format!("train.batch: {error}").into(),
        PlanError::TooLarge(_) => error.to_string().into(),
        _ => format!("parallel: {error}").into(),
    })
}

/// Checks before anything runs that the plan suits the model and fits into memory; `vocab` is the data's.
pub fn check(config: &Config, plan: &Plan, vocab: usize) -> Result<()> {
    config.check_plan(plan, vocab).map_err(|error| match error {
        PlanError::TooLarge(_) => error.to_string(),
        _ => format!("parallel: {error}"),
    })?;
    Ok(config.check_memory(plan, vocab)?)
}

/// The ranks of a job on this machine.
#[derive(Clone, Copy)]
pub enum Here {
    /// All of them, as processes of their own.
    Processes,
    /// All of them, as threads of this process.
    Threads,
    /// This rank, and others of which only the number is known; another launcher has started them.
    Rank {
        /// This rank.
        rank: usize,
        /// Ranks on this machine.
        local: usize,
    },
}

/// Checks that the memory which the ranks of this machine need for any batch fits, before they allocate it. Returns a
/// warning if the memory predicted for this batch is more than what is free.
pub fn check_machine(config: &Config, plan: &Plan, vocab: usize, here: Here) -> Result<Option<String>> {
    fits(config, plan, vocab, here, &available())
}

fn fits(config: &Config, plan: &Plan, vocab: usize, here: Here, have: &Available) -> Result<Option<String>> {
    // An impossible plan is another error, which `check` reports.
    let Ok(stages) = config.footprints(plan, vocab) else { return Ok(None) };
    let least: Vec<u64> = stages.iter().map(|stage| stage.least() as u64).collect();
    let most: Vec<u64> = stages.iter().map(|stage| stage.total() as u64).collect();
    let (Some(&smallest), Some(&largest)) = (least.iter().min(), least.iter().max()) else { return Ok(None) };
    let ranks_of_stage = (plan.world() / stages.len()) as u64;
    let sum = |bytes: &[u64]| {
        bytes.iter().fold(0u64, |sum, bytes| sum.saturating_add(bytes.saturating_mul(ranks_of_stage)))
    };
    // If it is not known which stages are here, assume those that need least.
    let (ranks, together, process, predicted) = match here {
        Here::Processes => (plan.world(), sum(&least), largest, sum(&most)),
        Here::Threads => (plan.world(), sum(&least), sum(&least), sum(&most)),
        Here::Rank { rank, local } => {
            let stage = plan.mesh.coordinate(rank, Axis::Pipe);
            let fewest = most.iter().min().copied().unwrap_or(0);
            let together = smallest.saturating_mul(local as u64);
            (local, together, least[stage], fewest.saturating_mul(local as u64))
        }
    };
    let size = |bytes: u64| mebibytes(bytes as usize);
    let kinds = "parameters, gradients and optimizer state";
    let advice = "use a smaller model, more machines, or a plan that spreads it (--zero, --mesh)";
    let refuse = |bytes: u64, whose: String, bound: &Bound| {
        format!(
            "{whose} at least {} ({kinds}), but {} is {}: {advice}",
            size(bytes),
            bound.by,
            size(bound.bytes)
        )
    };
    if let Some(bound) = have.process.as_ref().filter(|bound| process > bound.bytes) {
        let whose =
            if matches!(here, Here::Threads) { "the ranks of this process take" } else { "a rank takes" };
        return Err(refuse(process, whose.into(), bound).into());
    }
    if let Some(bound) = have.together.as_ref().filter(|bound| together > bound.bytes) {
        return Err(refuse(together, format!("the {ranks} rank(s) of this machine take"), bound).into());
    }
    Ok(have.free.filter(|free| predicted > *free).map(|free| {
        format!(
            "the {ranks} rank(s) of this machine are predicted to take {}, but {} are free: the run may run out of \
             memory",
            size(predicted),
            size(free)
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_refused_and_little_free_memory_warned_of() {
        let text = "[model]\nkind='gpt'\nembed=256\n[data]\npath='x'\n[train]\nbatch=8\n";
        let sets = ["parallel.mesh=data=2".to_string()];
        let config = Config::parse(text, "test", &sets).unwrap();
        let plan = config.plan(2).unwrap();
        let stage = config.footprints(&plan, 100).unwrap()[0];
        let (least, most) = (stage.least() as u64, stage.total() as u64);
        let bound = |bytes: u64| Some(Bound { bytes, by: "a limit" });
        let fits =
            |here, have: Available| fits(&config, &plan, 100, here, &have).map_err(|error| error.to_string());
        let ranks = Here::Rank { rank: 1, local: 2 };
        for here in [Here::Processes, Here::Threads, ranks] {
            let none = Available::default();
            assert_eq!(fits(here, none.clone()), Ok(None));
            assert_eq!(fits(here, Available { together: bound(2 * least), ..none.clone() }), Ok(None));
            let error = fits(here, Available { together: bound(2 * least - 1), ..none.clone() }).unwrap_err();
            assert!(error.contains("the 2 rank(s) of this machine take at least"), "{error}");
            assert!(error.contains("a limit is") && error.contains(&mebibytes(2 * stage.least())), "{error}");
            let all = if matches!(here, Here::Threads) { 2 * least } else { least };
            assert_eq!(fits(here, Available { process: bound(all), ..none.clone() }), Ok(None));
            assert!(fits(here, Available { process: bound(all - 1), ..none.clone() }).is_err());
            assert_eq!(fits(here, Available { free: Some(2 * most), ..none.clone() }), Ok(None));
            let warning = fits(here, Available { free: Some(2 * most - 1), ..none }).unwrap().unwrap();
            assert!(warning.contains("are predicted to take"), "{warning}");
        }
    }
}
