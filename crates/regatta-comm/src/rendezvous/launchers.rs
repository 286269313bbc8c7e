//! Launchers of MPI libraries and schedulers that number the processes they start in variables of their own, but give
//! them no address to meet at.
//!
//! On one host the ranks meet through a file that only this user's processes can read. On several, the user says where
//! rank 0 is.

use super::vars::Vars;
use super::world::{StoreAt, World};
use crate::error::{Error, Result};

/// The variables of a launcher.
pub(super) struct Launcher {
    rank: &'static str,
    size: &'static str,
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
    /// Number of hosts, where the launcher says it.
    hosts: &'static [&'static str],
    /// What names the job, the same for all its ranks.
    job: &'static [&'static str],
    /// How it passes variables on.
    pass: &'static str,
}

const LAUNCHERS: [Launcher; 6] = [
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        hosts: &[],
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
        pass: "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500",
    },
    Launcher {
        rank: "MV2_COMM_WORLD_RANK",
        size: "MV2_COMM_WORLD_SIZE",
        local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
        local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
        hosts: &[],
        job: &[],
        pass: "mpirun_rsh ... MASTER_ADDR=<host of rank 0> MASTER_PORT=29500 PROGRAM",
    },
    Launcher {
        rank: "JSM_NAMESPACE_RANK",
        size: "JSM_NAMESPACE_SIZE",
        local_rank: &["JSM_NAMESPACE_LOCAL_RANK"],
        local_size: &["JSM_NAMESPACE_LOCAL_SIZE"],
        hosts: &[],
        job: &["PMIX_NAMESPACE"],
        pass: "jsrun -E MASTER_ADDR=<host of rank 0> -E MASTER_PORT=29500",
    },
    Launcher {
        rank: "FLUX_TASK_RANK",
        size: "FLUX_JOB_SIZE",
        local_rank: &["FLUX_TASK_LOCAL_ID"],
        local_size: &[],
        hosts: &["FLUX_JOB_NNODES"],
        job: &["FLUX_JOB_ID"],
        pass: "flux run --env=MASTER_ADDR=<host of rank 0> --env=MASTER_PORT=29500",
    },
    Launcher {
        rank: "PALS_RANKID",
        size: "PMI_SIZE",
        local_rank: &["PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"],
        local_size: &["PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"],
        hosts: &[],
        job: &["PALS_APID"],
        pass: "mpiexec --env MASTER_ADDR=<host of rank 0> --env MASTER_PORT=29500",
    },
    // MPICH, Intel MPI and what else starts processes by hydra.
    Launcher {
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
        local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
        hosts: &[],
        job: &[],
        pass: "mpiexec -genv MASTER_ADDR <host of rank 0> -genv MASTER_PORT 29500",
    },
];

/// Variables that number a process among others without saying how many there are.
const UNKNOWN: [&str; 3] = ["PMIX_RANK", "ALPS_APP_PE", "MPIRUN_RANK"];

