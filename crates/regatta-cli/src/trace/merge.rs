//! Merges the ranks' operations by their numbers, because the clocks of hosts may differ.

use super::read::{File, Operation};
use std::collections::{BTreeMap, BTreeSet};

/// The kind of messages between two ranks. They have their own numbers.
const MESSAGE: &str = "send/recv";

/// The state of an operation on a rank.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Done: how long it took, and how much later than on the first rank it began.
    Done { took_us: i64, late_us: i64 },
    /// Not done when the rank's file was written; it began this much later than on the first rank.
    InProgress { late_us: i64 },
    /// The rank's record ends before this operation.
    NeverBegun,
    /// The rank called another operation instead.
    Different { call: String },
    /// The rank's record begins after this operation: the recorder keeps only the last ones.
    Forgotten,
    /// The rank's record does not exist or cannot be read here.
    Unknown,
}

/// One operation of a group.
#[derive(Debug, Clone)]
pub struct Row {
    pub sequence: u64,
    /// The call of most ranks.
    pub call: String,
    /// One for each member of the group, in the order of `members`.
    pub states: Vec<State>,
}

impl Row {
    /// Whether a rank did not complete the operation or called another one.
    pub fn is_broken(&self) -> bool {
        let broken = |state: &State| !matches!(state, State::Done { .. } | State::Forgotten | State::Unknown);
        self.states.iter().any(broken)
    }
}

/// What happened in a group.
#[derive(Debug)]
pub struct Group {
    pub id: String,
    /// The members, as ranks of the world.
    pub members: Vec<usize>,
    /// Members without a record of the group.
    pub missing: Vec<usize>,
    /// Sorted by number.
    pub rows: Vec<Row>,
    /// Messages between two ranks that were not completed: the rank and the call.
    pub messages: Vec<(usize, String)>,
}

/// The groups of a job, the world first.
pub fn groups(files: &[File]) -> Vec<Group> {
    let mut by_group: BTreeMap<(usize, &str), Vec<&File>> = BTreeMap::new();
    for file in files {
        let id = file.header.group.as_str();
        by_group.entry((id.len(), id)).or_default().push(file);
    }
    by_group.into_iter().map(|((_, id), files)| Group::merge(id, &files)).collect()
}

impl Group {
    fn merge(id: &str, files: &[&File]) -> Self {
        let mut members = files.first().map_or(vec![], |file| file.header.members.clone());
        // A rank that this list lacks is shown as well.
        for file in files {
            if !members.contains(&file.header.rank) {
                members.push(file.header.rank);
            }
        }
        let of = |rank: usize| files.iter().find(|file| file.header.rank == rank).copied();
        let records: Vec<Option<Record<'_>>> = members.iter().map(|&rank| of(rank).map(Record::of)).collect();
        let numbers: BTreeSet<u64> =
            records.iter().flatten().flat_map(|record| record.operations.keys().copied()).collect();
        let rows = numbers.into_iter().map(|sequence| row(sequence, &records)).collect();
        let unfinished = |file: &&File| {
            let rank = file.header.rank;
            let open = file.operations.iter().filter(|it| it.kind == MESSAGE && it.ended_us.is_none());
            open.map(|it| (rank, it.call.clone())).collect::<Vec<_>>()
        };
        Self {
            id: id.to_string(),
            missing: members.iter().copied().filter(|&rank| of(rank).is_none()).collect(),
            messages: files.iter().flat_map(unfinished).collect(),
            members,
            rows,
        }
    }

