//! What a rank knows of one of its groups.

use super::call::{Call, show};
use super::directory::Invitation;
use super::health::Health;
use super::joining::Joining;
use super::late::OnLate;
use super::notes::Notes;
use super::recorder::Recorder;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Duration;

/// What an algorithm knows of its group.
#[derive(Clone)]
pub(crate) struct Context {
    pub rank: usize,
    pub size: usize,
    /// The generation of the job that the group belongs to.
    pub generation: u64,
    /// Ranks of the world by rank of the group, for errors.
    pub names: Arc<[usize]>,
    /// Ranks of the group by host, each list in order.
    pub hosts: Arc<[Vec<usize>]>,
    pub health: Arc<Health>,
    pub notes: Arc<Notes>,
    pub recorder: Arc<Recorder>,
    pub joining: Arc<Joining>,
    pub deadline: Duration,
    /// When a late rank is reported, and how.
    pub warn: Duration,
    pub on_late: OnLate,
}

impl Context {
    /// What is wrong when `peer` calls `theirs` while this rank calls `call`.
    pub(crate) fn mismatch(&self, call: Call, peer: usize, theirs: Option<Call>) -> Error {
        // A rank that only sends may be further on: what was called under the same number is what is wrong.
        let numbered = theirs.filter(|theirs| theirs.is_collective() && call.is_collective());
        let earlier = numbered.and_then(|theirs| self.earlier(theirs.sequence));
        let earlier = earlier.filter(|own| Some(*own) != theirs);
        if numbered.is_some_and(|theirs| theirs.sequence > call.sequence) {
            // The peer compares what it called before with our note, when it waits.
            self.notes.say(self.current().unwrap_or(call), self.names[peer]);
        }
        self.disagree(earlier.unwrap_or(call), self.names[peer], theirs)
    }

    /// This rank's call `own` and `theirs` of rank `other` of the world will never meet. A rank that is further on knows
    /// better what it called before, so its word is waited for.
    pub(crate) fn disagree(&self, own: Call, other: usize, theirs: Option<Call>) -> Error {
        let mismatch = Error::Mismatch {
            rank: self.names[self.rank],
            call: own.to_string(),
            other,
            other_call: show(theirs),
        };
        let further = |theirs: Call| theirs.sequence > own.sequence && theirs.is_collective();
        match own.is_collective() && theirs.is_some_and(further) {
            true => self.health.verdict(mismatch),
            false => mismatch,
        }
    }

    /// Whether the group has this rank.
    ///
    /// # Errors
    /// It has not; `what` is the operation that names it.
    pub(crate) fn rank_exists(&self, what: &str, rank: usize) -> Result<()> {
        if rank < self.size {
            return Ok(());
        }
        Err(Error::Usage(format!("{what}: there is no rank {rank} in a group of {}", self.size)))
    }

    /// Whether `peer` is another rank of the group.
    ///
    /// # Errors
    /// It is not; `what` is the operation that names it.
    pub(crate) fn other(&self, what: &str, peer: usize) -> Result<()> {
        self.rank_exists(what, peer)?;
        if peer == self.rank {
            return Err(Error::Usage(format!("{what}: rank {peer} is this rank itself")));
        }
        Ok(())
    }

    /// The operation that goes on in the group.
    pub(crate) fn current(&self) -> Option<Call> {
        self.recorder.current()
    }

    /// The collective operation with this number, as far as it is remembered.
    pub(crate) fn earlier(&self, sequence: u32) -> Option<Call> {
        self.recorder.call(sequence)
    }

    /// The ranks on the host of `rank`, in order.
    pub(crate) fn host_of(&self, rank: usize) -> &[usize] {
        self.hosts.iter().find(|host| host.contains(&rank)).map_or(&[], Vec::as_slice)
    }

    /// The context of some ranks of the group, numbered anew, of which this rank is one.
    pub(crate) fn among(&self, ranks: &[usize]) -> Self {
        Self {
            rank: ranks.iter().position(|&rank| rank == self.rank).unwrap_or(0),
            size: ranks.len(),
            names: ranks.iter().map(|&rank| self.names[rank]).collect(),
            hosts: Arc::new([]),
            ..self.clone()
        }
    }

    /// Publishes `call`, and those before it that joined ranks may have missed, where some have joined.
    pub(crate) fn invite(&self, call: Call) -> Result<()> {
        let token = self.joining.token();
        let Some(first) = self.health.first_joined(token) else { return Ok(()) };
        if !call.is_collective() {
            return Ok(());
        }
        let published = self.joining.published(first);
        for sequence in published.saturating_add(1)..=call.sequence {
            // The operation itself may not be recorded yet.
            let earlier = || self.earlier(sequence);
            if let Some(call) = Some(call).filter(|call| call.sequence == sequence).or_else(earlier) {
                self.notes.invite(token, sequence, Invitation::Call(call))?;
            }
        }
        self.joining.publish(call.sequence.max(published));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::Kind;
    use crate::numbers::element::DType;

    #[test]
    fn any_number_that_is_announced_is_taken() {
        let context = crate::algorithm::simulate::context(0, 2);
        context.health.joined(context.joining.token(), u32::MAX);
        let call = Call { sequence: 3, ..Call::new(Kind::Barrier, DType::U8, 0) };
        context.invite(call).unwrap();
    }
}
