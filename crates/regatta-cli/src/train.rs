//! `regatta train`: one command from a configuration to a trained model, on as many workers as serve best.

use crate::cores;
use crate::error::Result;
use crate::flags::{Here, PlanFlags, check, check_machine, plan, workers, workers_of};
use crate::launcher;
use crate::out::say;
use crate::preparing::Preparing;
use crate::signals;
use crate::worker::{as_planned, exit_code, in_threads};
use clap::Args;
use regatta::agree;
use regatta::checkpoint::Which;
use regatta::config::{Config, Loaded, Override};
use regatta::datasets::Datasets;
use regatta::plan::{Plan, threads_per_worker};
use regatta::train::{Job, Requests, Resume, claim_folder, holds_run};
use regatta_comm::Arrival;
use regatta_comm::rendezvous::World;
use regatta_comm::{Algorithm, Group, Options, TransportKind};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// When the launcher started, in microseconds since 1970. The launcher sets it for its workers.
const STARTED: &str = "REGATTA_STARTED_US";
/// The run's folder. The launcher sets it for its workers.
const OUT: &str = "REGATTA_OUT";
/// Where a rank that fails writes its last operations; by default, the run's folder.
const TRACE: &str = "REGATTA_TRACE";
/// After how long a wait is reported; by default, a third of the deadline.
const WARN: &str = "REGATTA_WARN_S";
/// The launcher reports a preparation of data that takes longer than this.
const REPORTED_PREPARATION: Duration = Duration::from_secs(1);

/// Help about settings that are given in several places.
const PRECEDENCE: &str = "\
If a setting is given in several places, flags override environment variables, these override the configuration, and
that overrides the default. The flag of a key overrides --set. Settings with a variable of their own:
  parallel.deadline_s  REGATTA_DEADLINE_S
  parallel.transport   REGATTA_TRANSPORT
  parallel.algorithm   REGATTA_ALGORITHM
  parallel.threads     REGATTA_THREADS
A run first prints which of them are not the default. All ranks must have the same configuration and the same data; each
may have its own paths, threads, device, deadline and parallel.memory_mib.";

#[derive(Args)]
#[command(after_help = PRECEDENCE)]
pub struct TrainArgs {
    #[command(flatten)]
    pub plan: PlanFlags,
    /// Write a timeline of all ranks into this file, for a trace viewer.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Optimizer steps, instead of train.steps.
    #[arg(long)]
    pub steps: Option<usize>,
    /// The run's folder; default: runs/NAME, numbered if that is taken.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Go on from a checkpoint in the run's folder; with `auto`, start a new run if there is none.
    #[arg(long, value_name = "auto", num_args = 0..=1, default_missing_value = "", value_parser = when)]
    pub resume: Option<When>,
    /// The checkpoint to go on from: last, best or step-N; default: last.
    #[arg(long, value_name = "CHECKPOINT", requires = "resume")]
    pub from: Option<Which>,
    /// Go on even if the data or the tokenizer differ from those that the checkpoint was trained on.
    #[arg(long, requires = "resume")]
    pub other_data: bool,
    /// `thread` (ranks in one process), `shm`, `tcp` or `mpi` (ranks of mpirun); default: the fastest that works.
    #[arg(long)]
    pub transport: Option<TransportKind>,
    /// The algorithm for all operations that it supports; default: the tuning table's choice.
    #[arg(long)]
    pub algorithm: Option<Algorithm>,
}

/// When to go on from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Always; without a checkpoint it is an error.
    Always,
    /// If there is a checkpoint.
    Auto,
}

fn when(text: &str) -> std::result::Result<When, String> {
    match text {
        "" => Ok(When::Always),
        "auto" => Ok(When::Auto),
        _ => Err("use `--resume` or `--resume auto`; the configuration goes before it".into()),
    }
}

