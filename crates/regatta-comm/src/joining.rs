//! Ranks that have run out of data and still take part, with neutral numbers, until all have.
//!
//! A rank that joins says so to all. From then on whoever begins an operation, or has been waiting in one, publishes
//! its call under its number; the joined rank reads what the next one is and calls the same.

use crate::algorithm::Context;
use crate::call::Call;
use crate::error::Result;
use crate::notes::Invitation;
use std::sync::PoisonError;
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

    /// Everybody has joined: the next round.
    pub(crate) fn renew(&self, token: u64) {
        self.token.store(token, Ordering::Relaxed);
    }

    /// Publishes `call`, and those before it that joined ranks may have missed, where some have joined.
    pub(crate) fn invite(&self, context: &Context, call: Call) -> Result<()> {
        let token = self.token();
        let Some(first) = context.health.first_joined(token) else { return Ok(()) };
        if !call.is_collective() {
            return Ok(());
        }
        let published = self.published.load(Ordering::Relaxed).max(first);
        for sequence in published.saturating_add(1)..=call.sequence {
            let known = context.recorder.lock().unwrap_or_else(PoisonError::into_inner).call(sequence);
            if let Some(call) = known {
                context.notes.invite(token, sequence, Invitation::Call(call))?;
            }
        }
        self.published.store(call.sequence.max(published), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Kind;
    use crate::element::DType;

    #[test]
    fn any_number_that_is_announced_is_taken() {
        let context = crate::algorithm::simulate::context(0, 2);
        context.health.joined(0, u32::MAX);
        let call = Call { sequence: 3, ..Call::new(Kind::Barrier, DType::U8, 0) };
        Joining::new(0).invite(&context, call).unwrap();
    }
}
