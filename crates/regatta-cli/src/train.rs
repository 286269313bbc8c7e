//! `regatta train`: one command from a configuration to a trained model, on as many workers as serve best.

use crate::cores;
use crate::error::{Exit, Result};
use crate::flags::{Here, PlanFlags, check, check_machine, plan, workers};
use crate::launcher;
use crate::out::{say, show};
use crate::preparing::Preparing;
use crate::progress::Progress;
use crate::signals;
use clap::Args;
use regatta::autograd::keep_freed_memory;
use regatta::checkpoint::Which;
use regatta::plan::{Plan, threads_per_worker};
use regatta::train::{
    Config, Datasets, Job, Loaded, Observer, Override, Requests, Resume, Silent, Summary, agree,
    claim_folder, holds_run, train,
};
use regatta_comm::rendezvous::{Arrival, World};
use regatta_comm::{Algorithm, Group, Options, TransportKind};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// When the launcher started, for its workers (microseconds since 1970).
const STARTED: &str = "REGATTA_STARTED_US";
/// The run's folder that the launcher chose, for its workers.
const OUT: &str = "REGATTA_OUT";
/// Where a rank that fails writes its last operations; by default, the run's folder.
const TRACE: &str = "REGATTA_TRACE";
/// After how long a wait is reported; by default, a third of the deadline.
const WARN: &str = "REGATTA_WARN_S";

/// What wins where a setting is given in several places.
const PRECEDENCE: &str = "\
Where a setting is given in several places, flags win over environment variables, these over the configuration, and that over
the default. The flag of a key wins over --set. Settings with a variable of their own:
  parallel.deadline_s  REGATTA_DEADLINE_S
  parallel.transport   REGATTA_TRANSPORT
  parallel.algorithm   REGATTA_ALGORITHM
  parallel.threads     REGATTA_THREADS
A run begins with a line on those that are not the default. All ranks must have the same configuration and the same data; each
may have its own paths, threads, device, deadline and parallel.memory_mib.";

#[derive(Args)]
#[command(after_help = PRECEDENCE)]
pub struct TrainArgs {
    #[command(flatten)]
    pub plan: PlanFlags,
    /// Write what each rank did when into this file, for a trace viewer.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Optimizer steps, instead of train.steps.
    #[arg(long)]
    pub steps: Option<usize>,
    /// The run's folder; left out: runs/NAME, numbered where that is taken.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Go on from a checkpoint in the run's folder; with `auto`, begin where there is none.
    #[arg(long, value_name = "auto", num_args = 0..=1, default_missing_value = "", value_parser = when)]
    pub resume: Option<When>,
    /// From which checkpoint: last, best or step-N; left out: last.
    #[arg(long, value_name = "CHECKPOINT", requires = "resume")]
    pub from: Option<Which>,
    /// Go on though the data or the tokenizer are not those that the checkpoint was trained on.
    #[arg(long, requires = "resume")]
    pub other_data: bool,
    /// `thread` (ranks in one process), `shm` or `tcp`; left out: the fastest that works.
    #[arg(long)]
    pub transport: Option<TransportKind>,
    /// The algorithm for all operations that it offers; left out: what the tuning table says.
    #[arg(long)]
    pub algorithm: Option<Algorithm>,
}

/// When to go on from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// There must be one.
    Always,
    /// Where there is one.
    Auto,
}

fn when(text: &str) -> std::result::Result<When, String> {
    match text {
        "" => Ok(When::Always),
        "auto" => Ok(When::Auto),
        _ => Err("it is `--resume` or `--resume auto`; the configuration goes before it".into()),
    }
}

impl TrainArgs {
    fn resume(&self) -> Result<Option<Resume>> {
        if self.resume == Some(When::Auto) && self.from.is_some_and(|from| from != Which::Last) {
            let problem = "--from goes with --resume alone: with `auto`, every restart would go back to that checkpoint";
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
            // A path may be no text.
            loaded.config.train.trace = Some(trace.clone());
        }
        Ok(loaded)
    }
}

