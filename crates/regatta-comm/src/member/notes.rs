//! What a rank tells the others beside the data path: what it waits for when it waits long, and what it calls when some
//! have joined.

use super::directory::{Directory, Heard, Invitation, Note, Round};
use crate::error::Result;
use crate::member::call::{Call, digest};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// What one rank writes and reads of notes in one group.
pub(crate) struct Notes {
    directory: Option<Arc<dyn Directory>>,
    group: u64,
    /// Ranks of the group.
    size: usize,
    /// This rank in the world.
    rank: usize,
    /// A note of ours is there.
    said: AtomicBool,
    /// The version of the notes that this rank has seen last.
    seen: AtomicU64,
}

impl Notes {
    pub(crate) fn new(directory: Option<Arc<dyn Directory>>, group: u64, size: usize, rank: usize) -> Self {
        Self { directory, group, size, rank, said: AtomicBool::new(false), seen: AtomicU64::new(0) }
    }

    /// Says that this rank has waited long for `waits_for` in `call`, and hears what others say.
    pub(crate) fn say(&self, call: Call, waits_for: usize) -> Heard {
        let Some(directory) = &self.directory else { return Heard::default() };
        let note = Note { rank: self.rank, call, waits_for };
        self.said.store(true, Ordering::Relaxed);
        // Without a directory there is nobody to tell; the wait goes on all the same.
        let heard = directory.say(self.group, &note, self.seen.load(Ordering::Relaxed)).unwrap_or_default();
        self.seen.store(heard.version, Ordering::Relaxed);
        heard
    }

    /// Takes back what this rank has said.
    pub(crate) fn clear(&self) {
        // A load first: it costs less than a swap, and nearly always there is nothing.
        if let Some(directory) = &self.directory
            && self.said.load(Ordering::Relaxed)
            && self.said.swap(false, Ordering::Relaxed)
        {
            let _ = directory.unsay(self.group, self.rank);
        }
    }

    /// The rank at the end of the chain of those who wait for one another, beginning with `peer`: it waits for
    /// nobody. `peer` itself where there is no such end. Where the directory is cut off, so are the ranks beside it.
    pub(crate) fn chain_end(&self, peer: usize) -> usize {
        let Some(directory) = &self.directory else { return peer };
        let chain_end = directory.chain_end(self.group, self.rank, peer);
        directory.lost().flatten().or(chain_end.ok()).unwrap_or(peer)
    }

    /// What names the `epoch`-th joining of the group.
    pub(crate) fn token(&self, epoch: u64) -> u64 {
        digest(self.group, [epoch])
    }

    fn round(&self, token: u64) -> Round {
        Round { token, size: self.size, rank: self.rank }
    }

    /// Says that this rank has joined after operation `sequence`; the number of ranks that have.
    pub(crate) fn join(&self, token: u64, sequence: u32) -> Result<usize> {
        let Some(directory) = &self.directory else { return Ok(1) };
        directory.join(self.round(token), sequence)
    }

    /// The ranks of the world that have joined.
    pub(crate) fn joined(&self, token: u64) -> Vec<usize> {
        let Some(directory) = &self.directory else { return vec![] };
        directory.joined(token).unwrap_or_default()
    }

    /// Tells joined ranks what the `sequence`-th operation is.
    pub(crate) fn invite(&self, token: u64, sequence: u32, invitation: Invitation) -> Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        directory.invite(self.round(token), sequence, invitation)
    }

    /// What the `sequence`-th operation is, as soon as somebody says it; none when nobody does until `until`.
    pub(crate) fn invited(&self, token: u64, sequence: u32, until: Instant) -> Result<Option<Invitation>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        directory.invited(self.round(token), sequence, until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::Kind;
    use crate::numbers::element::DType;
    use crate::transport::thread::Hub;

    /// Rank 0, which waits for rank 1, who has said that it waits for rank 0.
    fn two(own: Call, theirs: Call) -> (impl Fn() -> bool, Notes) {
        let hub: Arc<dyn Directory> = Arc::new(Hub::default());
        let (mine, other) = (Notes::new(Some(hub.clone()), 7, 2, 0), Notes::new(Some(hub), 7, 2, 1));
        other.say(theirs, 0);
        (move || mine.say(own, 1).conflict(own, &|_| Some(theirs)).is_some(), other)
    }

    #[test]
    fn a_circle_is_believed_when_all_in_it_say_it_again() {
        let own = Call { sequence: 2, ..Call::new(Kind::AllReduce, DType::F32, 8) };
        let theirs = Call { sequence: 1, ..Call::new(Kind::Send, DType::F32, 8) };
        let (conflicts, other) = two(own, theirs);
        // The note may be older than what rank 0 has sent.
        assert!(!conflicts() && !conflicts() && !conflicts());
        other.say(theirs, 0);
        assert!(conflicts());
        other.say(theirs, 5);
        assert!(!conflicts());
    }

    #[test]
    fn who_is_behind_in_the_same_operations_is_no_conflict() {
        let call = |sequence| Call { sequence, ..Call::new(Kind::AllReduce, DType::F32, 8) };
        for theirs in [98, 100] {
            let (conflicts, other) = two(call(99), call(theirs));
            for _ in 0..3 {
                assert!(!conflicts());
                other.say(call(theirs), 0);
            }
        }
    }
}
