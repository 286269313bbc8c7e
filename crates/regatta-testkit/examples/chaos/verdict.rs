//! What is wrong with the outcome of a trial, and the summary of many.

use crate::job::{IN_TIME, Outcome};
use crate::rank::Operation;
use crate::{Fault, Trial};
use std::collections::BTreeMap;
use std::fmt;

#[derive(Default)]
struct Tally {
    right: usize,
    wrong: usize,
    /// The slowest survivor's time to its error, a trial each.
    times: Vec<f64>,
}

/// All trials so far.
#[derive(Default)]
pub struct Summary {
    faults: BTreeMap<Fault, Tally>,
    leaked: usize,
    wrong: Vec<u64>,
}

impl Summary {
    /// Judges a trial; returns its line.
    pub fn add(&mut self, trial: &Trial, outcome: &Outcome) -> String {
        let problems = problems(trial, outcome);
        let times =
            survivors(trial).filter_map(|rank| outcome.ranks[rank].error.as_ref().map(|error| error.0));
        let slowest =
            times.fold(None, |slowest: Option<f64>, time| Some(slowest.map_or(time, |s| s.max(time))));
        let tally = self.faults.entry(trial.fault).or_default();
        tally.times.extend(slowest);
        self.leaked += outcome.left.len();
        let Trial { seed, world, transport, fault, victim, .. } = trial;
        let what = if *fault == Fault::Cut { "host" } else { "rank" };
        let slowest = slowest.map_or("never".into(), |time| format!("{time:.3} s"));
        let mut line = format!(
            "seed {seed}: {world} ranks over {transport}, {fault:?} {what} {victim}: slowest error {slowest}: "
        );
        if problems.is_empty() {
            tally.right += 1;
            line.push_str("right");
        } else {
            tally.wrong += 1;
            self.wrong.push(*seed);
            line.push_str("WRONG");
        }
        let verbose = std::env::var_os("CHAOS_VERBOSE").is_some();
        if verbose || !problems.is_empty() {
            if *fault == Fault::Mismatch {
                line.push_str(&format!(
                    "\n    rank {victim} was to call {}, not {}",
                    called(trial),
                    wanted(trial)
                ));
            }
            for (rank, seen) in outcome.ranks.iter().enumerate() {
                let error =
                    seen.error.as_ref().map_or("no error".into(), |(at, text)| format!("{at:.3} s: {text}"));
                line.push_str(&format!("\n    rank {rank} on host {}: {error}", trial.host(rank)));
                seen.rest.iter().for_each(|rest| line.push_str(&format!("\n      said: {rest}")));
            }
        }
        problems.iter().for_each(|problem| line.push_str(&format!("\n  ! {problem}")));
        line
    }

    pub fn all_right(&self) -> bool {
        self.wrong.is_empty()
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
                "{:<8} {:>4} trials: {} right, {} wrong; time to error of the slowest survivor: median {}, worst {}",
                format!("{fault:?}"),
                tally.right + tally.wrong,
                tally.right,
                tally.wrong,
                time(times.len() / 2),
                time(times.len().wrapping_sub(1)),
            )?;
        }
        write!(f, "leaked: {}", self.leaked)?;
        if !self.wrong.is_empty() {
            write!(f, "\nwrong; to see one again: chaos 1 SEED, with SEED one of {:?}", self.wrong)?;
        }
        Ok(())
    }
}

fn wanted(trial: &Trial) -> String {
    Operation::of(trial.seed, trial.operation, trial.world).text(trial.operation)
}

fn called(trial: &Trial) -> String {
    Operation::of(trial.seed, trial.operation, trial.world).instead(trial.seed).text(trial.operation)
}

/// Ranks that must get an error: a rank that made a mismatched call, and both sides of a cut, too.
fn survivors(trial: &Trial) -> impl Iterator<Item = usize> {
    let gone = matches!(trial.fault, Fault::Kill | Fault::Stop).then_some(trial.victim);
    (0..trial.world).filter(move |&rank| Some(rank) != gone)
}

fn problems(trial: &Trial, outcome: &Outcome) -> Vec<String> {
    let mut problems: Vec<String> = outcome.not_started.iter().cloned().collect();
    for rank in survivors(trial) {
        let seen = &outcome.ranks[rank];
        match &seen.error {
            None => problems.push(format!("rank {rank} got no error")),
            Some((at, _)) if *at < 0.0 => problems.push(format!("rank {rank} failed before the fault")),
            Some((at, _)) if *at > IN_TIME.as_secs_f64() => {
                problems.push(format!(
                    "rank {rank} got its error {at:.1} s after the fault, not within {IN_TIME:?}"
                ));
            }
            Some(_) => {}
        }
        if let Some((_, text)) = &seen.error {
            problems.extend(misled(trial, rank, text).map(|problem| format!("rank {rank}: {problem}")));
        }
        if seen.ended.is_none() {
            problems.push(format!("the process of rank {rank} did not end"));
        }
    }
    for (rank, seen) in outcome.ranks.iter().enumerate() {
        problems.extend(seen.rest.iter().map(|line| format!("rank {rank} said: {line}")));
    }
    problems.extend(outcome.left.iter().map(|left| format!("left behind: {left}")));
    problems
}

/// What is wrong with the error that `rank` got.
fn misled(trial: &Trial, rank: usize, text: &str) -> Option<String> {
    let blamed = blamed(text);
    match trial.fault {
        Fault::Kill | Fault::Stop if blamed == Some(trial.victim) => None,
        Fault::Kill | Fault::Stop => Some(format!("the error does not name rank {}", trial.victim)),
        Fault::Cut => match blamed {
            Some(other) if other >= trial.world => Some(format!("there is no rank {other}")),
            // One end of the cable is the victim's.
            Some(other) if (trial.host(other) == trial.victim) != (trial.host(rank) == trial.victim) => None,
            Some(other) => Some(format!("it names rank {other}, which is on its own side of the cut")),
            None => Some("the error names no rank".into()),
        },
        Fault::Mismatch => {
            let calls = calls(text);
            let own = calls.iter().find(|call| call.0 == trial.victim);
            let other = calls.iter().find(|call| call.0 != trial.victim);
            match (own, other) {
                (Some(own), Some(other)) if own.1 == called(trial) && other.1 != own.1 => None,
                (Some(_), Some(_)) => Some("it names both sides, but not the mismatched call".into()),
                _ => Some(format!("it does not name rank {} and another, with both calls", trial.victim)),
            }
        }
    }
}

/// `rank N called CALL`, of as many ranks as the text has.
fn calls(text: &str) -> Vec<(usize, &str)> {
    let mut calls = vec![];
    for part in text.split("rank ").skip(1) {
        let Some((rank, call)) = part.split_once(" called ") else { continue };
        let end = [", ", ": "].iter().filter_map(|end| call.find(end)).min().unwrap_or(call.len());
        calls.extend(rank.parse().ok().map(|rank| (rank, &call[..end])));
    }
    calls
}

/// The rank that an error holds responsible: not the one that passes the news on, but the one it waits for or
/// that is gone.
fn blamed(text: &str) -> Option<usize> {
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
