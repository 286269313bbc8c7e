//! Four workers, of which one is slowed four times: seconds until a validation loss is reached, by way of waiting for one
//! another.
//!
//! ```text
//! cargo run --release -p regatta --example uneven -- CONFIG LOSS STEP_MS [key=value ...]
//! ```
//!
//! Ranks are threads. A step of a worker takes `STEP_MS`, most of which it sleeps, so that few cores are enough for machines
//! of their own; the slow one's takes four times as long.

use regatta::comm::Group;
use regatta::config::Config;
use regatta::servers::Role;
use regatta::train::{Callback, Flow, Job, Requests, Score, StepReport, serve, train};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const WORKERS: usize = 4;
/// How many times slower the last worker is.
const SLOWED: f64 = 4.0;

/// The ways of waiting: their names and keys.
const WAYS: [(&str, &[&str]); 6] = [
    ("all-reduce", &[]),
    ("sync, 1 server", &["sync.servers=1"]),
    ("ssp, 4 steps", &["sync.servers=1", "sync.mode=ssp", "sync.staleness=4"]),
    ("ssp, 64 steps", &["sync.servers=1", "sync.mode=ssp", "sync.staleness=64"]),
    ("async, 1 server", &["sync.servers=1", "sync.mode=async"]),
    // Waiting for nobody is a momentum of its own (Mitliagkas et al. 2016, "Asynchrony begets Momentum").
    ("async, beta1 0.5", &["sync.servers=1", "sync.mode=async", "optimizer.beta1=0.5"]),
];

type Outcome = Arc<Mutex<Option<(f64, usize, f64)>>>;

/// One worker's speed, and the end of the run.
struct Pace {
    step: Duration,
    pause: Duration,
    target: f64,
    began: Option<Instant>,
    /// Seconds, steps and the loss when it is reached; on the first worker.
    outcome: Outcome,
}

impl Callback for Pace {
    fn learning_rate(&mut self, _: usize, scheduled: f64) -> f64 {
        self.began.get_or_insert_with(Instant::now);
        std::thread::sleep(self.pause);
        scheduled
    }

    fn step(&mut self, report: &StepReport) -> Flow {
        let own = (report.step_ms - report.comm_exposed_ms).max(0.0) / 1e3;
        let computed = (own - self.pause.as_secs_f64()).max(0.0);
        self.pause = self.step.saturating_sub(Duration::from_secs_f64(computed));
        Flow::Continue
    }

    fn evaluated(&mut self, step: usize, score: &Score) -> Flow {
        let Some(began) = self.began else { return Flow::Continue };
        let mut outcome = self.outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if outcome.is_none() && score.loss <= self.target {
            *outcome = Some((began.elapsed().as_secs_f64(), step, score.loss));
        }
        if outcome.is_some() { Flow::Stop } else { Flow::Continue }
    }
}

fn run(
    path: &std::path::Path,
    sets: &[String],
    target: f64,
    step: Duration,
) -> regatta::Result<Option<(f64, usize, f64)>> {
    let config = Config::load(path, sets)?;
    let (plan, servers) = (config.plan(WORKERS)?, config.sync.servers);
    let folder = std::env::temp_dir().join(format!("regatta-uneven-{}", std::process::id()));
    let outcome = Outcome::default();
    let rank = |world: Group| -> regatta::Result<()> {
        let slowed = world.rank() + 1 == WORKERS;
        let mut job = Job {
            config: config.clone(),
            plan: plan.clone(),
            group: world.clone(),
            servers: None,
            out: folder.clone(),
            resume: None,
            requests: Arc::<Requests>::default(),
            started: Instant::now(),
            threads: 1,
        };
        if servers > 0 {
            match Role::take(&world, &plan)? {
                Role::Server(end) => return serve(&job, end).map(drop),
                Role::Worker(group, link) => (job.group, job.servers) = (group, Some(link)),
            }
        }
        let step = if slowed { step.mul_f64(SLOWED) } else { step };
        let mut pace = Pace { step, pause: Duration::ZERO, target, began: None, outcome: outcome.clone() };
        train(&job, &mut pace).map(drop).inspect_err(|error| job.abort(&error.to_string()))
    };
    let done = std::thread::scope(|scope| -> regatta::Result<()> {
        let on_one = |world| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
            pool.map_err(|error| regatta::Error::Usage(error.to_string()))?.install(|| rank(world))
        };
        let ranks: Vec<_> = Group::threads(WORKERS + servers)
            .into_iter()
            .map(|world| scope.spawn(move || on_one(world)))
            .collect();
        ranks.into_iter().try_for_each(|rank| {
            rank.join().unwrap_or_else(|_| Err(regatta::Error::Usage("a rank panicked".into())))
        })
    });
    let _ = std::fs::remove_dir_all(&folder);
    done?;
    let outcome = outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(*outcome)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, loss, step_ms, sets @ ..] = &arguments[..] else {
        return Err("usage: uneven CONFIG LOSS STEP_MS [key=value ...]".into());
    };
    let (target, step) = (loss.parse::<f64>()?, Duration::from_millis(step_ms.parse()?));
    println!(
        "{WORKERS} workers, a step takes {step_ms} ms and on the last one {SLOWED} times that; to a validation loss of {target}"
    );
    let mut first = None;
    for (name, keys) in WAYS {
        let sets: Vec<String> = keys.iter().map(ToString::to_string).chain(sets.iter().cloned()).collect();
        match run(config.as_ref(), &sets, target, step)? {
            Some((seconds, steps, loss)) => {
                let times = first.get_or_insert(seconds);
                println!(
                    "{name:18} {seconds:7.1} s ({:.2} x sooner), {steps} steps, loss {loss:.4}",
                    *times / seconds
                );
            }
            None => println!("{name:18} did not reach it"),
        }
    }
    Ok(())
}
