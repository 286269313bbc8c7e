//! Checks the outcome of a trial, and summarises many trials.

use crate::job::{ERROR_LIMIT, Outcome};
use crate::rank::Operation;
use crate::{Fault, Trial};
use std::collections::BTreeMap;
use std::fmt;

/// The trials with one kind of fault.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    /// For each trial, the seconds until the last survivor got its error.
    times: Vec<f64>,
}

/// All trials so far.
#[derive(Default)]
pub struct Summary {
    faults: BTreeMap<Fault, Tally>,
    leaked: usize,
    /// The seeds of failed trials.
    failed: Vec<u64>,
}

impl Summary {
    /// Checks a trial, and returns a report of it.
    pub fn add(&mut self, trial: &Trial, outcome: &Outcome) -> String {
        let problems = problems(trial, outcome);
        let times =
            survivors(trial).filter_map(|rank| outcome.ranks[rank].error.as_ref().map(|error| error.0));
        let slowest =
            times.fold(None, |slowest: Option<f64>, time| Some(slowest.map_or(time, |s| s.max(time))));
        let tally = self.faults.entry(trial.fault).or_default();
        tally.times.extend(slowest);
        self.leaked += outcome.leaked.len();
        let Trial { seed, world, transport, fault, victim, .. } = trial;
        let what = if *fault == Fault::Cut { "host" } else { "rank" };
        let slowest = slowest.map_or("never".into(), |time| format!("{time:.3} s"));
        let mut line = format!(
            "seed {seed}: {world} ranks over {transport}, {fault:?} {what} {victim}: slowest error {slowest}: "
        );
        if problems.is_empty() {
            tally.passed += 1;
            line.push_str("passed");
        } else {
            tally.failed += 1;
            self.failed.push(*seed);
            line.push_str("FAILED");
        }
        let verbose = std::env::var_os("CHAOS_VERBOSE").is_some();
        if verbose || !problems.is_empty() {
            if *fault == Fault::Mismatch {
                line.push_str(&format!(
                    "\n    rank {victim} had to call {} instead of {}",
                    mismatched_call(trial),
                    expected_call(trial)
                ));
            }
            for (rank, seen) in outcome.ranks.iter().enumerate() {
                let error =
                    seen.error.as_ref().map_or("no error".into(), |(at, text)| format!("{at:.3} s: {text}"));
                line.push_str(&format!("\n    rank {rank} on host {}: {error}", trial.host(rank)));
                seen.rest.iter().for_each(|rest| line.push_str(&format!("\n      printed: {rest}")));
            }
        }
        problems.iter().for_each(|problem| line.push_str(&format!("\n  ! {problem}")));
        line
    }

    pub fn all_passed(&self) -> bool {
        self.failed.is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (fault, tally) in &self.faults {
            let mut times = tally.times.clone();
            times.sort_unstable_by(f64::total_cmp);
            let time = |at: usize| times.get(at).map_or("-".into(), |time| format!("{time:.3} s"));
            writeln!(
                f,
                "{:<8} {:>4} trials: {} passed, {} failed; time to error of the slowest survivor: median {}, worst {}",
                format!("{fault:?}"),
                tally.passed + tally.failed,
                tally.passed,
                tally.failed,
                time(times.len() / 2),
                time(times.len().wrapping_sub(1)),
            )?;
        }
        write!(f, "leaked: {}", self.leaked)?;
        if !self.failed.is_empty() {
            write!(f, "\nfailed; to repeat a trial: chaos 1 SEED, with SEED one of {:?}", self.failed)?;
        }
        Ok(())
    }
}

/// The operation that the victim should have called.
fn expected_call(trial: &Trial) -> String {
    Operation::of(trial.seed, trial.operation, trial.world).text(trial.operation)
}

/// The mismatched operation that the victim called.
fn mismatched_call(trial: &Trial) -> String {
    Operation::of(trial.seed, trial.operation, trial.world).mismatched(trial.seed).text(trial.operation)
}

