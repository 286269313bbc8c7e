//! Ranks that have run out of data and still take part, with neutral numbers, until all have.
//!
//! A rank that joins says so to all. From then on whoever begins an operation, or has been waiting in one, publishes
//! its call under its number; the joined rank reads what the next one is and calls the same.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where a group stands with its joined ranks, as far as this rank knows.
#[derive(Debug)]
pub(crate) struct Joining {
    /// Names the present round of joining.
    token: AtomicU64,
    /// Operations up to here are published, or need not be.
    published: AtomicU32,
}

impl Joining {
    pub(crate) fn new(token: u64) -> Self {
        Self { token: AtomicU64::new(token), published: AtomicU32::new(0) }
    }

    pub(crate) fn token(&self) -> u64 {
        self.token.load(Ordering::Relaxed)
    }

    /// Operations up to here are published, where the first rank joined after operation `first`.
    pub(crate) fn published(&self, first: u32) -> u32 {
        self.published.load(Ordering::Relaxed).max(first)
    }

    /// Notes that operations up to `sequence` are published.
    pub(crate) fn publish(&self, sequence: u32) {
        self.published.store(sequence, Ordering::Relaxed);
    }

    /// Everybody has joined: the next round.
    pub(crate) fn renew(&self, token: u64) {
        self.token.store(token, Ordering::Relaxed);
    }
}
