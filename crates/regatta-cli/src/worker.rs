//! One rank of `regatta train`: it trains, or keeps parameters for those that do.

use crate::error::{Exit, Result};
use crate::out::show;
use crate::progress::Progress;
use crate::signals;
use regatta::keep_freed_memory;
use regatta::servers::Role;
use regatta::train::{Callback, Job, Silent, Summary, serve, train};
use std::path::Path;
use std::process::ExitCode;

/// The exit code of a run that has saved its state: a run that a signal has stopped must not look finished.
pub fn exit_code(stopped_by: Option<u32>) -> Result<ExitCode> {
    match stopped_by.and_then(|signal| i32::try_from(signal).ok()) {
        Some(signal) => Err(Exit { message: None, code: signals::exit_code(signal) }.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Ranks as threads of this process.
pub fn in_threads(jobs: Vec<Job>, verbose: bool) -> Result<ExitCode> {
    let (mut outcome, alone) = (Ok(None), jobs.len() == 1);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = jobs
            .into_iter()
            .map(|job| scope.spawn(move || as_planned(job, verbose).map_err(|error| error.to_string())))
            .collect();
        for (rank, thread) in ranks.into_iter().enumerate() {
            match thread.join().unwrap_or_else(|_| Err("panicked".into())) {
                Ok(stopped_by) if outcome.is_ok() => outcome = Ok(stopped_by),
                Err(error) if outcome.is_ok() => {
                    outcome = Err(if alone { error } else { format!("rank {rank}: {error}") });
                }
                _ => {}
            }
        }
    });
    exit_code(outcome?)
}

/// Trains on this rank, or keeps parameters for those that do; returns the signal that stopped the run, if one did. The job's
/// group has all ranks.
pub fn as_planned(mut job: Job, verbose: bool) -> Result<Option<u32>> {
    if job.plan.servers.count == 0 {
        return on_rank(&job, verbose);
    }
    let world = job.group.clone();
    let end = match Role::take(&world, &job.plan)? {
        Role::Worker(group, link) => {
            job.group = group;
            job.servers = Some(link);
            return on_rank(&job, verbose);
        }
        Role::Server(end) => end,
    };
    // Messages of the same sizes come again in every step.
    keep_freed_memory();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(job.threads).use_current_thread().build()?;
    match pool.install(|| serve(&job, end)) {
        // The workers say whether a signal has stopped the run; this rank must not look as if it had failed.
        Ok(_) => Ok(None),
        Err(error) => {
            world.abort(&error.to_string());
            Err(error.into())
        }
    }
}

/// Trains on this rank; returns the signal that stopped the run, if one did.
fn on_rank(job: &Job, verbose: bool) -> Result<Option<u32>> {
    // Freed memory is of use to nothing else: this process only trains.
    keep_freed_memory();
    // The rank's thread is part of its own pool, so that small operations need no other thread.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(job.threads).use_current_thread().build()?;
    let outcome = pool.install(|| {
        if !job.leads() || !verbose {
            return train(job, &mut Silent);
        }
        let unit = if job.config.model.samples().image().is_none() { "tokens" } else { "samples" };
        let mut progress = Progress::new(job.config.train.steps, unit);
        let outcome = train(job, &mut progress as &mut dyn Callback);
        progress.finish();
        outcome
    });
    match outcome {
        Ok(summary) => {
            if job.leads() && verbose {
                report(&summary, &job.out);
            }
            if summary.stopped_by.is_some() {
                // Other launchers take the exit code of the first rank for a failure and end the others. So all ranks
                // finish their work first. An error does not matter: everything has been saved.
                let _ = job.group.barrier();
            }
            Ok(summary.stopped_by)
        }
        Err(error) => {
            job.abort(&error.to_string());
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
    if let Some(link) = summary.link.as_ref().filter(|link| !link.faster.is_empty()) {
        show!("{link}");
    }
    if summary.interrupted {
        show!("stopped after step {}; go on with --resume --out {}", summary.steps, out.display());
    }
    show!("{} holds summary.json, metrics.jsonl and checkpoints", out.display());
}