/// The launcher that has started this process, where it is one of these.
pub(super) fn of(vars: &Vars<'_>) -> Result<Option<&'static Launcher>> {
    let Some(launcher) = LAUNCHERS.iter().find(|launcher| (vars.get)(launcher.rank).is_some()) else {
        return Ok(None);
    };
    // Slurm sets some of these beside its own, which say where the ranks meet.
    let (rank, size) = (vars.number(launcher.rank)?, vars.number(launcher.size)?);
    let by_slurm = match (rank, size) {
        (Some(rank), Some(size)) => vars.slurm_agrees(rank, size)? && launcher.rank == "PMI_RANK",
        _ => false,
    };
    Ok((!by_slurm).then_some(launcher))
}

/// This process's place among those that `launcher` has started.
pub(super) fn world(launcher: &Launcher, vars: &Vars<'_>) -> Result<World> {
    let because = format!(
        "{} is: a launcher has started this process as one of several, and all ranks need to know how many there are \
         (else set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each of them, or unset {0} for a run by itself)",
        launcher.rank
    );
    let (rank, size): (usize, usize) =
        (vars.needed(launcher.rank, &because)?, vars.needed(launcher.size, &because)?);
    let first = |names: &[&str]| -> Result<Option<usize>> {
        names.iter().find(|name| (vars.get)(name).is_some()).map_or(Ok(None), |name| vars.number(name))
    };
    let (local_rank, local_size) = (first(launcher.local_rank)?, first(launcher.local_size)?);
    let one_host = size == 1 || local_size == Some(size) || first(launcher.hosts)? == Some(1);
    let name = launcher.job.iter().find_map(|name| (vars.get)(name));
    let job = name.unwrap_or_else(|| launcher_process(launcher.rank).to_string());
    let store = match vars.master(false)? {
        Some(store) => store,
        None if one_host => {
            let name: String = job.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
            StoreAt::File(std::env::temp_dir().join(format!("regatta-{}-{name}.addr", user())))
        }
        None => {
            return Err(Error::Env {
                variable: "MASTER_ADDR".into(),
                problem: format!(
                    "is not set, but the job that {} tells of may span several hosts: start it with `{}`",
                    launcher.rank, launcher.pass
                ),
            });
        }
    };
    let local_rank = local_rank.unwrap_or(if one_host { rank } else { 0 });
    let local_size = local_size.unwrap_or(if one_host { size } else { local_rank.saturating_add(1) });
    let host = crate::host::host_identity();
    Ok(World { rank, size, local_rank, local_size, store, job, host })
}

/// Refuses to be one of several processes that all take themselves for the only one.
pub(super) fn refuse_unknown(vars: &Vars<'_>) -> Result<()> {
    match UNKNOWN.iter().find(|name| (vars.get)(name).is_some()) {
        None => Ok(()),
        Some(variable) => Err(Error::Env {
            variable: (*variable).into(),
            problem: "is set: a launcher has started this process as one of several, but does not say of how many; set \
                      RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each of them, or unset it for a run by itself"
                .into(),
        }),
    }
}

/// The process that has started the ranks of this host: the nearest ancestor that is not told a rank itself. A script
/// may lie between it and a rank.
#[cfg(target_os = "linux")]
fn launcher_process(variable: &str) -> u32 {
    let parent = |process: u32| -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
    };
    let is_rank = |process: u32| {
        let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        let prefix = format!("{variable}=");
        environment.split(|&byte| byte == 0).any(|entry| entry.starts_with(prefix.as_bytes()))
    };
    let mut process = parent_process();
    while process > 1 && is_rank(process) {
        match parent(process) {
            Some(next) => process = next,
            None => break,
        }
    }
    process
}

#[cfg(not(target_os = "linux"))]
fn launcher_process(_: &str) -> u32 {
    parent_process()
}

#[cfg(unix)]
fn user() -> String {
    rustix::process::getuid().as_raw().to_string()
}

#[cfg(not(unix))]
fn user() -> String {
    std::env::var("USERNAME").unwrap_or_default()
}

#[cfg(unix)]
fn parent_process() -> u32 {
    std::os::unix::process::parent_id()
}