impl TrainArgs {
    fn resume(&self) -> Result<Option<Resume>> {
        if self.resume == Some(When::Auto) && self.from.is_some_and(|from| from != Which::Last) {
            let problem =
                "--from cannot be used with `--resume auto`: every restart would go back to that checkpoint";
            return Err(problem.into());
        }
        Ok(self.resume.map(|when| Resume {
            from: self.from.unwrap_or(Which::Last),
            or_begin: when == When::Auto,
            other_data: self.other_data,
        }))
    }

    fn load(&self) -> Result<Loaded> {
        let mut changes = vec![];
        let mut flag = |name: &str, key: &str, value: Option<String>| {
            changes.extend(value.map(|value| Override::flag(name, format!("{key}={value}"))));
        };
        flag("--steps", "train.steps", self.steps.map(|steps| steps.to_string()));
        flag("--transport", "parallel.transport", self.transport.map(|transport| transport.to_string()));
        flag("--algorithm", "parallel.algorithm", self.algorithm.map(|algorithm| algorithm.to_string()));
        let mut loaded = self.plan.load(changes)?;
        if let Some(trace) = &self.trace {
            // Not as an override: a path need not be UTF-8.
            loaded.config.train.trace = Some(trace.clone());
        }
        Ok(loaded)
    }
}

pub fn run(args: TrainArgs, started: Instant) -> Result<ExitCode> {
    let loaded = args.load().inspect_err(|error| report_to_job(&error.to_string()))?;
    train_as(&args, loaded, started, true)
}

/// If this process is a rank of a job, tells the other ranks why it ends.
fn report_to_job(reason: &str) {
    let arrival = |world: &World| Arrival::announce(world, &Options::from_env()?);
    // Without a job that can be reached, only this process reports the error.
    if let Ok(Some(world)) = World::from_env()
        && let Ok(mut arrival) = arrival(&world)
    {
        arrival.give_up(reason);
    }
}

/// Trains the model of a configuration: as a rank, if a launcher has started this process as one, or else by starting
/// the ranks. `verbose` says whether progress and results are printed.
pub fn train_as(args: &TrainArgs, loaded: Loaded, started: Instant, verbose: bool) -> Result<ExitCode> {
    loaded.config.train.device.check()?;
    signals::install()?;
    match World::from_env()? {
        Some(world) => worker(args, loaded, &world, started, verbose),
        None => launcher(args, loaded, started, verbose),
    }
}

/// Prints the settings that are not the default, and warns of those without effect.
fn report_settings(loaded: &Loaded, plan: &Plan) {
    let settings = loaded.settings();
    if !settings.is_empty() {
        say!("settings: {}", settings.join(", "));
    }
    for warning in loaded.warnings(plan) {
        say!("warning: {warning}");
    }
}

