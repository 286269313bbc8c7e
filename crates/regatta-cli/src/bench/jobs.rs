//! Runs a measurement as a job of its own and returns the results of rank 0.

use super::row::Row;
use crate::error::Result;
use crate::launcher;
use regatta_comm::rendezvous::World;
use regatta_comm::{Group, Options, TransportKind};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The file into which rank 0 writes its rows, in a job that `regatta bench` has started.
const RESULTS: &str = "REGATTA_BENCH_RESULTS";

/// The measurement on one rank; only rank 0's rows are used.
pub type Measure<'a> = &'a (dyn Fn(&Group) -> Result<Vec<Row>> + Sync);

/// The role of this process.
pub enum Role {
    /// It is not a rank: it starts jobs.
    Starter,
    /// A rank of a job that a starter has started, and whose rows the starter collects.
    Ours(World),
    /// A rank of a job that another launcher has started: mpirun, torchrun, srun, `regatta launch`.
    Foreign(World),
}

/// Finds out the role of this process.
pub fn role() -> Result<Role> {
    Ok(match World::from_env()? {
        None => Role::Starter,
        Some(world) if std::env::var_os(RESULTS).is_some() => Role::Ours(world),
        Some(world) => Role::Foreign(world),
    })
}

/// Measures on this rank of a job that a starter has started.
pub fn rank(world: &World, measure: Measure<'_>) -> Result<()> {
    let group = Group::connect(world, &Options::from_env()?)?;
    let rows = measure(&group)?;
    if let Some(path) = std::env::var_os(RESULTS).filter(|_| world.rank == 0) {
        let mut text = String::new();
        for row in rows {
            text.push_str(&serde_json::to_string(&row)?);
            text.push('\n');
        }
        fs::write(&path, text)
            .map_err(|error| format!("cannot write {}: {error}", Path::new(&path).display()))?;
    }
    Ok(())
}

/// Starts `workers` ranks over `transport` (`None` stands for the fastest that works), and waits for them.
pub fn start(
    transport: Option<TransportKind>,
    workers: usize,
    environment: &[(OsString, OsString)],
    measure: Measure<'_>,
) -> Result<Vec<Row>> {
    if workers == 0 {
        return Err("a job has at least 1 worker".into());
    }
    if workers == 1 || transport == Some(TransportKind::Thread) {
        return in_threads(workers, measure);
    }
    let folder = Folder::create()?;
    let results = folder.0.join("rows.jsonl");
    let mut environment = environment.to_vec();
    environment.push((RESULTS.into(), results.clone().into()));
    launcher::launch(&launcher::Job {
        program: std::env::current_exe()?,
        arguments: std::env::args_os().skip(1).collect(),
        workers,
        threads: 1,
        transport,
        environment,
        servers: 0,
        spared: 0..0,
        own: true,
    })?;
    let text =
        fs::read_to_string(&results).map_err(|error| format!("cannot read rank 0's results: {error}"))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Ranks as threads of this process.
fn in_threads(workers: usize, measure: Measure<'_>) -> Result<Vec<Row>> {
    let groups = Group::threads_with(workers, &Options::from_env()?)?;
    // A rank that fails tells the others, which would wait for it.
    let on_rank = |group: &Group| measure(group).inspect_err(|error| group.abort(&error.to_string()));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(move || on_rank(group))).collect();
        let mut rows = None;
        for rank in ranks {
            let found = rank.join().map_err(|_| "a rank panicked")??;
            rows.get_or_insert(found);
        }
        Ok(rows.unwrap_or_default())
    })
}

/// A folder of this process's own, which is removed when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("regatta-bench-{}-{now}-{number}", std::process::id()));
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        // This fails if the folder exists: nobody else can have created it.
        builder.create(&path).map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // If this fails, the system removes the folder with other temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}
