//! Deadlines, and the news that the job has ended or that a rank has left it.

use crate::error::{Error, Result};
use crate::member::call::Call;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Longest sleep between looks at the clock and at the news.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// How long a rank that sees a failure waits for the news of a first one, and how long what a rank sent before it left
/// may still be on its way.
pub(super) const GRACE: Duration = Duration::from_secs(1);
/// How long a rank that sees a peer's connection close waits for the store's word whether the peer died or left: the
/// store may have to get its turn on a busy host first.
const WORD: Duration = Duration::from_secs(10);

/// Why a generation has ended for a rank that has begun a later one.
pub(crate) fn gone_on(generation: u64) -> String {
    format!("this rank has gone on to generation {generation} of the job")
}

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

    /// All ranks that have said goodbye.
    pub(crate) fn all_left(&self) -> BTreeSet<usize> {
        self.state(|state| state.left.clone())
    }

    /// The first failure of the job, if its news comes soon; else `own`.
    pub(crate) fn verdict(&self, own: Error) -> Error {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |state: &mut State| state.end.is_none() && !state.silent;
        let waited = self.changed.wait_timeout_while(state, GRACE, waits);
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
