//! Prints merged operations as text or as JSON.

use super::merge::{Group, Row, State, name};
use super::read::{File, Job};
use serde::Serialize;
use std::fmt::Write as _;

/// Up to this many ranks have a column each. More do not fit on a line of a terminal and are listed by state.
const COLUMNS: usize = 8;

/// One row as JSON.
#[derive(Serialize)]
pub struct Line<'a> {
    group: &'a str,
    sequence: u64,
    call: &'a str,
    /// Whether it is the first that not all ranks completed, or on which they differ.
    first_broken: bool,
    ranks: Vec<Cell<'a>>,
}

#[derive(Serialize)]
struct Cell<'a> {
    rank: usize,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    took_us: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    late_us: Option<i64>,
    /// The call that the rank made instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<&'a str>,
}

impl<'a> Line<'a> {
    pub fn new(group: &'a Group, row: &'a Row) -> Self {
        let cell = |(&rank, state): (&usize, &'a State)| {
            let (state, took_us, late_us, call) = match state {
                State::Done { took_us, late_us } => ("done", Some(*took_us), Some(*late_us), None),
                State::InProgress { late_us } => ("in_progress", None, Some(*late_us), None),
                State::NeverBegun => ("never_begun", None, None, None),
                State::Different { call } => ("different", None, None, Some(call.as_str())),
                State::Forgotten => ("forgotten", None, None, None),
                State::Unknown => ("unknown", None, None, None),
            };
            Cell { rank, state, took_us, late_us, call }
        };
        Self {
            group: &group.id,
            sequence: row.sequence,
            call: &row.call,
            first_broken: is_first_broken(group, row),
            ranks: group.members.iter().zip(&row.states).map(cell).collect(),
        }
    }
}

fn is_first_broken(group: &Group, row: &Row) -> bool {
    group.broken().is_some_and(|broken| broken.sequence == row.sequence)
}

/// The whole report as text.
pub fn report(job: &Job, groups: &[Group], last: usize) -> String {
    // Writing into a string does not fail.
    let mut text = format!("{}: a job of {} ranks\n", job.folder.display(), job.world());
    let mut ranks: Vec<&File> = job.files.iter().collect();
    ranks.sort_by_key(|file| file.header.rank);
    // A rank's files of several groups often repeat one reason.
    ranks.dedup_by(|a, b| a.header.rank == b.header.rank && a.header.failure == b.header.failure);
    for file in &ranks {
        let header = &file.header;
        let _ =
            writeln!(text, "rank {} ({}, pid {}): {}", header.rank, header.host, header.pid, header.failure);
    }
    let missing: Vec<usize> =
        (0..job.world()).filter(|&rank| ranks.iter().all(|file| file.header.rank != rank)).collect();
    if !missing.is_empty() {
        let _ = writeln!(
            text,
            "{} wrote nothing: killed, stopped, on another host, or never in a call that failed",
            name(&missing)
        );
    }
    for group in groups {
        let _ = writeln!(text, "\ngroup {} of {}", group.id, name(&group.members));
        table(&mut text, group, last);
        for (rank, call) in &group.messages {
            let _ = writeln!(text, "  rank {rank}: {call} in progress");
        }
    }
    text.push('\n');
    for group in groups {
        let _ = writeln!(text, "{}", group.summary());
    }
    text
}

fn table(text: &mut String, group: &Group, last: usize) {
    let rows: Vec<&Row> = group.last(last).collect();
    let wide = group.members.len() <= COLUMNS;
    let call_width = rows.iter().map(|row| row.call.chars().count()).max().unwrap_or(0);
    let cell_width =
        rows.iter().flat_map(|row| &row.states).map(|state| cell(state).len()).max().unwrap_or(0);
    if wide && !rows.is_empty() {
        let _ = write!(text, "    {:<call_width$}", "");
        for rank in &group.members {
            let _ = write!(text, "  {:<cell_width$}", format!("rank {rank}"));
        }
        trim(text);
    }
    let mut before: Option<u64> = None;
    for row in rows {
        if before.is_some_and(|before| row.sequence > before + 1) {
            text.push_str("    ...\n");
        }
        before = Some(row.sequence);
        let mark = if is_first_broken(group, row) { "-->" } else { "   " };
        let _ = write!(text, "{mark} {:<call_width$}", row.call);
        if wide {
            for state in &row.states {
                let _ = write!(text, "  {:<cell_width$}", cell(state));
            }
        } else {
            let _ = write!(text, "  {}", counts(group, row));
        }
        trim(text);
        for (rank, state) in group.members.iter().zip(&row.states) {
            if let State::Different { call } = state {
                let _ = writeln!(text, "      rank {rank} called {call} instead of {}", row.call);
            }
        }
    }
}

