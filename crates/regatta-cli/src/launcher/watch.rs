//! What the launcher does while its ranks run: it waits for their ends and for signals.

use super::Job;
use super::activity::Activity;
use super::rank::{End, Rank};
use crate::out;
use crate::signals::{self, Received, STOPS, Stops, USER, Wish};
use regatta_comm::rendezvous::StoreServer;
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGCONT, SIGTSTP};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long ranks may take to end by themselves after one has failed.
const GRACE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// How long ranks that a signal asks to stop may do nothing at all.
const GRACE_AFTER_SIGNAL: Duration = Duration::from_secs(60);
/// How often the launcher looks at the clock, where it has something to wait for.
const TICK: Duration = Duration::from_millis(50);
/// How often it looks whether ranks still do something.
const LOOK: Duration = Duration::from_secs(1);

/// What the launcher hears of.
pub enum Event {
    Signal(Received),
    Ended(usize, End),
}

/// How a job has ended.
pub enum Outcome {
    Success,
    /// A signal has stopped it, as it should.
    Stopped(i32),
    Failed(usize, End),
}

pub struct Watch<'a> {
    job: &'a Job,
    ranks: &'a [Rank],
    store: &'a StoreServer,
    stops: Stops,
    /// The signal that asked to stop.
    asked: Option<i32>,
    /// A second one has ended all ranks.
    ended: bool,
    /// The signal of the first rank that one has stopped.
    stopped: Option<i32>,
    /// A rank was ended by a signal before it could save: others cannot save without it.
    cut_short: bool,
    failed: Option<(usize, End)>,
    patience: Option<Patience>,
    running: usize,
}

impl<'a> Watch<'a> {
    pub fn new(job: &'a Job, ranks: &'a [Rank], store: &'a StoreServer) -> Self {
        Self {
            job,
            ranks,
            store,
            stops: Stops::default(),
            asked: None,
            ended: false,
            stopped: None,
            cut_short: false,
            failed: None,
            patience: None,
            running: ranks.len(),
        }
    }

    /// Waits for all ranks.
    pub fn run(mut self, events: &Receiver<Event>) -> Outcome {
        while self.running > 0 {
            let event = match &self.patience {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => events.recv_timeout(TICK),
            };
            match event {
                Ok(Event::Signal(received)) => self.signal(received),
                Ok(Event::Ended(rank, end)) => self.ended(rank, end),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.patience.as_mut().is_some_and(Patience::is_over) {
                self.kill();
            }
        }
        match (self.failed, self.stopped) {
            (Some((rank, end)), _) => Outcome::Failed(rank, end),
            (None, Some(signal)) => Outcome::Stopped(self.asked.unwrap_or(signal)),
            (None, None) => Outcome::Success,
        }
    }

    fn kill(&mut self) {
        self.patience = Some(Patience::new(GRACE_AFTER_FAILURE, vec![]));
        self.ranks.iter().for_each(|rank| rank.signal_group(Signal::KILL));
    }

    fn signal(&mut self, received: Received) {
        let Some(signal) = Signal::from_named_raw(received.signal) else { return };
        match received.signal {
            SIGTSTP => {
                self.ranks.iter().for_each(|rank| rank.signal_group(Signal::TSTP));
                // Now this process, as the terminal wanted. It goes on here at SIGCONT.
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
            }
            SIGCONT => self.ranks.iter().for_each(|rank| rank.signal_group(Signal::CONT)),
            user if USER.contains(&user) => self.ranks.iter().for_each(|rank| rank.signal(signal)),
            stop if STOPS.contains(&stop) => match self.stops.count(received, Instant::now()) {
                Wish::Stop => self.stop(stop, signal),
                Wish::Copy => {}
                Wish::End => {
                    self.ended = true;
                    if self.failed.is_none() {
                        self.stopped.get_or_insert(stop);
                    }
                    self.kill();
                }
            },
            _ => {}
        }
    }

    /// Asks all ranks to save and stop.
    fn stop(&mut self, number: i32, signal: Signal) {
        self.asked = Some(number);
        if !self.job.own {
            let name = signals::name(number);
            let ranks = self.running;
            out::aside(format!("{name} is passed on to {ranks} rank(s); a second signal ends them at once"));
        }
        if self.patience.is_none() {
            let groups = self.ranks.iter().map(Rank::group).collect();
            self.patience = Some(Patience::new(GRACE_AFTER_SIGNAL, groups));
        }
        for rank in self.ranks {
            rank.signal_group(signal);
            // A rank that is stopped saves when it goes on.
            rank.signal_group(Signal::CONT);
        }
    }

    fn ended(&mut self, rank: usize, end: End) {
        self.running -= 1;
        let by_signal = self.by_signal(end);
        if let Some(signal) = by_signal {
            self.stopped.get_or_insert(signal);
        }
        if end == End::Code(0) || (by_signal.is_some() && matches!(end, End::Code(_))) || self.ended {
            return;
        }
        if self.failed.is_none() && (by_signal.is_some() || self.cut_short) {
            self.cut_short = true;
            self.store.abort(Some(rank), &format!("rank {rank} {end} before it could save"));
            return;
        }
        let first = self.store.first_failure().and_then(|(rank, _)| rank);
        if self.failed.is_some() {
            if first == Some(rank) {
                // Others may end faster than the one that failed first is found dead.
                self.failed = Some((rank, end));
            }
            return;
        }
        self.failed = Some((rank, end));
        // It may have ended without a word to the others.
        self.store.abort(Some(rank), &format!("rank {rank} {end}"));
        self.patience = Some(Patience::new(GRACE_AFTER_FAILURE, vec![]));
        if !self.job.own && self.running > 0 {
            out::aside(format!("rank {rank} {end}; the others are ended"));
        }
    }

    /// The signal that has ended a rank in the way that signals are meant to: one that the launcher has passed on, or one
    /// that a rank of our own says it was stopped by.
    fn by_signal(&self, end: End) -> Option<i32> {
        match end {
            End::Code(code) if self.asked.is_some() || self.job.own => signals::of_exit_code(code),
            End::Signal(signal) if self.asked.is_some() && STOPS.contains(&signal) => Some(signal),
            _ => None,
        }
    }
}

/// How long ranks are given to end. Time in which they do something does not count where `groups` are watched, nor does
/// time in which the launcher itself was stopped.
struct Patience {
    full: Duration,
    left: Duration,
    looked: Instant,
    groups: Vec<Pid>,
    before: Activity,
    last_look: Instant,
}

impl Patience {
    fn new(full: Duration, groups: Vec<Pid>) -> Self {
        let now = Instant::now();
        let before = Activity::of(&groups);
        Self { full, left: full, looked: now, groups, before, last_look: now }
    }

    fn is_over(&mut self) -> bool {
        // Longer than a few ticks only where the launcher was stopped.
        self.left = self.left.saturating_sub(self.looked.elapsed().min(4 * TICK));
        self.looked = Instant::now();
        if !self.groups.is_empty() && self.last_look.elapsed() >= LOOK {
            let now = Activity::of(&self.groups);
            if now.moved_since(&self.before, self.last_look.elapsed()) {
                self.left = self.full;
            }
            (self.before, self.last_look) = (now, Instant::now());
        }
        self.left.is_zero()
    }
}
