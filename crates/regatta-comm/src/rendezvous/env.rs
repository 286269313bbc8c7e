//! The environment contracts: what `regatta launch`, torchrun, Slurm and the launchers of MPI libraries tell the processes
//! they start.

use super::launchers;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// Where the job's store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreAt {
    /// Somebody else runs it, at `host:port`.
    Elsewhere(String),
    /// Rank 0 runs it.
    Rank0 {
        /// Rank 0's host.
        host: String,
        /// The port that the environment gives.
        port: u16,
        /// The port itself is taken by the launcher: use one of the 32 that follow.
        beside: bool,
    },
    /// Rank 0 runs it on a free port and writes the address into this file; all ranks are on one host.
    File(PathBuf),
}

/// A process's place in its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// Rank, 0 to `size - 1`.
    pub rank: usize,
    /// Ranks in the job.
    pub size: usize,
    /// Rank among those on this host.
    pub local_rank: usize,
    /// Ranks on this host.
    pub local_size: usize,
    /// How ranks find each other.
    pub store: StoreAt,
    /// Tells this job from others that might use the same port.
    pub job: String,
    /// What ranks on one host have in common: [`host_identity`](super::host_identity).
    pub host: String,
}

/// Ranks travel as 32 bits.
const MOST_RANKS: usize = 1 << 30;
/// Ports that are tried after one that is taken.
pub(crate) const BESIDE: u16 = 32;

impl World {
    /// A rank of a job on this host, whose store is at `address`.
    pub fn local(rank: usize, size: usize, address: &str) -> Self {
        let store = StoreAt::Elsewhere(address.into());
        let (local_rank, local_size) = (rank, size);
        Self { rank, size, local_rank, local_size, store, job: String::new(), host: super::host_identity() }
    }

    /// This process's place in the job that started it; nothing where no launcher did.
    ///
    /// # Errors
    /// Variables that are missing, malformed or contradict each other.
    pub fn from_env() -> Result<Option<Self>> {
        // What is not UTF-8 is no number, which is said where a number is needed.
        let read = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::from(&|name| read(name).filter(|value| !value.is_empty()))
    }

    pub(crate) fn from(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let vars = Vars { get };
        let found = if get("RANK").is_some() || get("REGATTA_STORE").is_some() {
            Some(vars.torchrun()?)
        } else if let Some(launcher) = launchers::of(&vars)? {
            Some(launchers::world(launcher, &vars)?)
        } else if get("SLURM_STEP_ID").is_some() && get("SLURM_PROCID").is_some() {
            vars.slurm()?
        } else {
            launchers::refuse_unknown(&vars)?;
            None
        };
        let Some(mut world) = found else { return Ok(None) };
        let error = |problem: String| Err(Error::Env { variable: "rank and size".into(), problem });
        if world.size == 0 || world.rank >= world.size {
            return error(format!("rank {} is not below the world size {}", world.rank, world.size));
        }
        if world.size > MOST_RANKS {
            return error(format!("a world size of {} is more than {MOST_RANKS}", world.size));
        }
        if world.local_rank >= world.local_size {
            return error(format!(
                "local rank {} is not below the local size {}",
                world.local_rank, world.local_size
            ));
        }
        // Where all ranks are known to be on one host, what they say need not leave it.
        let alone = get("RANK").is_none() || get("LOCAL_WORLD_SIZE").is_some();
        if let StoreAt::Rank0 { host, .. } = &mut world.store
            && world.local_size == world.size
            && alone
        {
            *host = "127.0.0.1".into();
        }
        Ok(Some(world))
    }
}

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
    fn torchrun(&self) -> Result<World> {
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
            host: super::host_identity(),
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
    fn slurm(&self) -> Result<Option<World>> {
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
        let (job, host) = (format!("{job_id}.{step}"), super::host_identity());
        Ok(Some(World { rank, size, local_rank, local_size, store, job, host }))
    }
}

