//! What ranks tell each other beside the data path, through the job's directory: what they wait for when they wait
//! long, and what they call when some have joined.

use crate::call::{Call, ENCODED, digest};
use crate::error::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A small key/value store that all ranks of a job reach.
pub(crate) trait Directory: Send + Sync {
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;
    /// The value of `key`, waiting for it until `until`.
    fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>>;
    /// Adds to a number, which begins at 0, and returns the sum.
    fn add(&self, key: &str, amount: u64) -> Result<u64>;
    /// All entries whose key begins with `prefix`.
    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>>;
    /// Whether it cannot be reached any longer; if so, a rank on its host, where that is another host.
    fn lost(&self) -> Option<Option<usize>>;
    /// Tells all ranks at once that one has joined: what it has joined, and after which operation.
    fn announce(&self, token: u64, sequence: u32) -> Result<()>;
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

/// An operation that joined ranks have to take part in, or the end of it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invitation {
    Call(Call),
    /// All have joined; this rank was the last.
    End {
        rank: usize,
    },
}

/// One rank's pen and eyes in one group.
pub(crate) struct Notes {
    directory: Option<Arc<dyn Directory>>,
    group: u64,
    /// This rank in the world.
    rank: usize,
    /// A note of ours is there.
    said: AtomicBool,
}

impl Notes {
    pub(crate) fn new(directory: Option<Arc<dyn Directory>>, group: u64, rank: usize) -> Self {
        Self { directory, group, rank, said: AtomicBool::new(false) }
    }

    fn prefix(&self) -> String {
        format!("note/{:x}/", self.group)
    }

    /// Says that this rank has waited long for `waits_for` in `call`.
    pub(crate) fn say(&self, call: Call, waits_for: usize) {
        let Some(directory) = &self.directory else { return };
        let value = [call.to_bytes().as_slice(), &(waits_for as u32).to_le_bytes()].concat();
        // Without a directory there is nobody to tell; the wait goes on all the same.
        let _ = directory.set(&format!("{}{}", self.prefix(), self.rank), &value);
        self.said.store(true, Ordering::Relaxed);
    }

    /// Takes back what this rank has said.
    pub(crate) fn clear(&self) {
        if let Some(directory) = &self.directory
            && self.said.swap(false, Ordering::Relaxed)
        {
            let _ = directory.set(&format!("{}{}", self.prefix(), self.rank), b"");
        }
    }

    /// What all ranks of the group say at the moment.
    fn read(&self) -> Vec<Note> {
        let Some(directory) = &self.directory else { return vec![] };
        let prefix = self.prefix();
        let entries = directory.list(&prefix).unwrap_or_default();
        entries.iter().filter_map(|(key, value)| parse(key.strip_prefix(&prefix)?, value)).collect()
    }

    /// The rank at the end of the chain of those who wait for one another, beginning with `peer`: it waits for
    /// nobody. `peer` itself where there is no such end. Where the directory is cut off, so are the ranks beside it.
    pub(crate) fn culprit(&self, peer: usize) -> usize {
        let notes = self.read();
        if let Some(Some(rank)) = self.directory.as_ref().and_then(|directory| directory.lost()) {
            return rank;
        }
        let mut seen = vec![self.rank];
        let mut at = peer;
        while !seen.contains(&at) {
            seen.push(at);
            match notes.iter().find(|note| note.rank == at) {
                Some(note) => at = note.waits_for,
                None => return at,
            }
        }
        peer
    }

