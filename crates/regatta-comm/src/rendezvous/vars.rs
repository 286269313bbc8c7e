//! The environment variables of launchers, read and checked; those of torchrun and Slurm.

use super::world::{StoreAt, World};
use crate::error::{Error, Result};

/// The environment.
pub(super) struct Vars<'a> {
    pub(super) get: &'a dyn Fn(&str) -> Option<String>,
}

/// Steps of Slurm that are not started by `srun PROGRAM`: an interactive shell, a batch script, and what Slurm runs
/// itself.
const NO_JOB: std::ops::RangeInclusive<u64> = 0xffff_fffa..=0xffff_fffe;

impl Vars<'_> {
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = (self.get)(name) else { return Ok(None) };
        let problem =
            || Error::Env { variable: name.into(), problem: format!("{text:?} is no number in range") };
        text.trim().parse().map(Some).map_err(|_| problem())
    }

    pub(super) fn needed<T: std::str::FromStr>(&self, name: &str, because: &str) -> Result<T> {
        let missing = || Error::Env { variable: name.into(), problem: format!("is not set, but {because}") };
        self.number(name)?.ok_or_else(missing)
    }

    pub(super) fn master(&self, beside: bool) -> Result<Option<StoreAt>> {
        let Some(host) = (self.get)("MASTER_ADDR") else { return Ok(None) };
        let port = self.needed("MASTER_PORT", "MASTER_ADDR is: rank 0 listens there")?;
        Ok(Some(StoreAt::Rank0 { host, port, beside }))
    }

    /// `regatta launch` and torchrun.
    pub(super) fn torchrun(&self) -> Result<World> {
        let rank = self.needed("RANK", "this process was started as part of a job")?;
        let size = self.needed("WORLD_SIZE", "RANK is: the number of ranks in the job")?;
        let elastic = (self.get)("TORCHELASTIC_RUN_ID");
        let ours = (self.get)("REGATTA_STORE");
        let store = match ours.clone() {
            Some(address) => StoreAt::Elsewhere(address),
            None => self.master(elastic.is_some())?.ok_or_else(|| Error::Env {
                variable: "MASTER_ADDR".into(),
                problem: "is not set, but RANK is: the address of rank 0".into(),
            })?,
        };
        // Several jobs of torchrun may probe the same ports, all with the run id "none".
        let parts = ["TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "WORLD_SIZE"];
        let parts = parts.map(|name| (self.get)(name).unwrap_or_default()).join("/");
        let elastic = elastic.filter(|_| ours.is_none());
        let job = elastic.map_or(String::new(), |run| format!("{run}/{parts}"));
        Ok(World {
            rank,
            size,
            local_rank: self.number("LOCAL_RANK")?.unwrap_or(rank),
            local_size: self.number("LOCAL_WORLD_SIZE")?.unwrap_or(size),
            store,
            job,
            host: crate::host::host_identity(),
        })
    }

    /// The tasks of this step: those of the allocation may be more.
    fn slurm_size(&self) -> Result<Option<usize>> {
        Ok(self.number("SLURM_STEP_NUM_TASKS")?.or(self.number("SLURM_NTASKS")?))
    }

    /// Whether a step of Slurm has started this process as this rank.
    pub(super) fn slurm_agrees(&self, rank: usize, size: usize) -> Result<bool> {
        let step = self.number::<u64>("SLURM_STEP_ID")?.is_some_and(|step| !NO_JOB.contains(&step));
        Ok(step && self.number("SLURM_PROCID")? == Some(rank) && self.slurm_size()? == Some(size))
    }

    /// Only a step of several tasks is a job; a batch script itself is not.
    pub(super) fn slurm(&self) -> Result<Option<World>> {
        let because = "SLURM_PROCID is";
        let step: u64 = self.number("SLURM_STEP_ID")?.unwrap_or(0);
        if NO_JOB.contains(&step) {
            return Ok(None);
        }
        let Some(size) = self.slurm_size()?.filter(|&size| size > 1) else {
            return Ok(None);
        };
        let rank = self.needed("SLURM_PROCID", because)?;
        let local_rank: usize = self.needed("SLURM_LOCALID", because)?;
        let tasks = (self.get)("SLURM_STEP_TASKS_PER_NODE").or_else(|| (self.get)("SLURM_TASKS_PER_NODE"));
        let node: usize = self.number("SLURM_NODEID")?.unwrap_or(0);
        let here = tasks.as_deref().and_then(|tasks| tasks_on(tasks, node));
        let local_size = here.unwrap_or(size).max(local_rank.saturating_add(1));
        let job_id: u64 = self.needed("SLURM_JOB_ID", because)?;
        let store = match self.master(false)? {
            Some(store) => store,
            None => {
                let list = (self.get)("SLURM_STEP_NODELIST").or_else(|| (self.get)("SLURM_JOB_NODELIST"));
                let host = list.as_deref().and_then(first_host).ok_or_else(|| Error::Env {
                    variable: "SLURM_JOB_NODELIST".into(),
                    problem: "names no host; set MASTER_ADDR and MASTER_PORT".into(),
                })?;
                // Between the registered and the ephemeral ports, different for jobs that share a host.
                let port = 20_000 + (job_id.wrapping_mul(7).wrapping_add(step) % 10_000) as u16;
                StoreAt::Rank0 { host, port, beside: false }
            }
        };
        let (job, host) = (format!("{job_id}.{step}"), crate::host::host_identity());
        Ok(Some(World { rank, size, local_rank, local_size, store, job, host }))
    }
}

/// The tasks on the `node`-th node of Slurm's list, as in "4" or "4(x2),3".
pub(super) fn tasks_on(list: &str, node: usize) -> Option<usize> {
    let mut before = 0_usize;
    for part in list.split(',') {
        let (tasks, times) = match part.trim().split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse::<usize>().ok()?),
            None => (part.trim(), 1),
        };
        before = before.saturating_add(times);
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

/// The first host of a Slurm list, as in `node[01-03,07],other`.
pub(super) fn first_host(list: &str) -> Option<String> {
    let (name, rest) = list.split_at(list.find(['[', ',']).unwrap_or(list.len()));
    let number = match rest.strip_prefix('[') {
        Some(ranges) => ranges.split(['-', ',', ']']).next()?,
        None => "",
    };
    let host = format!("{}{number}", name.trim());
    (!host.is_empty()).then_some(host)
}