pub fn run(args: TrainArgs, started: Instant) -> Result<ExitCode> {
    let loaded = args.load().inspect_err(|error| tell_job(&error.to_string()))?;
    train_as(&args, loaded, started, true)
}

/// Where this process is a rank of a job that somebody started, tells the other ranks why it ends.
fn tell_job(reason: &str) {
    let arrival = |world: &World| Arrival::announce(world, &Options::from_env()?);
    // Where there is no job, or it cannot be reached, the error is this process's alone.
    if let Ok(Some(world)) = World::from_env()
        && let Ok(mut arrival) = arrival(&world)
    {
        arrival.give_up(reason);
    }
}

/// Trains as a configuration says, as one rank of a job or as what starts the ranks; `speaks` says whether somebody is told
/// about it.
pub fn train_as(args: &TrainArgs, loaded: Loaded, started: Instant, speaks: bool) -> Result<ExitCode> {
    loaded.config.train.device.check()?;
    signals::take()?;
    match World::from_env()? {
        Some(world) => worker(args, loaded, &world, started, speaks),
        None => launcher(args, loaded, started, speaks),
    }
}

/// Says what was set otherwise than by default in one of several places, and what of it has no effect.
fn tell(loaded: &Loaded, plan: &Plan) {
    let settings = loaded.settings();
    if !settings.is_empty() {
        say!("settings: {}", settings.join(", "));
    }
    for warning in loaded.warnings(plan) {
        say!("warning: {warning}");
    }
}

/// One rank of a job that somebody started: we ourselves, mpirun, torchrun, srun.
fn worker(
    args: &TrainArgs,
    loaded: Loaded,
    world: &World,
    started: Instant,
    speaks: bool,
) -> Result<ExitCode> {
    signals::stop_with_launcher()?;
    let config = loaded.config.clone();
    // Before anything that may take long or fail: the other ranks then wait for this one, or hear why it ends.
    let mut arrival = Arrival::announce(world, &Options::from_env()?)?;
    let (plan, data, resume, folder, mut options) = arrival.prepare(|| -> Result<_> {
        let plan = plan(&config, world.size)?;
        // Our own launcher has already said what there is to say.
        let first = world.rank == 0 && std::env::var_os(OUT).is_none();
        let mut preparing = first.then(Preparing::new);
        let data = Datasets::open_with(&config, &mut |notice| {
            if let Some(shown) = &mut preparing {
                shown.hear(notice);
            }
        })?;
        drop(preparing);
        check(&config, &plan, data.vocab)?;
        check_machine(&config, &plan, data.vocab, Here::Rank { rank: world.rank, local: world.local_size })?;
        config.check_sample(&data)?;
        if first && speaks {
            tell(&loaded, &plan);
            if let Some(workers) = config.parallel.workers.filter(|workers| *workers != world.size) {
                let ranks = world.size;
                say!("warning: parallel.workers = {workers} has no effect: the job was started with {ranks} ranks");
            }
        }
        let resume = args.resume()?;
        let folder = match std::env::var_os(OUT) {
            Some(out) => Folder::Known(out.into()),
            // Before the ranks meet, so before rank 0 writes there: all of them see the same.
            None => folder(args)?,
        };
        let options = options(&config, folder.path())?;
        Ok((plan, data, resume, folder, options))
    })?;
    // Ranks that differ in their algorithm could not even compare what they have.
    let algorithm = options.algorithm.take();
    let group = arrival.join(&options)?;
    let more = [("--resume", format!("{:?}", args.resume)), ("--from", format!("{:?}", args.from))];
    agree(&group, &config, &more, &data).inspect_err(|error| group.abort(&error.to_string()))?;
    drop(data);
    let group = match algorithm {
        None => group,
        Some(_) => group.with_algorithm(algorithm)?,
    };
    let out = folder.of_all(&group)?;
    let threads = config.parallel.threads.unwrap_or_else(|| cores::threads(world.local_size));
    let requests = Arc::<Requests>::default();
    signals::ask(requests.clone(), config.train.on_user_signal);
    let job = Job { config, plan, group, out, resume, requests, started: launched(started), threads };
    ended(on_rank(&job, speaks)?)
}

