//! Starts the ranks of a job as local processes, watches them, passes signals on, and ends all when one fails.
//!
//! Each rank leads a process group of its own. So a signal of the terminal reaches only the launcher, which passes it
//! on once, and the launcher can end a rank together with its child processes.

mod activity;
mod event;
pub mod guard;
mod job;
mod mpirun;
mod rank;
mod watch;

pub use job::Job;

use crate::error::{Exit, Result};
use crate::signals;
use event::{End, Event};
use guard::Guard;
use rank::{LastOutput, Rank};
use regatta_comm::rendezvous::{Secret, Security, StoreServer};
use regatta_comm::{Options, TransportKind};
use std::sync::mpsc::channel;
use watch::{Outcome, Watch};

/// Runs the job to its end.
///
/// # Errors
/// A rank cannot be started, or a rank fails: the error says which one failed first, how, and its last output. A job
/// that a signal has stopped ends with the signal's exit code and no message.
pub fn launch(job: &Job) -> Result<()> {
    if job.workers == 0 {
        return Err("a job has at least 1 worker".into());
    }
    let options = Options::from_env()?;
    if job.transport.or(options.transport) == Some(TransportKind::Mpi) {
        return mpirun::launch(job);
    }
    // A secret of this job's own: other processes on this machine cannot join the job.
    let secret = options.secret.map_or_else(Secret::random, Ok)?;
    let security = Security { secret: Some(secret), tls: options.tls };
    let store = StoreServer::start("127.0.0.1:0", job.workers, &security)?;
    let (sender, events) = channel();
    let _signals = signals::send_to_launcher(sender.clone(), Event::Signal)?;
    let mut guard = Guard::start().map_err(|error| format!("cannot start the launcher's guard: {error}"))?;
    let idle = crate::cores::idle();
    let mut ranks: Vec<Rank> = Vec::new();
    for rank in 0..job.workers {
        let started =
            Rank::start(job, rank, &store, &security, &sender, idle).inspect(|rank| guard.add(rank.group()));
        match started {
            Ok(started) => ranks.push(started),
            Err(error) => {
                end(ranks, guard);
                return Err(format!("cannot start {}: {error}", job.program.display()).into());
            }
        }
    }
    let outcome = Watch::new(job, &ranks, &store).run(&events);
    let outputs = end(ranks, guard);
    match outcome {
        Outcome::Success => Ok(()),
        Outcome::Stopped(signal) => Err(Exit { message: None, code: signals::exit_code(signal) }.into()),
        Outcome::Failed(rank, how) => {
            let message = Some(describe(rank, how, &outputs[rank], &store));
            Err(Exit { message, code: how.exit_code() }.into())
        }
    }
}

/// Ends processes that the ranks left running, and returns the last output of each rank.
fn end(ranks: Vec<Rank>, guard: Guard) -> Vec<LastOutput> {
    rank::end_groups(&ranks);
    // Before the ranks are waited for: from then on the system may give their ids to other processes.
    guard.dismiss();
    ranks.into_iter().map(Rank::finish).collect()
}

fn describe(rank: usize, how: End, output: &LastOutput, store: &StoreServer) -> String {
    if let Some(reason) = &output.reason {
        return format!("rank {rank}: {reason}");
    }
    let mut text = format!("rank {rank} {how}");
    let lines: Vec<&String> = output.tail.iter().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        // Its output went directly to the terminal. The job's store may have a reason.
        if let Some((_, reason)) = store.first_failure().filter(|(_, reason)| *reason != text) {
            text.push_str(": ");
            text.push_str(&reason);
        }
    } else {
        text.push_str("; its last output:");
        for line in lines {
            text.push_str("\n  ");
            text.push_str(line);
        }
    }
    text
}

/// Tells the launcher that started this rank why the rank fails. Returns whether the launcher can read it.
pub fn report_failure(reason: &str) -> bool {
    // The standard input of our own ranks is a pipe, which the launcher reads after the rank has ended.
    rustix::io::write(std::io::stdin(), reason.as_bytes()).is_ok()
}
