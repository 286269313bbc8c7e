//! The notes of all ranks that wait long, where they are kept: finds who holds the others up, and who will never come.
//!
//! A rank that waits is answered in a few words, however many ranks wait: what it would find in the list of all notes is
//! found here.

use super::directory::{Heard, Note, same};
use std::collections::BTreeMap;

/// Most calls that a rank is told of at once.
const MOST_CALLS: usize = 4096;

/// Notes by group.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    groups: BTreeMap<u64, BTreeMap<usize, Said>>,
    /// Notes that were ever said.
    version: u64,
    /// Notes that are here.
    count: usize,
}

#[derive(Debug, Clone, Copy)]
struct Said {
    note: Note,
    /// The version at which the rank began to say this.
    since: u64,
    /// The version at which it said it last.
    last: u64,
}

impl Said {
    /// Whether this was here at version `seen`, and has been said again since.
    fn again(&self, seen: u64) -> bool {
        self.since <= seen && self.last > seen
    }
}

impl Waits {
    /// Notes that are here.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// As [`Directory::say`](super::directory::Directory::say).
    pub(crate) fn say(&mut self, group: u64, note: &Note, seen: u64) -> Heard {
        self.version += 1;
        let version = self.version;
        let notes = self.groups.entry(group).or_default();
        let since = match notes.get(&note.rank) {
            Some(said) if said.note == *note => said.since,
            Some(_) => version,
            None => {
                self.count += 1;
                version
            }
        };
        notes.insert(note.rank, Said { note: *note, since, last: version });
        Heard { version, others: others(notes, note), circle: circle(notes, note, seen) }
    }

    /// Takes the note of `rank` back.
    pub(crate) fn unsay(&mut self, group: u64, rank: usize) {
        let Some(notes) = self.groups.get_mut(&group) else { return };
        if notes.remove(&rank).is_some() {
            self.count -= 1;
        }
        if notes.is_empty() {
            self.groups.remove(&group);
        }
    }

    /// The rank at the end of the chain of those who wait for one another, beginning with `peer`, for whom `rank` waits:
    /// it waits for nobody. `peer` itself where there is no such end.
    pub(crate) fn chain_end(&self, group: u64, rank: usize, peer: usize) -> usize {
        let Some(notes) = self.groups.get(&group) else { return peer };
        let mut at = peer;
        // A longer chain is a circle.
        for _ in 0..=notes.len() {
            match notes.get(&at) {
                _ if at == rank => return peer,
                Some(said) => at = said.note.waits_for,
                None => return at,
            }
        }
        peer
    }
}

/// One note, that of the lowest rank, for each collective call that others than `own.rank` are in and it is not.
fn others(notes: &BTreeMap<usize, Said>, own: &Note) -> Vec<Note> {
    let mut found: BTreeMap<[u64; 4], Note> = BTreeMap::new();
    for Said { note, .. } in notes.values() {
        if note.call.is_collective() && note.call != own.call && note.rank != own.rank {
            found.entry(note.call.encode()).or_insert(*note);
        }
    }
    let mut found: Vec<Note> = found.into_values().collect();
    found.sort_by_key(|note| note.rank);
    found.truncate(MOST_CALLS);
    found
}

/// A circle of waiting ranks never ends; one in it is in another call. Collective operations are compared by their
/// numbers: one with another number is only further on or behind. What a rank wrote before it got what it waits for is
/// no proof: all in the circle have to say it again.
fn circle(notes: &BTreeMap<usize, Said>, own: &Note, seen: u64) -> Option<Note> {
    // This rank, too, must have waited so since then: what it did in between may be what the others wait for.
    notes.get(&own.rank).filter(|said| said.since <= seen)?;
    let both = |note: &Note| note.call.is_collective() && own.call.is_collective();
    let mut apart = None;
    let mut at = own.waits_for;
    for _ in 0..notes.len() {
        if at == own.rank {
            return apart;
        }
        let said = notes.get(&at).filter(|said| said.again(seen))?;
        if apart.is_none() && !same(&said.note.call, &own.call) && !both(&said.note) {
            apart = Some(said.note);
        }
        at = said.note.waits_for;
    }
    // The circle is one without this rank.
    apart.filter(|_| at == own.rank)
}

#[cfg(test)]
mod tests;