/// Runs one rank of a job that our launcher, mpirun, torchrun or srun has started.
fn worker(
    args: &TrainArgs,
    loaded: Loaded,
    world: &World,
    started: Instant,
    verbose: bool,
) -> Result<ExitCode> {
    signals::stop_with_launcher()?;
    let config = loaded.config.clone();
    // Before anything that may take long or fail: the other ranks then wait for this one, or learn why it ends.
    let mut arrival = Arrival::announce(world, &Options::from_env()?)?;
    let (plan, data, resume, folder, mut options) = arrival.prepare(|| -> Result<_> {
        let plan = plan(&config, workers_of(&config, world.size)?)?;
        // Our own launcher has shown warnings and progress already.
        let first = world.rank == 0 && std::env::var_os(OUT).is_none();
        let mut preparing = first.then(Preparing::new);
        let data = Datasets::open_with(&config, &mut |notice| {
            if let Some(shown) = &mut preparing {
                shown.show(notice);
            }
        })?;
        drop(preparing);
        check(&config, &plan, data.vocab)?;
        check_machine(&config, &plan, data.vocab, Here::Rank { rank: world.rank, local: world.local_size })?;
        data.check_sample(&config)?;
        if first && verbose {
            report_settings(&loaded, &plan);
            if let Some(workers) = config.parallel.workers.filter(|workers| *workers != plan.world()) {
                let ranks = plan.world();
                say!("warning: parallel.workers = {workers} has no effect: the job was started with {ranks} ranks");
            }
        }
        let resume = args.resume()?;
        let folder = match std::env::var_os(OUT) {
            Some(out) => Folder::Known(out.into()),
            // Before the ranks meet, and so before rank 0 writes there: all ranks see the same.
            None => folder(args)?,
        };
        let options = options(&config, folder.path())?;
        Ok((plan, data, resume, folder, options))
    })?;
    // Only now: ranks with different algorithms could not carry out the comparison itself.
    let algorithm = options.algorithm.take();
    let group = arrival.join(&options)?;
    let more = [("--resume", format!("{:?}", args.resume)), ("--from", format!("{:?}", args.from))];
    agree(&group, &config, &more, &data).inspect_err(|error| group.abort(&error.to_string()))?;
    drop(data);
    let group = match algorithm {
        None => group,
        Some(_) => group.with_algorithm(algorithm)?,
    };
    let out = folder.claim(&group)?;
    let threads = config.parallel.threads.unwrap_or_else(|| cores::threads(world.local_size));
    let requests = Arc::<Requests>::default();
    signals::send_to_run(requests.clone(), config.train.on_user_signal);
    let started = launch_time(started);
    let job = Job { config, plan, group, servers: None, out, resume, requests, started, threads };
    exit_code(as_planned(job, verbose)?)
}

