//! The launcher's loop while its ranks run: it waits for signals and for the ends of ranks.

use super::activity::Activity;
use super::event::{End, Event};
use super::job::Job;
use super::rank::Rank;
use crate::out;
use crate::signals::{self, Received, Request, STOPS, StopRequests, USER};
use regatta_comm::rendezvous::StoreServer;
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGCONT, SIGTSTP};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long ranks may take to end by themselves after one has failed.
const GRACE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// How long ranks may make no progress after a signal has asked them to stop.
const GRACE_AFTER_SIGNAL: Duration = Duration::from_secs(60);
/// How often the launcher updates a grace period.
const TICK: Duration = Duration::from_millis(50);
/// The most that one update takes off: more time has passed only if the launcher itself was stopped.
const LONGEST_TICK: Duration = Duration::from_millis(200);
/// How often it looks whether ranks make progress.
const ACTIVITY_INTERVAL: Duration = Duration::from_secs(1);

/// How a job has ended.
pub enum Outcome {
    Success,
    /// A signal has stopped it, as requested.
    Stopped(i32),
    Failed(usize, End),
}

pub struct Watch<'a> {
    job: &'a Job,
    ranks: &'a [Rank],
    store: &'a StoreServer,
    stops: StopRequests,
    /// The first signal that asked to stop.
    requested: Option<i32>,
    /// A second signal has ended all ranks.
    killed: bool,
    /// The signal that stopped the first of the stopped ranks.
    stopped_by: Option<i32>,
    /// A signal ended a rank before it could save; the others cannot save without it.
    cut_short: bool,
    failed: Option<(usize, End)>,
    grace: Option<GracePeriod>,
    running: usize,
}

impl<'a> Watch<'a> {
    pub fn new(job: &'a Job, ranks: &'a [Rank], store: &'a StoreServer) -> Self {
        Self {
            job,
            ranks,
            store,
            stops: StopRequests::default(),
            requested: None,
            killed: false,
            stopped_by: None,
            cut_short: false,
            failed: None,
            grace: None,
            running: ranks.len(),
        }
    }

