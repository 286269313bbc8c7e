//! Deadlines, and the news that the job has ended or that a rank has left it.

use crate::call::Call;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest sleep between looks at the clock and at the news.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// How long a rank that sees a peer's connection close waits for the news of who died first, and how long what
/// a rank sent before it left may still be on its way.
const GRACE: Duration = Duration::from_secs(1);

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
}

impl Health {
    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.store(true, Ordering::Release);
        self.changed.notify_all();
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

    /// The end of the job as an error, if it has come.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.news.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner).end.clone().map_or(Ok(()), Err)
    }

    fn has_left(&self, rank: usize) -> bool {
        self.news.load(Ordering::Relaxed)
            && self.state.lock().unwrap_or_else(PoisonError::into_inner).left.contains(&rank)
    }

    /// The first failure of the job, if its news comes soon; else `own`.
    pub(crate) fn verdict(&self, own: Error) -> Error {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, GRACE, |state| state.end.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.end.clone().unwrap_or(own)
    }
}

/// One wait in an operation: ends with progress, with the job, or with the deadline.
pub(crate) struct Wait<'a> {
    health: &'a Health,
    deadline: Duration,
    since: Option<Instant>,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(health: &'a Arc<Health>, deadline: Duration) -> Self {
        Self { health, deadline, since: None }
    }

    /// Called between sleeps while `peer` (a rank of the world) is waited for in `call`.
    pub(crate) fn check(&mut self, peer: usize, call: Call) -> Result<()> {
        self.health.check()?;
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited >= self.deadline {
            return Err(Error::Deadline { rank: peer, call: call.to_string(), waited });
        }
        if waited >= GRACE && self.health.has_left(peer) {
            return Err(Error::Left { rank: peer, call: call.to_string() });
        }
        Ok(())
    }

    /// Begins the deadline anew.
    pub(crate) fn progress(&mut self) {
        self.since = None;
    }
}
