//! The environment contracts: what `regatta launch`, torchrun, Slurm and the launchers of MPI libraries tell the processes
//! they start.

use super::launchers;
use super::vars::Vars;
use super::world::{StoreAt, World};
use crate::error::{Error, Result};

/// Ranks travel as 32 bits.
const MOST_RANKS: usize = 1 << 30;

impl World {
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

#[cfg(test)]
mod tests {
    use super::super::vars::{first_host, tasks_on};
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
