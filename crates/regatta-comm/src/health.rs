//! Deadlines, and the news that the job has ended or that a rank has left it.

use crate::algorithm::Context;
use crate::call::Call;
use crate::error::{Error, Result};
use crate::timer::Timer;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Longest sleep between looks at the clock and at the news.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// How long a rank that sees a failure waits for the news of a first one, and how long what a rank sent before it left
/// may still be on its way.
const GRACE: Duration = Duration::from_secs(1);
/// How long a rank that sees a peer's connection close waits for the store's word whether the peer died or left: the
/// store may have to get its turn on a busy host first.
const WORD: Duration = Duration::from_secs(10);
/// After so long without progress, and again after each so long, ranks compare notes: those that are in different
/// calls find out.
const NOTE: Duration = Duration::from_millis(500);

/// Whether the job still lives, shared by everything in it on this rank.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// There is news of any kind.
    news: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    end: Option<Error>,
    left: BTreeSet<usize>,
    /// The store has ended: no more news will come.
    silent: bool,
    /// What ranks have joined, and after which operation.
    joined: BTreeMap<u64, u32>,
}

impl Health {
    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    fn state<R>(&self, read: impl FnOnce(&mut State) -> R) -> R {
        read(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records the end of the job; the first reason stays.
    pub(crate) fn end(&self, rank: Option<usize>, reason: &str) {
        self.update(|state| {
            state.end.get_or_insert_with(|| Error::Aborted { rank, reason: reason.into() });
        });
    }

    /// Records that `rank` will make no more calls.
    pub(crate) fn left(&self, rank: usize) {
        self.update(|state| {
            state.left.insert(rank);
        });
    }

    /// Records that no more news will come.
    pub(crate) fn silent(&self) {
        self.update(|state| state.silent = true);
    }

    /// Records that a rank has joined what `token` names, after operation `sequence`.
    pub(crate) fn joined(&self, token: u64, sequence: u32) {
        self.update(|state| {
            let first = state.joined.entry(token).or_insert(sequence);
            *first = sequence.min(*first);
        });
    }

    /// The operation after which the first rank joined, where one has.
    pub(crate) fn first_joined(&self, token: u64) -> Option<u32> {
        if !self.news.load(Ordering::Relaxed) {
            return None;
        }
        self.state(|state| state.joined.get(&token).copied())
    }

    /// The end of the job as an error, if it has come.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.news.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.state(|state| state.end.clone()).map_or(Ok(()), Err)
    }

    /// Whether `rank` has said goodbye.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.news.load(Ordering::Relaxed) && self.state(|state| state.left.contains(&rank))
    }

    /// The first failure of the job, if its news comes soon; else `own`.
    pub(crate) fn verdict(&self, own: Error) -> Error {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, GRACE, |state| state.end.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.end.clone().unwrap_or(own)
    }

    /// Why the connection to `rank` closed in the middle of `call`. A closed connection is no death by itself: the store
    /// hears a goodbye or a death in the order in which they came, so its word is waited for.
    pub(crate) fn closed(&self, rank: usize, call: &Call) -> Error {
        let call = call.to_string();
        let known = |state: &mut State| state.end.is_some() || state.left.contains(&rank);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let word = if state.silent { GRACE } else { WORD };
        let waited = self.changed.wait_timeout_while(state, word, |state| !known(state));
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match &state.end {
            Some(end) => end.clone(),
            None if state.left.contains(&rank) => Error::Left { rank, call },
            None => Error::PeerDied { rank, call },
        }
    }
}

/// A rank that others wait for, before it is fatal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Late {
    /// The rank that waits.
    pub rank: usize,
    /// The rank that it waits for, at the end of the chain of those who wait for one another.
    pub waits_for: usize,
    /// The call.
    pub call: String,
    /// When the wait began.
    pub since: SystemTime,
    /// How long it has lasted.
    pub waited: Duration,
    /// When it becomes an error.
    pub deadline: Duration,
}

impl std::fmt::Display for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of_day = self.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
        write!(
            f,
            "rank {} has waited {:.1} s for rank {} (since {:02}:{:02}:{:02} UTC) in {}; it gives up after {:.1} s",
            self.rank,
            self.waited.as_secs_f64(),
            self.waits_for,
            of_day / 3600,
            of_day / 60 % 60,
            of_day % 60,
            self.call,
            self.deadline.as_secs_f64()
        )
    }
}

/// One wait in an operation: ends with progress, with the job, or with the deadline.
pub(crate) struct Wait<'a> {
    context: &'a Context,
    timer: Option<Timer>,
    /// How long the wait had lasted at the last look.
    before: Duration,
    /// When to compare notes next.
    note: Duration,
    warned: bool,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(context: &'a Context) -> Self {
        let (timer, before, note, warned) = (None, Duration::ZERO, first_note(context), false);
        Self { context, timer, before, note, warned }
    }

    /// Called between sleeps while `peer` (of the group) is waited for in `call`.
    pub(crate) fn check(&mut self, peer: usize, call: Call) -> Result<()> {
        let context = self.context;
        let (health, notes) = (&context.health, &context.notes);
        health.check()?;
        context.joining.invite(context, call)?;
        let deadline = context.deadline;
        let waited = self.look(Duration::ZERO);
        // Parts of an operation have calls of their own; ranks compare the whole.
        let call = context.current().unwrap_or(call);
        let name = context.names[peer];
        if waited >= GRACE.min(deadline) && health.has_left(name) {
            return Err(Error::Left { rank: name, call: call.to_string() });
        }
        if waited >= self.note {
            self.note = waited + first_note(context);
            notes.say(call, name);
            let earlier = |sequence| context.earlier(sequence);
            if let Some((own, other)) = notes.quarrel(call, name, &earlier) {
                return Err(context.disagree(own, other.rank, Some(other.call)));
            }
            // A store that is cut off takes its time to be given up, in which nobody has stopped this process.
            self.look(deadline / 2);
        }
        if waited >= deadline {
            return Err(Error::Deadline { rank: notes.culprit(name), call: call.to_string(), waited });
        }
        if waited >= context.warn && !self.warned {
            self.warned = true;
            let since = SystemTime::now() - waited;
            let waits_for = notes.culprit(name);
            let rank = context.names[context.rank];
            context.on_late.report(&Late {
                rank,
                waits_for,
                call: call.to_string(),
                since,
                waited,
                deadline,
            });
            self.look(deadline / 2);
        }
        Ok(())
    }

    /// How long the wait has lasted, after something that may have taken as long as `pause`.
    fn look(&mut self, pause: Duration) -> Duration {
        let deadline = self.context.deadline;
        let waited = self.timer.get_or_insert_with(|| Timer::new(deadline)).used_after(pause);
        if waited < self.before {
            // This process was stopped: everything begins anew.
            self.note = first_note(self.context);
            self.warned = false;
        }
        self.before = waited;
        waited
    }

    /// Begins the deadline anew.
    pub(crate) fn progress(&mut self) {
        if self.timer.take().is_some() {
            self.before = Duration::ZERO;
            self.note = first_note(self.context);
        }
    }
}

/// When notes are compared for the first time: half-way at the latest, so that a short deadline has its notes, too.
fn first_note(context: &Context) -> Duration {
    NOTE.min(context.deadline / 2)
}
