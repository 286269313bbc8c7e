//! How the work is spread, as the command line says it: for training and for looking at plans.

use crate::available::{Available, Bound, available};
use crate::cores;
use crate::error::Result;
use clap::Args;
use regatta::plan::{Mesh, Plan, PlanError, ScheduleKind, default_workers, mebibytes};
use regatta::train::{Config, Loaded, Override};
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
    /// Change a key of the configuration; the flag of a key wins over this.
    #[arg(long = "set", value_name = "key.path=value")]
    sets: Vec<String>,
}

impl PlanFlags {
    /// The configuration's file.
    pub fn path(&self) -> &Path {
        &self.config
    }

    /// The configuration: the file, over it the environment, over it the flags and `more` changes.
    pub fn load(&self, more: impl IntoIterator<Item = Override>) -> Result<Loaded> {
        let mut changes = Override::environment(|name| std::env::var(name).ok());
        changes.extend(self.sets.iter().map(|set| Override::flag("--set", set)));
        let mut flag = |name: &str, key: &str, value: Option<String>| {
            changes.extend(value.map(|value| Override::flag(name, format!("{key}={value}"))));
        };
        flag("--workers", "parallel.workers", self.workers.map(|workers| workers.to_string()));
        flag("--mesh", "parallel.mesh", self.mesh.as_ref().map(Mesh::to_string));
        flag("--zero", "parallel.zero", self.zero.map(|zero| zero.to_string()));
        flag("--schedule", "parallel.schedule", self.schedule.map(|schedule| schedule.to_string()));
        flag("--micro-batches", "train.accumulate", self.micro_batches.map(|micros| micros.to_string()));
        changes.extend(more);
        Ok(Loaded::read(&self.config, &changes)?)
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
        PlanError::TooLarge(_) => error.to_string().into(),
        _ => format!("parallel: {error}").into(),
    })
}

/// Checks that the model can follow the plan and that the plan fits, before anything runs; `vocab` is the data's.
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
    /// This rank, and others of which only the number is known.
    Rank {
        /// This rank.
        rank: usize,
        /// Ranks on this machine.
        local: usize,
    },
}

/// Checks that what the ranks of this machine take whatever the batch is fits its memory, before they take it. Returns a
/// warning where all that they are foretold to take is more than what is free.
pub fn check_machine(config: &Config, plan: &Plan, vocab: usize, here: Here) -> Result<Option<String>> {
    fits(config, plan, vocab, here, &available())
}

fn fits(config: &Config, plan: &Plan, vocab: usize, here: Here, have: &Available) -> Result<Option<String>> {
    // A plan that cannot be is another error, which check() tells.
    let Ok(stages) = config.footprints(plan, vocab) else { return Ok(None) };
    let least: Vec<u64> = stages.iter().map(|stage| stage.least() as u64).collect();
    let most: Vec<u64> = stages.iter().map(|stage| stage.total() as u64).collect();
    let (Some(&smallest), Some(&largest)) = (least.iter().min(), least.iter().max()) else { return Ok(None) };
    let of_each = (plan.world() / stages.len()) as u64;
    let sum = |bytes: &[u64]| {
        bytes.iter().fold(0u64, |sum, bytes| sum.saturating_add(bytes.saturating_mul(of_each)))
    };
    // Where it is not known which stages are here, those that take least.
    let (ranks, together, process, foretold) = match here {
        Here::Processes => (plan.world(), sum(&least), largest, sum(&most)),
        Here::Threads => (plan.world(), sum(&least), sum(&least), sum(&most)),
        Here::Rank { rank, local } => {
            let stage = plan.mesh.coordinate(rank, "pipe");
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
    Ok(have.free.filter(|free| foretold > *free).map(|free| {
        format!(
            "the {ranks} rank(s) of this machine are foretold to take {}, and {} are free: the run may end for want of memory",
            size(foretold),
            size(free)
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_and_what_is_near_is_told() {
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
            assert!(warning.contains("are foretold to take"), "{warning}");
        }
    }
}
