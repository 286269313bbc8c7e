//! Whether ranks still do something: what their processes have computed and written, as the system counts it.

use rustix::process::Pid;
use std::collections::BTreeMap;
use std::time::Duration;

/// What the processes of some groups have done so far.
#[derive(Debug, Default)]
pub struct Activity {
    /// By process: its processor time in the system's ticks, and the bytes it has written.
    processes: BTreeMap<i32, (u64, u64)>,
}

/// Ticks of processor time in a second, which Linux shows to programs whatever it counts in.
const TICKS: f64 = 100.0;
/// A process that only waits takes less of a core than this.
const WAITING: f64 = 0.05;

impl Activity {
    /// Of all living processes in `groups`. Nothing is known but on Linux.
    pub fn of(groups: &[Pid]) -> Self {
        let mut processes = BTreeMap::new();
        if groups.is_empty() {
            return Self { processes };
        }
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // It may end while it is looked at.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let Some((group, ticks)) = parse(&stat) else { continue };
            if groups.iter().any(|of| of.as_raw_nonzero().get() == group) {
                let io = std::fs::read_to_string(entry.path().join("io")).unwrap_or_default();
                let written = io.lines().find_map(|line| line.strip_prefix("wchar: ")?.trim().parse().ok());
                processes.insert(pid, (ticks, written.unwrap_or(0)));
            }
        }
        Self { processes }
    }

    /// Whether any process is there.
    pub fn lives(&self) -> bool {
        !self.processes.is_empty()
    }

    /// Whether something has happened since `before`, `time` ago: a process computed or wrote, began or ended.
    pub fn moved_since(&self, before: &Self, time: Duration) -> bool {
        self.processes.len() != before.processes.len()
            || self.processes.iter().any(|(pid, &(ticks, written))| match before.processes.get(pid) {
                None => true,
                Some(&(ticks_before, written_before)) => {
                    let computed = ticks.saturating_sub(ticks_before) as f64 / TICKS;
                    written > written_before || computed > WAITING * time.as_secs_f64()
                }
            })
    }
}

/// The group and the processor time of a process that has not ended, from its line in `/proc/PID/stat`.
fn parse(stat: &str) -> Option<(i32, u64)> {
    // The name, in brackets, may hold anything.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    let ended = matches!(*fields.first()?, "Z" | "X");
    let (user, system): (u64, u64) = (fields.get(11)?.parse().ok()?, fields.get(12)?.parse().ok()?);
    (!ended).then_some((fields.get(2)?.parse().ok()?, user + system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let line =
            |state: &str| format!("7 (a) b (c) {state} 1 42 42 0 -1 4194304 9 0 0 0 30 12 0 0 20 0 1 0");
        assert_eq!(parse(&line("S")), Some((42, 42)));
        assert_eq!(parse(&line("Z")), None);
        assert_eq!(parse("7 (a"), None);
    }

    #[test]
    fn waiting_is_no_movement() {
        let of = |ticks, written| Activity { processes: BTreeMap::from([(7, (ticks, written))]) };
        let second = Duration::from_secs(1);
        assert!(!of(104, 5).moved_since(&of(100, 5), second));
        assert!(of(110, 5).moved_since(&of(100, 5), second));
        assert!(of(100, 6).moved_since(&of(100, 5), second));
        assert!(Activity::default().moved_since(&of(100, 5), second));
    }
}
