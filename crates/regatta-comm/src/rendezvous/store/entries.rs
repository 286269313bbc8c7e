//! The entries of a store: keys and values, within a bound, some of which are dropped when they have been read.

use crate::rendezvous::wire;
use std::collections::BTreeMap;

/// Bytes that an entry takes beside its key and its value.
pub(crate) const ENTRY: usize = 64;

/// Entries in the order of their keys.
#[derive(Default)]
pub(super) struct Entries {
    all: BTreeMap<String, Vec<u8>>,
    bytes: usize,
    /// Ranks that have read all entries under a prefix.
    readers: BTreeMap<String, usize>,
}

/// What a gathering finds.
#[derive(Debug, PartialEq)]
pub(super) enum Gathered {
    /// As many as a message holds.
    Values(Vec<Vec<u8>>),
    /// The numbers of those that are not there.
    Missing(Vec<usize>),
}

impl Entries {
    /// Bytes of all entries, with what it takes to keep them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, key: &str) -> Option<&Vec<u8>> {
        self.all.get(key)
    }

    /// Sets an entry, where that leaves no more than `most` bytes of entries.
    pub(super) fn set(&mut self, key: &str, value: &[u8], most: usize) -> bool {
        let before = self.all.get(key).map_or(0, |value| size(key, value));
        let bytes = self.bytes - before + size(key, value);
        if bytes > most {
            return false;
        }
        self.bytes = bytes;
        self.all.insert(key.into(), value.to_vec());
        true
    }

    pub(super) fn remove(&mut self, key: &str) {
        if let Some(value) = self.all.remove(key) {
            self.bytes -= size(key, &value);
        }
    }

    /// Removes all entries under `prefix`.
    pub(super) fn remove_all(&mut self, prefix: &str) {
        for key in under(&self.all, prefix).map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.remove(&key);
        }
        for prefix in under(&self.readers, prefix).map(|(prefix, _)| prefix.clone()).collect::<Vec<_>>() {
            self.readers.remove(&prefix);
        }
    }

    /// All entries under `prefix`, where one message holds them.
    pub(super) fn list(&self, prefix: &str) -> Option<Vec<(String, Vec<u8>)>> {
        let mut room = ROOM;
        let entry = |(key, value): (&String, &Vec<u8>)| {
            room = room.checked_sub(8 + key.len() + value.len())?;
            Some((key.clone(), value.clone()))
        };
        under(&self.all, prefix).map(entry).collect()
    }

    /// The entries numbered from `from` on under `prefix`, of which there are to be `count`. Who is given the last one has
    /// read them; when `count` have, all under the prefix are dropped.
    pub(super) fn gather(&mut self, prefix: &str, from: usize, count: usize) -> Gathered {
        let key = |number: usize| format!("{prefix}{number}");
        let missing: Vec<usize> = (0..count).filter(|&number| !self.all.contains_key(&key(number))).collect();
        if !missing.is_empty() {
            return Gathered::Missing(missing);
        }
        let mut room = ROOM;
        let value = |number: usize| {
            let value = self.all.get(&key(number))?;
            room = room.checked_sub(4 + value.len())?;
            Some(value.clone())
        };
        let values: Vec<Vec<u8>> = (from..count).map_while(value).collect();
        if from + values.len() >= count {
            let readers = self.readers.entry(prefix.into()).or_default();
            *readers += 1;
            if *readers >= count {
                self.remove_all(prefix);
            }
        }
        Gathered::Values(values)
    }
}

/// Bytes of values that one answer holds, with what separates them.
const ROOM: usize = wire::LONGEST - 5;

fn size(key: &str, value: &[u8]) -> usize {
    ENTRY + key.len() + value.len()
}

fn under<'a, V>(map: &'a BTreeMap<String, V>, prefix: &'a str) -> impl Iterator<Item = (&'a String, &'a V)> {
    map.range(prefix.to_string()..).take_while(move |(key, _)| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_have_read_is_dropped() {
        let mut entries = Entries::default();
        let set = |entries: &mut Entries, key: &str| assert!(entries.set(key, key.as_bytes(), 1 << 20));
        set(&mut entries, "b/0");
        let before = entries.bytes();
        for key in ["a/1", "a/secret", "a/0"] {
            set(&mut entries, key);
        }
        assert_eq!(entries.gather("a/", 0, 4), Gathered::Missing(vec![2, 3]));
        set(&mut entries, "a/2");
        let expected = Gathered::Values(["a/0", "a/1", "a/2"].map(|key| key.as_bytes().to_vec()).to_vec());
        for _ in 0..3 {
            assert!(entries.bytes() > before);
            assert_eq!(entries.gather("a/", 0, 3), expected);
        }
        assert_eq!((entries.bytes(), entries.len()), (before, 1));
        assert_eq!(entries.gather("a/", 0, 3), Gathered::Missing(vec![0, 1, 2]));
        entries.remove_all("");
        assert_eq!((entries.bytes(), entries.len()), (0, 0));
    }

    #[test]
    fn what_no_message_holds_comes_in_several() {
        let mut entries = Entries::default();
        let value = |number: usize| vec![number as u8; 300_000];
        for number in 0..8 {
            assert!(entries.set(&format!("a/{number}"), &value(number), usize::MAX));
        }
        for _ in 0..8 {
            let mut all = vec![];
            while all.len() < 8 {
                let Gathered::Values(values) = entries.gather("a/", all.len(), 8) else { panic!("missing") };
                assert!((1..=3).contains(&values.len()));
                all.extend(values);
            }
            assert_eq!(all, (0..8).map(value).collect::<Vec<_>>());
        }
        assert_eq!(entries.len(), 0);
    }
}