    /// A rank that will never come because it is in another call than this rank's, and this rank's: one with the same
    /// number, also where this rank has come further (`earlier` knows what it called), or one that waits, along a chain,
    /// for this rank.
    pub(crate) fn quarrel(
        &self,
        call: Call,
        waits_for: usize,
        earlier: &dyn Fn(u32) -> Option<Call>,
    ) -> Option<(Call, Note)> {
        let notes = self.read();
        let others = || notes.iter().filter(|note| note.rank != self.rank);
        for note in others().filter(|note| note.call.is_collective()) {
            let own = match note.call.sequence {
                sequence if call.is_collective() && sequence == call.sequence => Some(call),
                sequence => earlier(sequence),
            };
            if let Some(own) = own.filter(|own| !same(own, &note.call)) {
                return Some((own, *note));
            }
        }
        // A circle of waiting ranks never ends; one in it is in another call.
        let mut circle: Vec<Note> = vec![];
        let mut at = waits_for;
        while at != self.rank {
            let note = *others().find(|note| note.rank == at)?;
            if circle.contains(&note) {
                return None;
            }
            circle.push(note);
            at = note.waits_for;
        }
        circle.into_iter().find(|note| !same(&note.call, &call)).map(|note| (call, note))
    }

    /// What names the `epoch`-th joining of the group.
    pub(crate) fn token(&self, epoch: u64) -> u64 {
        digest(self.group, [epoch])
    }

    /// Says that this rank has joined; the number of ranks that have.
    pub(crate) fn join(&self, token: u64, sequence: u32) -> Result<u64> {
        let Some(directory) = &self.directory else { return Ok(1) };
        let joined = directory.add(&format!("joined/{token:x}"), 1)?;
        directory.set(&format!("joined/{token:x}/{}", self.rank), b"")?;
        directory.announce(token, sequence)?;
        Ok(joined)
    }

    /// The ranks of the world that have joined.
    pub(crate) fn joined(&self, token: u64) -> Vec<usize> {
        let Some(directory) = &self.directory else { return vec![] };
        let prefix = format!("joined/{token:x}/");
        let entries = directory.list(&prefix).unwrap_or_default();
        entries.iter().filter_map(|(key, _)| key.strip_prefix(&prefix)?.parse().ok()).collect()
    }

    /// Tells joined ranks what the `sequence`-th operation is.
    pub(crate) fn invite(&self, token: u64, sequence: u32, invitation: Invitation) -> Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let value = match invitation {
            Invitation::Call(call) => call.to_bytes().to_vec(),
            Invitation::End { rank } => (rank as u32).to_le_bytes().to_vec(),
        };
        directory.set(&format!("join/{token:x}/{sequence}"), &value)
    }

    /// What the `sequence`-th operation is, as soon as somebody says it; none when nobody does until `until`.
    pub(crate) fn invited(&self, token: u64, sequence: u32, until: Instant) -> Result<Option<Invitation>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let value = directory.try_get(&format!("join/{token:x}/{sequence}"), until)?;
        Ok(value.and_then(|value| parse_invitation(&value)))
    }
}

/// Whether two calls are the same but for what only concerns one pair of ranks.
fn same(a: &Call, b: &Call) -> bool {
    a == b || !(a.is_collective() || b.is_collective())
}

fn parse(rank: &str, value: &[u8]) -> Option<Note> {
    let (call, waits_for) = value.split_first_chunk::<ENCODED>()?;
    let waits_for = u32::from_le_bytes(waits_for.try_into().ok()?) as usize;
    Some(Note { rank: rank.parse().ok()?, call: Call::from_bytes(call)?, waits_for })
}

fn parse_invitation(value: &[u8]) -> Option<Invitation> {
    if let Ok(rank) = value.try_into().map(u32::from_le_bytes) {
        return Some(Invitation::End { rank: rank as usize });
    }
    Some(Invitation::Call(Call::from_bytes(value.try_into().ok()?)?))
}

/// Reads `value` as whatever it may be.
#[cfg(fuzzing)]
pub(crate) fn parsed(value: &[u8]) {
    if let Some(note) = parse("7", value) {
        assert_eq!([&note.call.to_bytes()[..], &(note.waits_for as u32).to_le_bytes()].concat(), value);
    }
    match parse_invitation(value) {
        Some(Invitation::Call(call)) => assert_eq!(call.to_bytes(), value),
        Some(Invitation::End { rank }) => assert_eq!((rank as u32).to_le_bytes(), value),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_note_is_read_without_panic(rank in ".{0,6}", value in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&rank, &value);
            let _ = parse_invitation(&value);
        }
    }
}