fn launcher(args: &TrainArgs, loaded: Loaded, started: Instant, verbose: bool) -> Result<ExitCode> {
    let config = &loaded.config;
    let workers = workers(config)?;
    let ranks = workers + config.sync.servers;
    if workers > cores::available() {
        say!("warning: {workers} workers on {} core(s): they will take turns", cores::available());
    }
    let plan = plan(config, workers)?;
    let prepared = Instant::now();
    let mut preparing = Preparing::new();
    let data = Datasets::open_with(config, &mut |notice| preparing.show(notice))?;
    drop(preparing);
    if prepared.elapsed() > REPORTED_PREPARATION {
        say!("data prepared in {:.1} s: {}", prepared.elapsed().as_secs_f64(), data.describe());
    }
    check(config, &plan, data.vocab)?;
    let transport = config.parallel.transport.as_deref().map(str::parse::<TransportKind>).transpose()?;
    let threaded = ranks == 1 || transport == Some(TransportKind::Thread);
    let here = if threaded { Here::Threads } else { Here::Processes };
    let warning = check_machine(config, &plan, data.vocab, here)?;
    data.check_sample(config)?;
    if verbose {
        report_settings(&loaded, &plan);
    }
    if let Some(warning) = warning {
        say!("warning: {warning}");
    }
    if let Some(warning) = plan.pipeline()?.warning() {
        say!("warning: {warning}");
    }
    let resume = args.resume()?;
    let out = folder(args)?.claim(&Group::solo())?;
    let threads = config.parallel.threads.unwrap_or_else(|| threads_per_worker(cores::available(), workers));
    if threaded {
        let requests = Arc::<Requests>::default();
        signals::send_to_run(requests.clone(), config.train.on_user_signal);
        let groups = match ranks {
            1 => vec![Group::solo()],
            _ => Group::threads_with(ranks, &options(config, &out)?)?,
        };
        let job = |group| Job {
            config: config.clone(),
            plan: plan.clone(),
            group,
            servers: None,
            out: out.clone(),
            resume,
            requests: requests.clone(),
            started,
            threads,
        };
        return in_threads(groups.into_iter().map(job).collect(), verbose);
    }
    let since_start = started.elapsed();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(since_start).as_micros();
    drop(data);
    launcher::launch(&launcher::Job {
        program: std::env::current_exe()?,
        arguments: std::env::args_os().skip(1).collect(),
        workers: ranks,
        threads,
        transport,
        environment: vec![(STARTED.into(), epoch.to_string().into()), (OUT.into(), out.into())],
        servers: plan.servers.count,
        spared: plan.servers.spared(workers),
        own: true,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The environment's options. Settings that the configuration has, too, come from there: it is already combined from
/// flags, environment and file.
fn options(config: &Config, out: &Path) -> Result<Options> {
    let mut options = Options::from_env()?;
    options.transport = config.parallel.transport.as_deref().map(str::parse).transpose()?;
    options.algorithm = config.parallel.algorithm.as_deref().map(str::parse).transpose()?;
    if std::env::var_os(TRACE).is_none_or(|folder| folder.is_empty()) {
        options.trace = Some(out.join("trace"));
    }
    options.deadline = Duration::from_secs_f64(config.parallel.deadline_s);
    if std::env::var_os(WARN).is_none_or(|seconds| seconds.is_empty()) {
        options.warn = options.deadline / 3;
    }
    Ok(options)
}

/// The folder of a run.
enum Folder {
    /// A folder that is already chosen.
    Known(PathBuf),
    /// A new folder of this name, numbered if the name is taken.
    New(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Known(path) | Self::New(path) => path,
        }
    }

    /// The folder that all ranks of the group use; rank 0 creates a new one. All ranks must call it.
    fn claim(self, group: &Group) -> Result<PathBuf> {
        match self {
            Self::Known(path) => Ok(path),
            Self::New(path) => Ok(claim_folder(group, &path)?),
        }
    }
}

/// The run's folder: the given one, or one named after the configuration. A new run never uses the folder of another
/// run.
fn folder(args: &TrainArgs) -> Result<Folder> {
    if let Some(out) = &args.out {
        if args.resume.is_none() && holds_run(out) {
            let problem = "holds an earlier run: go on with --resume, or give another --out";
            return Err(format!("{} {problem}", out.display()).into());
        }
        return Ok(Folder::Known(out.clone()));
    }
    let name = args.plan.path().file_stem().map_or("run".into(), |stem| stem.to_os_string());
    let new = Folder::New(Path::new("runs").join(&name));
    if args.resume.is_none() {
        return Ok(new);
    }
    let earlier = earlier_runs(Path::new("runs"), &name);
    match earlier.as_slice() {
        [one] => Ok(Folder::Known(one.clone())),
        [] if args.resume == Some(When::Auto) => Ok(new),
        [] => Err(format!(
            "{}: there is no run with a checkpoint to go on from: give its folder with --out, or leave out --resume",
            new.path().display()
        )
        .into()),
        several => {
            let names: Vec<String> = several.iter().map(|path| path.display().to_string()).collect();
            let problem = "--resume could mean several runs: choose one with --out";
            Err(format!("{problem}; there are {}", names.join(", ")).into())
        }
    }
}

/// The folders of earlier runs in `runs` that were named after a configuration: `NAME`, `NAME-2`, `NAME-3` and so on.
fn earlier_runs(runs: &Path, name: &OsStr) -> Vec<PathBuf> {
    let number = |folder: &OsStr| -> Option<usize> {
        let rest = folder.as_encoded_bytes().strip_prefix(name.as_encoded_bytes())?;
        match rest {
            [] => Some(1),
            [b'-', digits @ ..] => {
                std::str::from_utf8(digits).ok()?.parse().ok().filter(|number| *number > 1)
            }
            _ => None,
        }
    };
    let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
    let mut found: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| Some((number(&entry.file_name())?, entry.path())))
        .filter(|(_, path)| holds_run(path))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// When the launcher started, or this process if no launcher did.
fn launch_time(started: Instant) -> Instant {
    let launched = || {
        let us: u64 = std::env::var(STARTED).ok()?.parse().ok()?;
        let ago = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_micros(us)).ok()?;
        Instant::now().checked_sub(ago)
    };
    launched().unwrap_or(started)
}