fn launcher(args: &TrainArgs, loaded: Loaded, started: Instant, speaks: bool) -> Result<ExitCode> {
    let config = &loaded.config;
    let workers = workers(config)?;
    if workers > cores::available() {
        say!("warning: {workers} workers on {} core(s): they will take turns", cores::available());
    }
    let plan = plan(config, workers)?;
    let prepared = Instant::now();
    let mut preparing = Preparing::new();
    let data = Datasets::open_with(config, &mut |notice| preparing.hear(notice))?;
    drop(preparing);
    if prepared.elapsed() > Duration::from_secs(1) {
        say!("data prepared in {:.1} s: {}", prepared.elapsed().as_secs_f64(), data.describe());
    }
    check(config, &plan, data.vocab)?;
    let transport = config.parallel.transport.as_deref().map(str::parse::<TransportKind>).transpose()?;
    let threaded = workers == 1 || transport == Some(TransportKind::Thread);
    let here = if threaded { Here::Threads } else { Here::Processes };
    let warning = check_machine(config, &plan, data.vocab, here)?;
    config.check_sample(&data)?;
    if speaks {
        tell(&loaded, &plan);
    }
    if let Some(warning) = warning {
        say!("warning: {warning}");
    }
    if let Some(warning) = plan.pipeline()?.warning() {
        say!("warning: {warning}");
    }
    let resume = args.resume()?;
    let out = folder(args)?.of_all(&Group::solo())?;
    let threads = config.parallel.threads.unwrap_or_else(|| threads_per_worker(cores::available(), workers));
    if threaded {
        let requests = Arc::<Requests>::default();
        signals::ask(requests.clone(), config.train.on_user_signal);
        let groups = match workers {
            1 => vec![Group::solo()],
            _ => Group::threads_with(workers, &options(config, &out)?)?,
        };
        let job = |group| Job {
            config: config.clone(),
            plan: plan.clone(),
            group,
            out: out.clone(),
            resume,
            requests: requests.clone(),
            started,
            threads,
        };
        return in_threads(groups.into_iter().map(job).collect(), speaks);
    }
    let since_start = started.elapsed();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(since_start).as_micros();
    drop(data);
    launcher::launch(&launcher::Job {
        program: std::env::current_exe()?,
        arguments: std::env::args_os().skip(1).collect(),
        workers,
        threads,
        transport,
        environment: vec![(STARTED.into(), epoch.to_string().into()), (OUT.into(), out.into())],
        own: true,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// How a run ends that has saved what it has to: a run that a signal stopped is not taken for one that has finished.
fn ended(stopped_by: Option<u32>) -> Result<ExitCode> {
    match stopped_by.and_then(|signal| i32::try_from(signal).ok()) {
        Some(signal) => Err(Exit { message: None, code: signals::exit_code(signal) }.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Ranks as threads of this process.
fn in_threads(jobs: Vec<Job>, speaks: bool) -> Result<ExitCode> {
    let mut outcome = Ok(None);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = jobs
            .iter()
            .map(|job| scope.spawn(move || on_rank(job, speaks).map_err(|error| error.to_string())))
            .collect();
        for (rank, thread) in ranks.into_iter().enumerate() {
            match thread.join().unwrap_or_else(|_| Err("panicked".into())) {
                Ok(stopped_by) if outcome.is_ok() => outcome = Ok(stopped_by),
                Err(error) if outcome.is_ok() => {
                    outcome = Err(if jobs.len() == 1 { error } else { format!("rank {rank}: {error}") });
                }
                _ => {}
            }
        }
    });
    ended(outcome?)
}

/// Trains on this rank; returns the signal that stopped the run, if one did.
fn on_rank(job: &Job, speaks: bool) -> Result<Option<u32>> {
    // This process does nothing but train.
    keep_freed_memory();
    // The rank's thread is part of its own pool, so that small operations need no hand-over.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(job.threads).use_current_thread().build()?;
    let outcome = pool.install(|| {
        if job.group.rank() != 0 || !speaks {
            return train(job, &mut Silent);
        }
        let unit = if job.config.model.time().is_some() { "tokens" } else { "samples" };
        let mut progress = Progress::new(job.config.train.steps, unit);
        let outcome = train(job, &mut progress as &mut dyn Observer);
        progress.finish();
        outcome
    });
    match outcome {
        Ok(summary) => {
            if job.group.rank() == 0 && speaks {
                report(&summary, &job.out);
            }
            if summary.stopped_by.is_some() {
                // Other launchers take the first rank's exit code for a failure and end the others: the last thing that
                // any of them does is done by then. What is saved is saved, whatever becomes of this.
                let _ = job.group.barrier();
            }
            Ok(summary.stopped_by)
        }
        Err(error) => {
            job.group.abort(&error.to_string());
            Err(error.into())
        }
    }
}

fn report(summary: &Summary, out: &Path) {
    if let Some(sample) = &summary.sample {
        show!("\n--- a sample ---\n{sample}\n---");
    }
    let validation = summary.val_loss.map_or(String::new(), |loss| format!(", validation loss {loss:.4}"));
    let accuracy = summary.val_accuracy.map_or(String::new(), |a| format!(", accuracy {:.2} %", 100.0 * a));
    show!("{} steps: training loss {:.4}{validation}{accuracy}", summary.steps, summary.train_loss);
    let peak = summary.mfu.map_or(String::new(), |mfu| format!(", {:.0} % of the cores' peak", 100.0 * mfu));
    if let (Some(rate), Some(step_ms)) = (summary.tokens_per_s, summary.step_ms) {
        show!(
            "{rate:.0} tokens/s, {step_ms:.1} ms a step{peak} (communication {:.1} ms, not hidden {:.1} ms), first \
             step after {:.2} s, at most {:.0} MiB a rank",
            summary.comm_ms.unwrap_or(0.0),
            summary.comm_exposed_ms.unwrap_or(0.0),
            summary.time_to_first_step_s.unwrap_or(0.0),
            summary.peak_rss_bytes.iter().max().copied().unwrap_or(0) as f64 / (1 << 20) as f64
        );
    } else {
        show!("no step was left to do");
    }
    if summary.interrupted {
        show!("stopped after step {}; go on with --resume --out {}", summary.steps, out.display());
    }
    show!("{} holds summary.json, metrics.jsonl and checkpoints", out.display());
}

/// The environment's options; where a setting is the configuration's too, that is what flags, environment and file come to.
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
    /// This one.
    Known(PathBuf),
    /// A new one of this name, or numbered where that is taken.
    New(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Known(path) | Self::New(path) => path,
        }
    }

    /// The folder that all ranks of the group use; rank 0 makes it where it is new. All call it.
    fn of_all(self, group: &Group) -> Result<PathBuf> {
        match self {
            Self::Known(path) => Ok(path),
            Self::New(path) => Ok(claim_folder(group, &path)?),
        }
    }
}

/// The run's folder: the given one, or one named after the configuration. A new run never goes where another has been.
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
            let problem = "--resume could mean several runs: say which one with --out";
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

/// When the launcher started, or else this process.
fn launched(started: Instant) -> Instant {
    let launched = || {
        let us: u64 = std::env::var(STARTED).ok()?.parse().ok()?;
        let ago = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_micros(us)).ok()?;
        Instant::now().checked_sub(ago)
    };
    launched().unwrap_or(started)
}