    /// The first operation that not all ranks completed, or on which they differ.
    pub fn broken(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.is_broken())
    }

    /// The last `count` rows, and before them the first broken one if it is earlier.
    pub fn last(&self, count: usize) -> impl Iterator<Item = &Row> {
        let from = self.rows.len().saturating_sub(count);
        let broken = self.rows[..from].iter().find(|row| row.is_broken());
        broken.into_iter().chain(&self.rows[from..])
    }

    /// The ranks whose state of `row` is `wanted`.
    pub fn which(&self, row: &Row, wanted: fn(&State) -> bool) -> Vec<usize> {
        let pairs = self.members.iter().zip(&row.states);
        pairs.filter(|(_, state)| wanted(state)).map(|(&rank, _)| rank).collect()
    }

    /// What went wrong first, in a sentence.
    pub fn summary(&self) -> String {
        let id = &self.id;
        let Some(row) = self.broken() else {
            if let Some((rank, call)) = self.messages.first() {
                return format!("group {id}: rank {rank} did not complete {call}");
            }
            let missing = match &self.missing[..] {
                [] => String::new(),
                ranks => format!("; {} wrote nothing about it", name(ranks)),
            };
            return format!("group {id}: all operations that were recorded were completed{missing}");
        };
        let which = |wanted: fn(&State) -> bool| self.which(row, wanted);
        let called = which(|state| matches!(state, State::Done { .. } | State::InProgress { .. }));
        let mut parts: Vec<String> = vec![];
        for (rank, state) in self.members.iter().zip(&row.states) {
            if let State::Different { call } = state {
                let others = if parts.is_empty() {
                    format!(", but {} called {}", name(&called), row.call)
                } else {
                    String::new()
                };
                parts.push(format!("rank {rank} called {call}{others}"));
            }
        }
        let differ = !parts.is_empty();
        let mut add = |ranks: &[usize], what: &str| {
            if !ranks.is_empty() {
                let call = if parts.is_empty() { &row.call } else { "it" };
                parts.push(format!("{} {what} {call}", name(ranks)));
            }
        };
        add(&which(|state| *state == State::NeverBegun), "never began");
        // If ranks differ, all of them wait or fail: which of them do does not help.
        if !differ {
            let waiting = which(|state| matches!(state, State::InProgress { .. }));
            add(&waiting, if waiting.len() == 1 { "has waited in" } else { "have waited in" });
            add(&which(|state| *state == State::Unknown), "left no record of");
            add(&which(|state| matches!(state, State::Done { .. })), "completed");
        }
        format!("group {id}: {}", parts.join("; "))
    }
}

/// One rank's collective operations.
struct Record<'a> {
    operations: BTreeMap<u64, &'a Operation>,
    torn: bool,
}

impl<'a> Record<'a> {
    fn of(file: &'a File) -> Self {
        let collective = file.operations.iter().filter(|operation| operation.kind != MESSAGE);
        Self { operations: collective.map(|it| (it.sequence, it)).collect(), torn: file.torn }
    }
}

fn row(sequence: u64, records: &[Option<Record<'_>>]) -> Row {
    let at = |record: &Option<Record<'_>>| {
        record.as_ref().and_then(|record| record.operations.get(&sequence).map(|&it| it.clone()))
    };
    let operations: Vec<Option<Operation>> = records.iter().map(at).collect();
    let mut votes: Vec<(&str, usize)> = vec![];
    for operation in operations.iter().flatten() {
        match votes.iter_mut().find(|(call, _)| *call == operation.call) {
            Some((_, count)) => *count += 1,
            None => votes.push((&operation.call, 1)),
        }
    }
    let most = votes.iter().map(|vote| vote.1).max();
    // Among equally frequent calls, that of the lowest rank.
    let call = votes.iter().find(|vote| Some(vote.1) == most).map_or("", |vote| vote.0);
    let first = operations.iter().flatten().map(|operation| operation.begun_us).min().unwrap_or(0);
    let state = |(record, operation): (&Option<Record<'_>>, &Option<Operation>)| match (record, operation) {
        (None, _) => State::Unknown,
        (_, Some(operation)) if operation.call != call => State::Different { call: operation.call.clone() },
        (_, Some(operation)) => {
            let late_us = operation.begun_us.saturating_sub(first);
            match operation.ended_us {
                Some(ended) => {
                    State::Done { took_us: ended.saturating_sub(operation.begun_us).max(0), late_us }
                }
                None => State::InProgress { late_us },
            }
        }
        (Some(record), None) => match record.operations.first_key_value() {
            _ if record.torn => State::Unknown,
            Some((&oldest, _)) if sequence < oldest => State::Forgotten,
            _ => State::NeverBegun,
        },
    };
    Row { sequence, call: call.to_string(), states: records.iter().zip(&operations).map(state).collect() }
}

