//! Starts the ranks of a job as local processes, watches them, passes signals on, and ends all when one fails.
//!
//! Each rank leads a process group of its own. So a key of the terminal reaches the launcher alone, which passes it on
//! once; and a rank can be ended with all that it has started.

mod activity;
pub mod guard;
mod rank;
mod watch;

use crate::error::{Exit, Result};
use crate::signals;
use guard::Guard;
use rank::{End, Rank};
use regatta_comm::rendezvous::{Secret, Security, StoreServer};
use regatta_comm::{Options, TransportKind};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use watch::{Event, Outcome, Watch};

/// The variable that tells a rank how many threads are its share, where nobody has said otherwise.
pub const SHARE: &str = "REGATTA_THREADS_SHARE";

/// What to start.
pub struct Job {
    /// The program of every rank.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Number of ranks.
    pub workers: usize,
    /// Threads that each rank computes with.
    pub threads: usize,
    /// How they communicate; none: the fastest that works.
    pub transport: Option<TransportKind>,
    /// More environment variables.
    pub environment: Vec<(OsString, OsString)>,
    /// The ranks are this program: rank 0 writes straight to the terminal (it draws a progress bar there), and all tell
    /// the launcher why they fail.
    pub own: bool,
}

/// Runs the job to its end.
///
/// # Errors
/// Ranks that cannot be started, or the first rank that failed: which, how, and what it said. A job that a signal has
/// stopped ends with the signal's exit code and no message.
pub fn launch(job: &Job) -> Result<()> {
    if job.workers == 0 {
        return Err("a job has at least 1 worker".into());
    }
    let options = Options::from_env()?;
    // A secret of this job's own: what else runs on this machine cannot join it.
    let secret = options.secret.map_or_else(Secret::random, Ok)?;
    let security = Security { secret: Some(secret), tls: options.tls };
    let store = StoreServer::start("127.0.0.1:0", job.workers, &security)?;
    let (sender, events) = channel();
    let _signals = signals::hand_to(sender.clone(), Event::Signal)?;
    let mut guard = Guard::start().map_err(|error| format!("cannot start the launcher's guard: {error}"))?;
    let alone = crate::cores::alone();
    let mut ranks: Vec<Rank> = Vec::new();
    for rank in 0..job.workers {
        let started =
            Rank::start(job, rank, &store, &security, &sender, alone).inspect(|rank| guard.add(rank.group()));
        match started {
            Ok(started) => ranks.push(started),
            Err(error) => {
                end(ranks, guard);
                return Err(format!("cannot start {}: {error}", job.program.display()).into());
            }
        }
    }
    let outcome = Watch::new(job, &ranks, &store).run(&events);
    let said = end(ranks, guard);
    match outcome {
        Outcome::Success => Ok(()),
        Outcome::Stopped(signal) => Err(Exit { message: None, code: signals::exit_code(signal) }.into()),
        Outcome::Failed(rank, how) => {
            let message = Some(describe(rank, how, &said[rank], &store));
            Err(Exit { message, code: how.exit_code() }.into())
        }
    }
}

/// Ends what the ranks have left running, and returns what they said last.
fn end(ranks: Vec<Rank>, guard: Guard) -> Vec<rank::Said> {
    rank::end_groups(&ranks);
    // Before the ranks are waited for: from then on others may have their ids.
    guard.dismiss();
    ranks.into_iter().map(Rank::finish).collect()
}

fn describe(rank: usize, how: End, said: &rank::Said, store: &StoreServer) -> String {
    if let Some(reason) = &said.reason {
        return format!("rank {rank}: {reason}");
    }
    let mut text = format!("rank {rank} {how}");
    let lines: Vec<&String> = said.tail.iter().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        // Its output went straight to the terminal; the job's store may know why it gave up.
        if let Some((_, reason)) = store.first_failure().filter(|(_, reason)| *reason != text) {
            text.push_str(": ");
            text.push_str(&reason);
        }
    } else {
        text.push_str("; it said last:");
        for line in lines {
            text.push_str("\n  ");
            text.push_str(line);
        }
    }
    text
}

/// Tells the launcher that started this rank why it fails. Whether that was possible.
pub fn tell(reason: &str) -> bool {
    // A rank of our own has a pipe there, which the launcher reads when the rank has ended.
    rustix::io::write(std::io::stdin(), reason.as_bytes()).is_ok()
}