#[cfg(not(unix))]
fn parent_process() -> u32 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(vars: &[(&str, &str)]) -> Result<Option<World>> {
        World::from(&|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    /// What each launcher sets for rank 1 of 2 on one host.
    const ONE_HOST: [&[(&str, &str)]; 6] = [
        &[("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")],
        &[("PALS_RANKID", "1"), ("PMI_SIZE", "2"), ("PALS_LOCAL_RANKID", "1"), ("PALS_LOCAL_SIZE", "2")],
        &[
            ("FLUX_TASK_RANK", "1"),
            ("FLUX_JOB_SIZE", "2"),
            ("FLUX_TASK_LOCAL_ID", "1"),
            ("FLUX_JOB_NNODES", "1"),
            ("FLUX_JOB_ID", "f123"),
        ],
        &[
            ("JSM_NAMESPACE_RANK", "1"),
            ("JSM_NAMESPACE_SIZE", "2"),
            ("JSM_NAMESPACE_LOCAL_RANK", "1"),
            ("JSM_NAMESPACE_LOCAL_SIZE", "2"),
        ],
        &[
            ("MV2_COMM_WORLD_RANK", "1"),
            ("MV2_COMM_WORLD_SIZE", "2"),
            ("MV2_COMM_WORLD_LOCAL_RANK", "1"),
            ("MV2_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMI_RANK", "1"),
        ],
        &[
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_RANK", "1"),
        ],
    ];

    #[test]
    fn ranks_of_one_host_meet_in_a_file() {
        for vars in ONE_HOST {
            let found = world(vars).unwrap().unwrap();
            assert_eq!(
                (found.rank, found.size, found.local_rank, found.local_size),
                (1, 2, 1, 2),
                "{vars:?}"
            );
            assert!(matches!(found.store, StoreAt::File(_)), "{vars:?}");
        }
    }

    #[test]
    fn several_hosts_need_an_address() {
        for vars in ONE_HOST {
            let on_two: Vec<_> = vars
                .iter()
                .filter(|(name, _)| !name.contains("LOCAL_SIZE") && !name.contains("LOCALNRANKS"))
                .map(|&(name, value)| match name {
                    "FLUX_JOB_NNODES" => (name, "2"),
                    // The only one on its host.
                    local if local.contains("LOCAL") => (name, "0"),
                    _ => (name, value),
                })
                .filter(|(name, _)| *name != "OMPI_COMM_WORLD_LOCAL_RANK")
                .collect();
            let error = world(&on_two).unwrap_err().to_string();
            assert!(error.contains("MASTER_ADDR") && error.contains(vars[0].0), "{error}");
            let given = [("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")];
            let found = world(&[&on_two[..], &given].concat()).unwrap().unwrap();
            assert!(matches!(found.store, StoreAt::Rank0 { host, .. } if host == "node1"), "{vars:?}");
        }
    }

    #[test]
    fn a_rank_without_a_size_is_refused_by_name() {
        for vars in ONE_HOST {
            let error = world(&vars[..1]).unwrap_err().to_string();
            assert!(error.contains(vars[0].0) && error.contains("WORLD_SIZE"), "{error}");
        }
        for variable in UNKNOWN {
            let error = world(&[(variable, "0")]).unwrap_err().to_string();
            assert!(error.contains(variable) && error.contains("WORLD_SIZE"), "{error}");
        }
        assert!(world(&[("PMI_RANK", "x"), ("PMI_SIZE", "2")]).unwrap_err().to_string().contains("PMI_RANK"));
    }

    #[test]
    fn one_process_is_a_job_of_one() {
        for (rank, size) in [("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")] {
            let found = world(&[(rank, "0"), (size, "1")]).unwrap().unwrap();
            assert_eq!((found.rank, found.size, found.local_size), (0, 1, 1));
        }
    }

    #[test]
    fn slurm_knows_better_where_its_own_ranks_meet() {
        let slurm = [
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_JOB_ID", "7"),
            ("SLURM_JOB_NODELIST", "node[3-4]"),
            ("SLURM_STEP_TASKS_PER_NODE", "1(x2)"),
        ];
        let by_srun =
            world(&[&slurm[..], &[("PMI_RANK", "1"), ("PMI_SIZE", "2")]].concat()).unwrap().unwrap();
        assert_eq!(by_srun.size, 2);
        assert!(matches!(by_srun.store, StoreAt::Rank0 { host, .. } if host == "node3"));
        // Hydra starts its proxies by srun, one on each host: their numbers are not the ranks'.
        let hydra =
            [("PMI_RANK", "3"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
        let given = [("MASTER_ADDR", "node3"), ("MASTER_PORT", "29500")];
        let by_hydra = world(&[&slurm[..], &hydra, &given].concat()).unwrap().unwrap();
        assert_eq!((by_hydra.rank, by_hydra.size), (3, 4));
        // A shell that Slurm gave is no rank, whatever it has allocated.
        for step in ["4294967290", "4294967291", "4294967294"] {
            let shell = slurm.map(|(name, value)| (name, if name == "SLURM_STEP_ID" { step } else { value }));
            assert_eq!(world(&shell), Ok(None), "{step}");
        }
        let alone =
            slurm.map(|(name, value)| (name, if name == "SLURM_STEP_NUM_TASKS" { "1" } else { value }));
        assert_eq!(world(&alone), Ok(None));
    }
}