/// Ranks in a sentence.
pub fn name(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    format!("{} {}", if list.len() == 1 { "rank" } else { "ranks" }, list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::read::tests::{file, job};
    use super::*;

    const REDUCE: &str = "all_reduce #2 f32[1024] sum";

    fn group(texts: &[String]) -> Group {
        let mut groups = groups(&job(texts).files);
        assert_eq!(groups.len(), 1);
        groups.remove(0)
    }

    #[test]
    fn a_stuck_rank_is_found() {
        let healthy = |rank| {
            file(rank, 4, "deadline", &[("barrier #1", 100, Some(110 + rank as i64)), (REDUCE, 200, None)])
        };
        let stuck = file(2, 4, "told", &[("barrier #1", 105, Some(115))]);
        let group = group(&[healthy(0), healthy(1), stuck, healthy(3)]);
        assert_eq!(group.rows.len(), 2);
        assert!(!group.rows[0].is_broken());
        assert_eq!(group.rows[0].states[2], State::Done { took_us: 10, late_us: 5 });
        assert_eq!(group.rows[1].states[2], State::NeverBegun);
        assert_eq!(group.rows[1].states[3], State::InProgress { late_us: 0 });
        assert_eq!(
            group.summary(),
            format!("group 0: rank 2 never began {REDUCE}; ranks 0, 1, 3 have waited in it")
        );
        assert_eq!(group.last(1).count(), 1);
    }

    #[test]
    fn a_mismatch_is_found_though_later_calls_differ_too() {
        let on = |rank, call: &str| file(rank, 3, "x", &[(call, 5, Some(6)), ("barrier #3", 7, None)]);
        let other = "all_gather #2 f64[512]";
        let group = group(&[on(0, other), on(1, REDUCE), on(2, REDUCE)]);
        assert_eq!(group.rows[0].call, REDUCE);
        assert_eq!(group.rows[0].states[0], State::Different { call: other.into() });
        assert_eq!(
            group.summary(),
            format!("group 0: rank 0 called {other}, but ranks 1, 2 called {REDUCE}")
        );
        // The last row alone would hide it.
        assert_eq!(group.last(1).map(|row| row.sequence).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn ranks_with_missing_or_torn_records_are_not_blamed() {
        let waits = file(0, 3, "x", &[("barrier #1", 1, Some(2)), (REDUCE, 3, None)]);
        let torn = file(1, 3, "x", &[("barrier #1", 1, Some(2))]) + "{\"sequence\":2,\"ki";
        let group = group(&[waits, torn]);
        assert_eq!((group.missing.as_slice(), group.members.len()), (&[2][..], 3));
        assert_eq!(group.rows[1].states[1..], [State::Unknown, State::Unknown]);
        assert_eq!(
            group.summary(),
            format!("group 0: rank 0 has waited in {REDUCE}; ranks 1, 2 left no record of it")
        );
    }

    #[test]
    fn healthy_ranks_forgotten_operations_and_messages() {
        let early = file(0, 2, "x", &[("barrier #1", 1, Some(2)), ("barrier #2", 3, Some(4))]);
        let late = file(1, 2, "x", &[("barrier #2", 3, Some(4)), ("send/recv #9 f32[8]", 5, None)]);
        let group = group(&[early, late]);
        assert_eq!(group.rows[0].states[1], State::Forgotten);
        assert!(group.broken().is_none());
        assert_eq!(group.summary(), "group 0: rank 1 did not complete send/recv #9 f32[8]");
    }
}
