//! Processes that find each other by what the launchers' environments tell them.

use regatta_comm::{Group, Options, ReduceOp};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const RANKS: usize = 3;

/// Not a test by itself: a rank in a process of its own, which the others start.
#[test]
fn child_rank() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    match Group::from_env(&Options::from_env().unwrap()) {
        Ok(group) => {
            let mut sum = [group.rank() as i64 + 1];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            println!("rank {} of {}: sum {}", group.rank(), group.size(), sum[0]);
        }
        Err(error) => println!("error: {error}"),
    }
}

/// Starts the ranks with the variables that `variables` gives for each, and returns what they print.
fn outputs(variables: impl Fn(usize) -> Vec<(&'static str, String)>) -> Vec<String> {
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child_rank", "--exact", "--nocapture"]);
        command.env("REGATTA_TEST_CHILD", "1").env("REGATTA_JOIN_S", "20").envs(variables(rank));
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..RANKS).map(start).collect();
    let text = |output: Output| String::from_utf8_lossy(&output.stdout).into_owned();
    children.into_iter().map(|child| text(child.wait_with_output().unwrap())).collect()
}

fn assert_joined(outputs: &[String]) {
    for (rank, output) in outputs.iter().enumerate() {
        assert!(output.contains(&format!("rank {rank} of {RANKS}: sum 6")), "{output}");
    }
}

fn torchrun(rank: usize, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", RANKS.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
    ]
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An empty folder, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("regatta-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn rank_0_hosts_the_store_at_the_master_port() {
    let port = free_port();
    assert_joined(&outputs(|rank| torchrun(rank, port)));
}

#[test]
fn beside_the_agent_of_torchrun_and_others() {
    // The agent owns the port; an unknown client on the next accepts and says nothing.
    let agent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = agent.local_addr().unwrap().port();
    // Whoever else has it is an unknown client, too.
    let _silent = TcpListener::bind(("127.0.0.1", port + 1));
    assert_joined(&outputs(|rank| {
        let elastic = [("TORCHELASTIC_RUN_ID", "none".into()), ("TORCHELASTIC_RESTART_COUNT", "0".into())];
        [torchrun(rank, port), elastic.into()].concat()
    }));
}

#[test]
fn a_taken_master_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let variables = |rank: usize| [torchrun(rank, port), vec![("REGATTA_JOIN_S", "0.2".into())]].concat();
    let said = outputs(variables);
    assert!(said[0].contains(&format!("port 127.0.0.1:{port} is in use")), "{}", said[0]);
    assert!(said[0].contains("set MASTER_PORT"), "{}", said[0]);
    assert!(said[1].contains("rank 1 cannot reach the job's store"), "{}", said[1]);
}

fn open_mpi(rank: usize, folder: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("OMPI_COMM_WORLD_RANK", rank.to_string()),
        ("OMPI_COMM_WORLD_SIZE", RANKS.to_string()),
        ("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", RANKS.to_string()),
        ("PMIX_NAMESPACE", "test.1".into()),
        ("TMPDIR", folder.display().to_string()),
    ]
}

#[test]
#[cfg(unix)]
fn open_mpi_on_one_host_needs_no_address() {
    let folder = Folder::new("open-mpi");
    // As a job that was killed left it: its store is gone, or is now somebody else's.
    let user = user_of(&folder.0);
    let client = TcpListener::bind("127.0.0.1:0").unwrap();
    let stale = folder.0.join(format!("regatta-{user}-test-1.addr"));
    fs::write(stale, client.local_addr().unwrap().to_string()).unwrap();
    assert_joined(&outputs(|rank| open_mpi(rank, &folder.0)));
    assert_eq!(folder.names(), Vec::<PathBuf>::new());
}

/// This user's number, as the owner of a file it made.
#[cfg(unix)]
fn user_of(own: &Path) -> u32 {
    std::os::unix::fs::MetadataExt::uid(&fs::metadata(own).unwrap())
}

#[test]
fn slurm_steps_meet_at_the_first_host() {
    assert_joined(&outputs(|rank| {
        vec![
            ("SLURM_PROCID", rank.to_string()),
            ("SLURM_LOCALID", rank.to_string()),
            ("SLURM_NTASKS", RANKS.to_string()),
            ("SLURM_STEP_ID", "0".into()),
            ("SLURM_JOB_ID", std::process::id().to_string()),
            ("SLURM_JOB_NODELIST", "localhost".into()),
        ]
    }));
}
