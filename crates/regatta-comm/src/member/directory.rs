//! What ranks tell each other beside the data path, and where they do: their job's store, or a hub of threads.

use crate::error::Result;
use crate::member::call::{Call, ENCODED};
use std::time::Instant;

/// Where all ranks of a job leave each other word.
pub(crate) trait Directory: Send + Sync {
    /// Leaves a note in a group, in place of an earlier one of the same rank, and returns what the rank should know.
    /// `seen` is the version that it was told last, at first 0.
    fn say(&self, group: u64, note: &Note, seen: u64) -> Result<Heard>;
    /// Takes the note of `rank` back.
    fn unsay(&self, group: u64, rank: usize) -> Result<()>;
    /// The rank at the end of the chain of those who wait for one another, beginning with `peer`: see
    /// [`Waits::chain_end`](super::waits::Waits::chain_end).
    fn chain_end(&self, group: u64, rank: usize, peer: usize) -> Result<usize>;
    /// Records that `rank` has joined a round after operation `sequence`, and tells all ranks at once; the number of
    /// ranks that have joined.
    fn join(&self, round: Round, sequence: u32) -> Result<usize>;
    /// The ranks of the world that have joined.
    fn joined(&self, token: u64) -> Result<Vec<usize>>;
    /// Tells the joined ranks what operation `sequence` is.
    fn invite(&self, round: Round, sequence: u32, invitation: Invitation) -> Result<()>;
    /// What operation `sequence` is, waiting for it until `until`. The rank needs no earlier one any longer.
    fn invited(&self, round: Round, sequence: u32, until: Instant) -> Result<Option<Invitation>>;
    /// Whether it cannot be reached any longer; if so, a rank on its host, where that is another host.
    fn lost(&self) -> Option<Option<usize>>;
}

/// What a rank that waits long says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Note {
    /// Rank of the world.
    pub rank: usize,
    pub call: Call,
    /// The rank of the world that it waits for.
    pub waits_for: usize,
}

/// What a rank that waits long is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The number of the last note: what is said later has a larger one.
    pub version: u64,
    /// The collective calls in which others wait and this rank does not: a note for each, that of the lowest rank.
    pub others: Vec<Note>,
    /// The first rank, in a circle of ranks that wait for one another and for this one, that is in another call; when
    /// all in the circle have said it again since the version that was seen.
    pub circle: Option<Note>,
}

/// One rank's place in one round of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Round {
    /// Names the round.
    pub token: u64,
    /// Ranks of the group.
    pub size: usize,
    /// Rank of the world.
    pub rank: usize,
}

/// An operation that joined ranks have to take part in, or the end of it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invitation {
    Call(Call),
    /// All have joined; this rank of the group was the last.
    End {
        rank: usize,
    },
}

/// Whether two calls are the same but for what only concerns one pair of ranks.
pub(super) fn same(a: &Call, b: &Call) -> bool {
    a == b || !(a.is_collective() || b.is_collective())
}

impl Heard {
    /// A rank that will never come because it is in another call than this rank's, and this rank's: one with the same
    /// number as `call`, also where this rank has come further (`earlier` knows what it called), or one that waits, along
    /// a chain, for this rank.
    pub(crate) fn conflict(&self, call: Call, earlier: &dyn Fn(u32) -> Option<Call>) -> Option<(Call, Note)> {
        let numbered = self.others.iter().find_map(|note| {
            let own = match note.call.sequence {
                sequence if call.is_collective() && sequence == call.sequence => Some(call),
                sequence => earlier(sequence),
            };
            own.filter(|own| !same(own, &note.call)).map(|own| (own, *note))
        });
        numbered.or_else(|| self.circle.map(|note| (call, note)))
    }
}

impl Note {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let [rank, waits_for] = [self.rank, self.waits_for].map(|rank| (rank as u32).to_le_bytes());
        [&rank, &self.call.to_bytes()[..], &waits_for].concat()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (rank, rest) = bytes.split_first_chunk::<4>()?;
        let (call, waits_for) = rest.split_first_chunk::<ENCODED>()?;
        let [rank, waits_for] =
            [*rank, waits_for.try_into().ok()?].map(|rank| u32::from_le_bytes(rank) as usize);
        Some(Self { rank, call: Call::from_bytes(call)?, waits_for })
    }
}

impl Invitation {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        match self {
            Self::Call(call) => call.to_bytes().to_vec(),
            Self::End { rank } => (rank as u32).to_le_bytes().to_vec(),
        }
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if let Ok(rank) = bytes.try_into().map(u32::from_le_bytes) {
            return Some(Self::End { rank: rank as usize });
        }
        Some(Self::Call(Call::from_bytes(bytes.try_into().ok()?)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..48)) {
            if let Some(note) = Note::from_bytes(&bytes) {
                prop_assert_eq!(note.to_bytes(), bytes.clone());
            }
            if let Some(invitation) = Invitation::from_bytes(&bytes) {
                prop_assert_eq!(invitation.to_bytes(), bytes);
            }
        }
    }
}