/// Removes blanks at the end of the line, and ends it.
fn trim(text: &mut String) {
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

fn cell(state: &State) -> String {
    let late = |us: i64| if us > 0 { format!(" +{}", time(us)) } else { String::new() };
    match state {
        State::Done { took_us, late_us } => format!("done {}{}", time(*took_us), late(*late_us)),
        State::InProgress { late_us } => format!("in progress{}", late(*late_us)),
        State::NeverBegun => "never begun".into(),
        State::Different { .. } => "DIFFERENT CALL".into(),
        State::Forgotten => "no longer known".into(),
        State::Unknown => "no record".into(),
    }
}

/// The ranks by state, and the rank that was last to begin.
fn counts(group: &Group, row: &Row) -> String {
    let done = group.which(row, |state| matches!(state, State::Done { .. })).len();
    let mut parts = vec![format!("{done} of {} done", group.members.len())];
    let mut add = |what: &str, wanted: fn(&State) -> bool| {
        let ranks = group.which(row, wanted);
        if !ranks.is_empty() {
            parts.push(format!("{what}: {}", name(&ranks)));
        }
    };
    add("in progress", |state| matches!(state, State::InProgress { .. }));
    add("never begun", |state| *state == State::NeverBegun);
    add("DIFFERENT CALL", |state| matches!(state, State::Different { .. }));
    add("no record", |state| matches!(state, State::Unknown | State::Forgotten));
    let late = |state: &State| match state {
        State::Done { late_us, .. } | State::InProgress { late_us } => Some(*late_us),
        _ => None,
    };
    let latest =
        group.members.iter().zip(&row.states).filter_map(|(rank, state)| Some((late(state)?, rank))).max();
    if let Some((us, rank)) = latest.filter(|(us, _)| *us > 0) {
        parts.push(format!("the latest was rank {rank} +{}", time(us)));
    }
    parts.join("; ")
}

fn time(us: i64) -> String {
    match us {
        us if us >= 1_000_000 => format!("{:.2} s", us as f64 / 1e6),
        us if us >= 1_000 => format!("{:.2} ms", us as f64 / 1e3),
        us => format!("{us} us"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::merge::groups;
    use super::super::read::tests::{file, job};
    use super::*;

    #[test]
    fn a_report_names_ranks_reasons_and_the_operation() {
        let calls = |last: &'static str, begun| [("barrier #1", 10, Some(1510)), (last, begun, None)];
        let (reduce, gather) = ("all_reduce #2 f32[8] sum", "all_gather #2 f32[8]");
        let job = job(&[
            file(0, 3, "they differ", &calls(reduce, 2000)),
            file(1, 3, "rank 0 gave up", &calls(gather, 2500)),
        ]);
        let text = report(&job, &groups(&job.files), 20);
        for part in [
            "a job of 3 ranks",
            "rank 0 (h, pid 100): they differ\n",
            "rank 1 (h, pid 101): rank 0 gave up\n",
            "rank 2 wrote nothing",
            "    barrier #1                done 1.50 ms  done 1.50 ms    no record\n",
            "--> all_reduce #2 f32[8] sum  in progress   DIFFERENT CALL  no record\n",
            "rank 1 called all_gather #2 f32[8] instead of all_reduce #2 f32[8] sum\n",
            "\n\ngroup 0: rank 1 called all_gather #2 f32[8], but rank 0 called all_reduce #2 f32[8] sum",
        ] {
            let squeeze =
                |text: &str| text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
            assert!(squeeze(&text).contains(&squeeze(part)), "{part} in\n{text}");
        }
        let groups = groups(&job.files);
        let line = serde_json::to_value(Line::new(&groups[0], &groups[0].rows[1])).unwrap();
        assert_eq!((&line["first_broken"], &line["ranks"][1]["call"]), (&true.into(), &gather.into()));
        assert_eq!(line["ranks"][2]["state"], "unknown");
    }

    #[test]
    fn many_ranks_are_listed_by_state() {
        let texts: Vec<String> = (0..12)
            .map(|rank| match rank {
                5 => file(rank, 12, "x", &[("barrier #1", 10, Some(20))]),
                _ => file(
                    rank,
                    12,
                    "x",
                    &[("barrier #1", 10, Some(20)), ("barrier #2", 30 + rank as i64, None)],
                ),
            })
            .collect();
        let job = job(&texts);
        let text = report(&job, &groups(&job.files), 20);
        assert!(text.contains("barrier #1  12 of 12 done\n"), "{text}");
        assert!(text.contains("never begun: rank 5; the latest was rank 11 +11 us"), "{text}");
    }
}
