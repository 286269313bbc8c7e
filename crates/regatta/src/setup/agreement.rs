//! Checks that all ranks of a job have the same settings and the same data, before they do anything else together.
//!
//! Ranks on several hosts are often started by hand, each with its own configuration and its own copy of the data. If
//! they are equal, the check costs one all-gather of a checksum per rank.

use crate::config::Config;
use crate::datasets::Datasets;
use crate::error::{Error, Result};
use regatta_comm::Group;
use regatta_comm::hostname;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Keys that may differ between hosts: paths, whose content is compared instead, and settings of a single rank.
const OF_A_RANK: [&str; 9] = [
    "data.path",
    "data.cache",
    "data.tokenizer_path",
    "train.device",
    "parallel.workers",
    "parallel.threads",
    "parallel.deadline_s",
    "parallel.memory_mib",
    "parallel.offload",
];
/// A key whose value is a path on each host, but which must be set on all ranks or on none.
const PRESENT: &str = "train.trace";
/// Number of ranks, or of keys, that an error names; further ranks are counted.
const NAMED: usize = 4;

/// A rank's host, and the entries that must be the same on all ranks.
#[derive(Serialize, Deserialize)]
struct Rank {
    host: String,
    entries: Vec<(String, String)>,
}

/// Checks that all ranks of `group` have the same configuration, the same data, and the same `more`, which are pairs
/// of name and value. All ranks call it.
///
/// # Errors
/// The ranks differ (the error names the first key that does, its values, and the ranks that have them), or
/// communication fails.
pub fn agree(group: &Group, config: &Config, more: &[(&str, String)], data: &Datasets) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let entries = entries(config, more, &data.digest()?)?;
    let text = serde_json::to_vec(&entries).map_err(|error| Error::Usage(error.to_string()))?;
    let own = [i64::from(crc32fast::hash(&text)), text.len() as i64];
    let mut all = vec![0i64; 2 * group.size()];
    group.all_gather(&own, &mut all)?;
    if all.chunks_exact(2).all(|other| other == own) {
        return Ok(());
    }
    let own = serde_json::to_vec(&Rank { host: hostname(), entries });
    let own = own.map_err(|error| Error::Usage(error.to_string()))?;
    let ranks: Vec<Option<Rank>> =
        group.all_gather_vec(&own)?.iter().map(|bytes| serde_json::from_slice(bytes).ok()).collect();
    Err(Error::Usage(difference(&ranks)))
}

/// The entries that must be the same on all ranks, each a name and a value.
fn entries(config: &Config, more: &[(&str, String)], digest: &str) -> Result<Vec<(String, String)>> {
    let mut entries = vec![("the version of regatta".to_string(), env!("CARGO_PKG_VERSION").to_string())];
    let value = serde_json::to_value(config).map_err(|error| Error::Usage(error.to_string()))?;
    flatten("", &value, &mut entries);
    entries.retain(|(key, _)| !OF_A_RANK.contains(&key.as_str()));
    for (key, value) in &mut entries {
        if key == PRESENT && value != "null" {
            *value = "given".into();
        }
    }
    entries.extend(more.iter().map(|(name, value)| (name.to_string(), value.clone())));
    // Checksums of the training data, of the held-out data and of the tokenizer.
    let names = ["the data's content", "the held-out data's content", "the tokenizer's content"];
    entries.extend(names.into_iter().zip(digest.split('-')).map(|(name, sum)| (name.into(), sum.into())));
    Ok(entries)
}

fn flatten(path: &str, value: &Value, entries: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, value, entries);
            }
        }
        value => entries.push((path.into(), value.to_string())),
    }
}

/// The error for the first entry that differs.
fn difference(ranks: &[Option<Rank>]) -> String {
    let advice = "start all ranks with the same configuration, flags, data and version of regatta";
    let Some(readable) = ranks.iter().map(Option::as_ref).collect::<Option<Vec<&Rank>>>() else {
        return format!("the ranks of this job run different versions of regatta: {advice}");
    };
    let names = readable.iter().flat_map(|rank| rank.entries.iter().map(|(name, _)| name.as_str()));
    let mut differing = vec![];
    for name in names {
        let value = |rank: &&Rank| {
            rank.entries
                .iter()
                .find(|(key, _)| key == name)
                .map_or("absent", |(_, value)| value.as_str())
                .to_string()
        };
        let mut by_value: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (rank, of) in readable.iter().enumerate() {
            by_value.entry(value(of)).or_default().push(rank);
        }
        if by_value.len() > 1 && differing.iter().all(|(other, _)| *other != name) {
            differing.push((name, by_value));
        }
    }
    let Some((name, by_value)) = differing.first() else {
        return format!("the ranks of this job differ: {advice}");
    };
    let mut values: Vec<(&String, &Vec<usize>)> = by_value.iter().collect();
    values.sort_by_key(|(_, of)| of[0]);
    let values: Vec<String> =
        values.into_iter().map(|(value, of)| format!("{value} on {}", places(of, &readable))).collect();
    let others: Vec<&str> = differing[1..].iter().map(|(name, _)| *name).take(NAMED).collect();
    let others = if others.is_empty() { String::new() } else { format!(" ({} too)", others.join(", ")) };
    format!("the ranks of this job differ in {name}: {}{others}; {advice}", values.join(", "))
}

/// Ranks and their hosts, as in `rank 1 (host b)`.
fn places(of: &[usize], ranks: &[&Rank]) -> String {
    let named: Vec<String> =
        of.iter().take(NAMED).map(|&rank| format!("rank {rank} (host {})", ranks[rank].host)).collect();
    match of.len().saturating_sub(NAMED) {
        0 => named.join(" and "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(host: &str, entries: &[(&str, &str)]) -> Option<Rank> {
        let entries = entries.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Some(Rank { host: host.into(), entries })
    }

    #[test]
    fn the_first_difference_is_reported_with_values_and_ranks() {
        let mut ranks: Vec<_> =
            (0..6).map(|_| rank("a", &[("model.layers", "4"), ("train.batch", "8")])).collect();
        ranks[3] = rank("b", &[("model.layers", "3"), ("train.batch", "9")]);
        assert_eq!(
            difference(&ranks),
            "the ranks of this job differ in model.layers: 4 on rank 0 (host a), rank 1 (host a), rank 2 (host a), rank 4 \
             (host a) and 1 more, 3 on rank 3 (host b) (train.batch too); start all ranks with the same configuration, \
             flags, data and version of regatta"
        );
        let other = difference(&[rank("a", &[]), rank("b", &[("train.new", "1")])]);
        assert!(other.contains("in train.new: absent on rank 0 (host a), 1 on rank 1 (host b);"), "{other}");
        assert!(difference(&[rank("a", &[]), None]).contains("different versions"));
    }

    #[test]
    fn hosts_may_have_their_own_paths_and_threads() {
        let text = "[model]\nkind='gpt'\n[data]\npath='x'\n[train]\nbatch=2\n";
        let of = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            entries(&Config::parse(text, "test", &sets).unwrap(), &[], "1-2-3").unwrap()
        };
        let own = ["data.path=y", "parallel.threads=3", "parallel.deadline_s=9", "train.device=cpu"];
        assert_eq!(of(&[]), of(&own));
        assert_eq!(of(&["train.trace=a"]), of(&["train.trace=b"]));
        for other in ["train.trace=a", "train.batch=4", "optimizer.lr=0.5", "parallel.zero=1"] {
            assert_ne!(of(&[]), of(&[other]), "{other}");
        }
    }
}