/// The tasks on the `node`-th node of Slurm's list, as in "4" or "4(x2),3".
fn tasks_on(list: &str, node: usize) -> Option<usize> {
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
fn first_host(list: &str) -> Option<String> {
    let (name, rest) = list.split_at(list.find(['[', ',']).unwrap_or(list.len()));
    let number = match rest.strip_prefix('[') {
        Some(ranges) => ranges.split(['-', ',', ']']).next()?,
        None => "",
    };
    let host = format!("{}{number}", name.trim());
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(vars: &[(&str, &str)]) -> Result<Option<World>> {
        World::from(&|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn torchrun_variables() {
        let vars = [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")];
        let master = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")];
        let found = world(&[&vars[..], &master].concat()).unwrap().unwrap();
        assert_eq!((found.rank, found.size, found.local_rank, found.local_size), (3, 8, 1, 2));
        assert_eq!(found.store, StoreAt::Rank0 { host: "10.0.0.1".into(), port: 29500, beside: false });
        let agent =
            world(&[&vars[..], &master, &[("TORCHELASTIC_RUN_ID", "none")]].concat()).unwrap().unwrap();
        assert!(matches!(agent.store, StoreAt::Rank0 { beside: true, .. }));
        let ours = world(&[&vars[..], &[("REGATTA_STORE", "127.0.0.1:5")]].concat()).unwrap().unwrap();
        assert_eq!(ours.store, StoreAt::Elsewhere("127.0.0.1:5".into()));
    }

    #[test]
    fn contradictions_name_the_variable() {
        let problem = |vars: &[(&str, &str)]| world(vars).unwrap_err().to_string();
        assert!(problem(&[("RANK", "0")]).contains("WORLD_SIZE: is not set"));
        assert!(problem(&[("RANK", "x"), ("WORLD_SIZE", "2")]).contains("RANK: \"x\" is no number"));
        let base = [("RANK", "2"), ("WORLD_SIZE", "2"), ("REGATTA_STORE", "a:1"), ("LOCAL_RANK", "0")];
        assert!(problem(&base).contains("rank 2 is not below"));
        assert!(problem(&[("RANK", "0"), ("WORLD_SIZE", "2")]).contains("MASTER_ADDR: is not set"));
        assert!(world(&[]).unwrap().is_none());
    }

    #[test]
    fn numbers_at_their_limits_do_not_overflow() {
        let most = usize::MAX.to_string();
        let slurm = |rank: &'static str, job_id: &'static str| {
            let of = |local_rank: &str| {
                world(&[
                    ("SLURM_PROCID", rank),
                    ("SLURM_STEP_ID", "18446744073709551615"),
                    ("SLURM_NTASKS", "4"),
                    ("SLURM_LOCALID", local_rank),
                    ("SLURM_JOB_ID", job_id),
                    ("SLURM_JOB_NODELIST", "node"),
                ])
            };
            (of("1"), of(&most))
        };
        let (found, contradiction) = slurm("1", "18446744073709551615");
        assert!(matches!(found.unwrap().unwrap().store, StoreAt::Rank0 { port: 20_000..30_000, .. }));
        assert!(contradiction.is_err());
        let huge = [("RANK", "1"), ("WORLD_SIZE", most.as_str()), ("REGATTA_STORE", "a:1")];
        assert!(world(&huge).unwrap_err().to_string().contains("is more than"));
    }

    #[test]
    fn open_mpi_variables() {
        let base = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("PMIX_NAMESPACE", "123.456"),
        ];
        let one_host = world(&[&base[..], &[("OMPI_COMM_WORLD_LOCAL_SIZE", "2")]].concat()).unwrap().unwrap();
        assert!(
            matches!(&one_host.store, StoreAt::File(path) if path.to_string_lossy().ends_with("123-456.addr"))
        );
        let hosts =
            [&base[..], &[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "2")]].concat();
        let hosts: Vec<_> = hosts.into_iter().filter(|pair| *pair != ("OMPI_COMM_WORLD_SIZE", "2")).collect();
        assert!(world(&hosts).unwrap_err().to_string().contains("mpirun -x MASTER_ADDR"));
    }

    #[test]
    fn slurm_lists_tasks_by_node() {
        let tasks = |node| tasks_on("4(x2),3", node);
        assert_eq!([0, 1, 2, 3].map(tasks), [Some(4), Some(4), Some(3), None]);
        assert_eq!(tasks_on("2", 0), Some(2));
        for odd in ["", "x", "4(x", "4(xa)", "(x2)"] {
            assert_eq!(tasks_on(odd, 0), None, "{odd}");
        }
    }

    #[test]
    fn slurm_variables() {
        let base = [
            ("SLURM_PROCID", "2"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
            ("SLURM_JOB_NODELIST", "node[01-02]"),
        ];
        let found = world(&base).unwrap().unwrap();
        assert_eq!((found.rank, found.local_size), (2, 2));
        assert!(matches!(found.store, StoreAt::Rank0 { host, .. } if host == "node01"));
        assert_eq!(world(&[("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "1")]), Ok(None));
        assert_eq!(first_host("a,b").as_deref(), Some("a"));
        assert_eq!(first_host("n-[3,5-7],x").as_deref(), Some("n-3"));
        assert_eq!(first_host(""), None);
    }
}