/// The ranks that must get an error. A rank that made a mismatched call is one of them, and so are both sides of a
/// cut.
fn survivors(trial: &Trial) -> impl Iterator<Item = usize> {
    let gone = matches!(trial.fault, Fault::Kill | Fault::Stop).then_some(trial.victim);
    (0..trial.world).filter(move |&rank| Some(rank) != gone)
}

/// Everything that is wrong with the outcome.
fn problems(trial: &Trial, outcome: &Outcome) -> Vec<String> {
    let mut problems: Vec<String> = outcome.not_started.iter().cloned().collect();
    for rank in survivors(trial) {
        let seen = &outcome.ranks[rank];
        match &seen.error {
            None => problems.push(format!("rank {rank} got no error")),
            Some((at, _)) if *at < 0.0 => problems.push(format!("rank {rank} failed before the fault")),
            Some((at, _)) if *at > ERROR_LIMIT.as_secs_f64() => {
                problems.push(format!(
                    "rank {rank} got its error {at:.1} s after the fault, not within {ERROR_LIMIT:?}"
                ));
            }
            Some(_) => {}
        }
        if let Some((_, text)) = &seen.error {
            problems
                .extend(error_problem(trial, rank, text).map(|problem| format!("rank {rank}: {problem}")));
        }
        if seen.ended.is_none() {
            problems.push(format!("the process of rank {rank} did not end"));
        }
    }
    for (rank, seen) in outcome.ranks.iter().enumerate() {
        problems.extend(seen.rest.iter().map(|line| format!("rank {rank} printed: {line}")));
    }
    problems.extend(outcome.leaked.iter().map(|leaked| format!("left behind: {leaked}")));
    problems
}

/// What is wrong with the error that `rank` got.
fn error_problem(trial: &Trial, rank: usize, text: &str) -> Option<String> {
    let cause = cause(text);
    match trial.fault {
        Fault::Kill | Fault::Stop if cause == Some(trial.victim) => None,
        Fault::Kill | Fault::Stop => Some(format!("the error does not name rank {}", trial.victim)),
        Fault::Cut => match cause {
            Some(other) if other >= trial.world => {
                Some(format!("it names rank {other}, which does not exist"))
            }
            // The cut is between the victim host and all others.
            Some(other) if (trial.host(other) == trial.victim) != (trial.host(rank) == trial.victim) => None,
            Some(other) => Some(format!("it names rank {other}, which is on its own side of the cut")),
            None => Some("the error names no rank".into()),
        },
        Fault::Mismatch => {
            let calls = calls(text);
            let own = calls.iter().find(|call| call.0 == trial.victim);
            let other = calls.iter().find(|call| call.0 != trial.victim);
            match (own, other) {
                (Some(own), Some(other)) if own.1 == mismatched_call(trial) && other.1 != own.1 => None,
                (Some(_), Some(_)) => Some("it names both sides, but not the mismatched call".into()),
                _ => Some(format!("it does not name rank {} and another, with both calls", trial.victim)),
            }
        }
    }
}

/// Every rank and its call in an error: the text has `rank N called CALL` for each.
fn calls(text: &str) -> Vec<(usize, &str)> {
    let mut calls = vec![];
    for part in text.split("rank ").skip(1) {
        let Some((rank, call)) = part.split_once(" called ") else { continue };
        let end = [", ", ": "].iter().filter_map(|end| call.find(end)).min().unwrap_or(call.len());
        calls.extend(rank.parse().ok().map(|rank| (rank, &call[..end])));
    }
    calls
}

/// The rank that an error names as the cause: the one that it waits for or that has failed, not the one that forwards
/// the error.
fn cause(text: &str) -> Option<usize> {
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse::<usize>().ok()
    };
    if let Some((_, rest)) = text.rsplit_once("waiting for rank ") {
        return number(rest);
    }
    let own = text.rsplit_once("gave up: ").map(|(_, rest)| rest).filter(|rest| rest.contains("rank "));
    number(own.unwrap_or(text).split_once("rank ")?.1)
}
