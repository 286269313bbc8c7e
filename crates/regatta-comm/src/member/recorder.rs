//! The flight recorder: the last operations of a group on this rank, written down when something fails.
//!
//! A file per rank and group, `rank-R-group-G.jsonl`: a line about the rank, then one an operation, the oldest first.
//! Ranks' clocks may differ: `regatta trace` puts operations together by their numbers, and times are corrected by
//! what the rank has measured against the job's store.

use crate::member::call::Call;
use crate::member::trace_folder;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

/// Operations kept.
const KEPT: usize = 256;

#[derive(Debug, Clone, Copy)]
struct Record {
    call: Call,
    begun: Instant,
    /// None: it has failed, or goes on.
    ended: Option<Instant>,
}

/// The last operations of one group.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    records: VecDeque<Record>,
}

/// Whose operations they are.
pub(crate) struct Whose<'a> {
    pub rank: usize,
    pub world: usize,
    pub group: u64,
    /// Ranks of the world.
    pub members: &'a [usize],
    /// What to add to this host's clock to get the store's, in microseconds.
    pub clock_offset_us: i64,
}

impl Recorder {
    /// The latest operation.
    pub(crate) fn begin(&mut self, call: Call, begun: Instant) {
        let record = Record { call, begun, ended: None };
        if self.records.len() == KEPT {
            self.records.pop_front();
        } else if self.records.is_empty() {
            // Written now, so that no later operation waits for memory from the system.
            self.records.resize(KEPT, record);
            self.records.clear();
        }
        self.records.push_back(record);
    }

    /// The latest operation is done.
    pub(crate) fn end(&mut self, ended: Instant) {
        if let Some(last) = self.records.back_mut() {
            last.ended = Some(ended);
        }
    }

    /// The operation that goes on.
    pub(crate) fn current(&self) -> Option<Call> {
        self.records.back().filter(|record| record.ended.is_none()).map(|record| record.call)
    }

    /// The collective operation with this number.
    pub(crate) fn call(&self, sequence: u32) -> Option<Call> {
        let found = |record: &&Record| record.call.sequence == sequence && record.call.is_collective();
        self.records.iter().rev().find(found).map(|record| record.call)
    }

    /// Writes everything into a file of `folder`; the file's path. `failure` is why.
    pub(crate) fn write(&self, folder: &Path, whose: &Whose<'_>, failure: &str) -> std::io::Result<PathBuf> {
        let (now, clock) = (Instant::now(), SystemTime::now());
        let since_epoch = clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let unix_us = |at: Instant| {
            let age = now.saturating_duration_since(at).as_micros();
            since_epoch as i128 - age as i128 + i128::from(whose.clock_offset_us)
        };
        let mut text = String::new();
        let members: Vec<String> = whose.members.iter().map(usize::to_string).collect();
        // Writing into a string does not fail.
        let _ = writeln!(
            text,
            "{{\"rank\":{},\"world\":{},\"group\":\"{:x}\",\"members\":[{}],\"host\":{},\"pid\":{},\"failure\":{}}}",
            whose.rank,
            whose.world,
            whose.group,
            members.join(","),
            quote(&crate::host::hostname()),
            std::process::id(),
            quote(failure)
        );
        for Record { call, begun, ended } in &self.records {
            let _ = writeln!(
                text,
                "{{\"sequence\":{},\"kind\":{},\"dtype\":\"{}\",\"len\":{},\"op\":\"{}\",\"root\":{},\"call\":{},\
                 \"begun_us\":{},\"ended_us\":{}}}",
                call.sequence,
                quote(call.kind.name()),
                call.dtype,
                call.len,
                call.op,
                call.root,
                quote(&call.to_string()),
                unix_us(*begun),
                ended.map_or("null".into(), |ended| unix_us(ended).to_string())
            );
        }
        let path = folder.join(format!("rank-{}-group-{:x}.jsonl", whose.rank, whose.group));
        trace_folder::write(&path, &text)?;
        Ok(path)
    }
}

/// As a JSON string.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::Kind;
    use crate::numbers::element::DType;

    #[test]
    fn keeps_the_last_operations_and_writes_them() {
        let mut recorder = Recorder::default();
        for sequence in 1..=300 {
            let call = Call { sequence, ..Call::new(Kind::AllReduce, DType::F32, 5) };
            recorder.begin(call, Instant::now());
            if sequence < 300 {
                recorder.end(Instant::now());
            }
        }
        assert_eq!(recorder.call(44), None);
        assert_eq!(recorder.call(45).map(|call| call.sequence), Some(45));
        let folder = std::env::temp_dir().join(format!("regatta-recorder-{}", std::process::id()));
        let whose = Whose { rank: 3, world: 4, group: 7, members: &[1, 3], clock_offset_us: 0 };
        std::fs::create_dir_all(&folder).unwrap();
        let path = recorder.write(&folder, &whose, "say \"why\"\n").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 257);
        assert!(lines[0].contains("\"members\":[1,3]") && lines[0].contains("say \\\"why\\\"\\u000a"));
        assert!(lines[1].contains("\"sequence\":45,\"kind\":\"all_reduce\",\"dtype\":\"f32\",\"len\":5"));
        assert!(
            lines[256].contains("\"call\":\"all_reduce #300 f32[5] sum\"") && lines[256].ends_with(":null}")
        );
    }
}
