//! The flight recorder: the last operations of a group on this rank, written down when something fails.
//!
//! A file per rank and group, `rank-R-group-G.jsonl`: a line about the rank, then one an operation, the oldest first.
//! Ranks' clocks may differ: `regatta trace` puts operations together by their numbers, and times are corrected by
//! what the rank has measured against the job's store.

use crate::member::call::Call;
use crate::member::trace_folder;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

/// Operations kept.
const KEPT: usize = 256;
/// When an operation ends that goes on, or has failed.
const NEVER: u64 = u64::MAX;
/// One of so many brief operations is timed.
const SAMPLE: u64 = 16;

/// One operation. Times are in nanoseconds since the recorder was made.
#[derive(Debug, Default)]
struct Record {
    call: [AtomicU64; 4],
    begun: AtomicU64,
    ended: AtomicU64,
}

/// The last operations of one group.
///
/// A lock would take a good part of the time of a small operation. There is none: whoever carries an operation out is the
/// only one to write, and those who read are the threads that work on this operation with it.
#[derive(Debug)]
pub(crate) struct Recorder {
    made: Instant,
    /// Operations that have begun.
    count: AtomicU64,
    /// What a brief operation took, and how many brief ones there are until the next one is timed.
    brief: AtomicU64,
    untimed: AtomicU64,
    records: OnceLock<Box<[Record]>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            count: AtomicU64::new(0),
            brief: AtomicU64::new(0),
            untimed: AtomicU64::new(0),
            records: OnceLock::new(),
        }
    }
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
    /// Nanoseconds since the recorder was made: enough for 500 years.
    fn now(&self) -> u64 {
        let since = self.made.elapsed();
        since.as_secs() * 1_000_000_000 + u64::from(since.subsec_nanos())
    }

    /// The latest operation begins; when, in nanoseconds since the recorder was made.
    pub(crate) fn begin(&self, call: Call) -> u64 {
        let begun = self.now();
        // Written when they are made, so that no later operation waits for memory from the system.
        let records = self.records.get_or_init(|| {
            let never = || Record { ended: NEVER.into(), ..Record::default() };
            std::iter::repeat_with(never).take(KEPT).collect()
        });
        let count = self.count.load(Relaxed);
        let record = &records[count as usize % KEPT];
        for (word, value) in record.call.iter().zip(call.encode()) {
            word.store(value, Relaxed);
        }
        record.begun.store(begun, Relaxed);
        record.ended.store(NEVER, Relaxed);
        self.count.store(count + 1, Relaxed);
        begun
    }

    /// The latest operation, which has `begun` then, is done; when. Those that are brief take the same time to within a tenth
    /// of a microsecond, and a look at the clock is a good part of it: so only some of them are timed.
    pub(crate) fn end(&self, begun: u64, brief: bool) -> u64 {
        let untimed = self.untimed.load(Relaxed);
        let ended = if brief && untimed > 0 {
            self.untimed.store(untimed - 1, Relaxed);
            begun + self.brief.load(Relaxed)
        } else {
            self.now()
        };
        if brief && untimed == 0 {
            self.brief.store(ended - begun, Relaxed);
            self.untimed.store(SAMPLE - 1, Relaxed);
        }
        if let Some(last) = self.records().next() {
            last.ended.store(ended, Relaxed);
        }
        ended
    }

    /// What is kept, the latest first.
    fn records(&self) -> impl DoubleEndedIterator<Item = &Record> {
        let records = self.records.get().map_or(&[][..], |records| records);
        let count = self.count.load(Relaxed);
        (count.saturating_sub(KEPT as u64)..count).rev().map(|index| &records[index as usize % KEPT])
    }

    /// The operation that goes on.
    pub(crate) fn current(&self) -> Option<Call> {
        self.records().next().filter(|record| record.ended.load(Relaxed) == NEVER)?.call()
    }

    /// The collective operation with this number.
    pub(crate) fn call(&self, sequence: u32) -> Option<Call> {
        let mut calls = self.records().filter_map(Record::call);
        calls.find(|call| call.sequence == sequence && call.is_collective())
    }

    /// Writes everything into a file of `folder`; the file's path. `failure` is why.
    pub(crate) fn write(&self, folder: &Path, whose: &Whose<'_>, failure: &str) -> std::io::Result<PathBuf> {
        let (now, clock) = (Instant::now(), SystemTime::now());
        let since_epoch = clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let unix_us = |at: u64| {
            let age = now.saturating_duration_since(self.made + Duration::from_nanos(at)).as_micros();
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
        for record in self.records().rev() {
            let Some(call) = record.call() else { continue };
            let (begun, ended) = (record.begun.load(Relaxed), record.ended.load(Relaxed));
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
                unix_us(begun),
                if ended == NEVER { "null".into() } else { unix_us(ended).to_string() }
            );
        }
        let path = folder.join(format!("rank-{}-group-{:x}.jsonl", whose.rank, whose.group));
        trace_folder::write(&path, &text)?;
        Ok(path)
    }
}

impl Record {
    fn call(&self) -> Option<Call> {
        Call::decode([0, 1, 2, 3].map(|word| self.call[word].load(Relaxed)))
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
        let recorder = Recorder::default();
        for sequence in 1..=300 {
            let call = Call { sequence, ..Call::new(Kind::AllReduce, DType::F32, 5) };
            let begun = recorder.begin(call);
            if sequence < 300 {
                assert!(recorder.end(begun, sequence % 2 == 0) >= begun);
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