    /// Waits for all ranks.
    pub fn run(mut self, events: &Receiver<Event>) -> Outcome {
        while self.running > 0 {
            let event = match &self.grace {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => events.recv_timeout(TICK),
            };
            match event {
                Ok(Event::Signal(received)) => self.signal(received),
                Ok(Event::Ended(rank, end)) => self.ended(rank, end),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.grace.as_mut().is_some_and(GracePeriod::is_over) {
                self.kill();
            }
        }
        match (self.failed, self.stopped_by) {
            (Some((rank, end)), _) => Outcome::Failed(rank, end),
            (None, Some(signal)) => Outcome::Stopped(self.requested.unwrap_or(signal)),
            (None, None) => Outcome::Success,
        }
    }

    fn kill(&mut self) {
        self.grace = Some(GracePeriod::new(GRACE_AFTER_FAILURE, vec![]));
        self.ranks.iter().for_each(|rank| rank.signal_group(Signal::KILL));
    }

    fn signal(&mut self, received: Received) {
        let Some(signal) = Signal::from_named_raw(received.signal) else { return };
        match received.signal {
            SIGTSTP => {
                self.ranks.iter().for_each(|rank| rank.signal_group(Signal::TSTP));
                // Then this process itself, as the terminal asked. It goes on here after SIGCONT.
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
            }
            SIGCONT => self.ranks.iter().for_each(|rank| rank.signal_group(Signal::CONT)),
            user if USER.contains(&user) => self.ranks.iter().for_each(|rank| rank.signal(signal)),
            stop if STOPS.contains(&stop) => match self.stops.classify(received, Instant::now()) {
                Request::Stop => self.stop(stop, signal),
                Request::Duplicate => {}
                Request::End => {
                    self.killed = true;
                    if self.failed.is_none() {
                        self.stopped_by.get_or_insert(stop);
                    }
                    self.kill();
                }
            },
            _ => {}
        }
    }

    /// Asks all ranks to save and stop.
    fn stop(&mut self, number: i32, signal: Signal) {
        self.requested = Some(number);
        if !self.job.own {
            let name = signals::name(number);
            let ranks = self.running;
            out::note_in_background(format!(
                "{name} was passed on to {ranks} rank(s); a second signal ends them at once"
            ));
        }
        if self.grace.is_none() {
            let groups = self.ranks.iter().map(Rank::group).collect();
            self.grace = Some(GracePeriod::new(GRACE_AFTER_SIGNAL, groups));
        }
        for rank in self.ranks {
            rank.signal_group(signal);
            // A stopped rank handles the signal only after SIGCONT.
            rank.signal_group(Signal::CONT);
        }
    }

    fn ended(&mut self, rank: usize, end: End) {
        self.running -= 1;
        let by_signal = self.by_signal(end);
        if let Some(signal) = by_signal {
            self.stopped_by.get_or_insert(signal);
        }
        if end == End::Code(0) || (by_signal.is_some() && matches!(end, End::Code(_))) || self.killed {
            return;
        }
        if self.failed.is_none() && (by_signal.is_some() || self.cut_short) {
            self.cut_short = true;
            self.store.abort(Some(rank), &format!("rank {rank} {end} before it could save"));
            return;
        }
        let first = self.store.first_failure().and_then(|(rank, _)| rank);
        let spared = |rank: usize| self.job.spared.contains(&rank);
        // Unless it ends because of another one, which is not spared.
        if self.failed.is_none() && spared(rank) && first.is_none_or(spared) {
            // The store tells the others, who may have noticed before.
            out::note_in_background(format!("warning: rank {rank} {end}; the others go on without it"));
            return;
        }
        if self.failed.is_some() {
            if first == Some(rank) {
                // The end of another rank may be noticed before the end of the one that failed first.
                self.failed = Some((rank, end));
            }
            return;
        }
        self.failed = Some((rank, end));
        // The rank may have ended without telling the others.
        self.store.abort(Some(rank), &format!("rank {rank} {end}"));
        self.grace = Some(GracePeriod::new(GRACE_AFTER_FAILURE, vec![]));
        if !self.job.own && self.running > 0 {
            out::note_in_background(format!("rank {rank} {end}; the others are ended"));
        }
    }

    /// The signal that has stopped a rank as intended: one that the launcher has passed on, or one that a rank of our
    /// own reports by its exit code.
    fn by_signal(&self, end: End) -> Option<i32> {
        match end {
            End::Code(code) if self.requested.is_some() || self.job.own => signals::of_exit_code(code),
            End::Signal(signal) if self.requested.is_some() && STOPS.contains(&signal) => Some(signal),
            _ => None,
        }
    }
}

/// A period in which ranks may end by themselves. It starts again whenever a process of `groups` makes progress. Time
/// in which the launcher itself was stopped does not count.
struct GracePeriod {
    full: Duration,
    left: Duration,
    updated: Instant,
    groups: Vec<Pid>,
    before: Activity,
    measured: Instant,
}

impl GracePeriod {
    fn new(full: Duration, groups: Vec<Pid>) -> Self {
        let now = Instant::now();
        let before = Activity::of(&groups);
        Self { full, left: full, updated: now, groups, before, measured: now }
    }

    fn is_over(&mut self) -> bool {
        self.left = self.left.saturating_sub(self.updated.elapsed().min(LONGEST_TICK));
        self.updated = Instant::now();
        if !self.groups.is_empty() && self.measured.elapsed() >= ACTIVITY_INTERVAL {
            let now = Activity::of(&self.groups);
            if now.progressed_since(&self.before, self.measured.elapsed()) {
                self.left = self.full;
            }
            (self.before, self.measured) = (now, Instant::now());
        }
        self.left.is_zero()
    }
}
