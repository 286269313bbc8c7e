//! Whether ranks still make progress: how much their processes have computed and written, as counted by the system.

use rustix::process::Pid;
use std::collections::BTreeMap;
use std::time::Duration;

/// What the processes of some process groups have computed and written so far.
#[derive(Debug, Default)]
pub struct Activity {
    /// By process: its processor time in the system's ticks, and the bytes it has written.
    processes: BTreeMap<i32, (u64, u64)>,
}

/// Ticks of processor time in a second: Linux reports times to programs in this unit on every machine.
const TICKS_PER_S: f64 = 100.0;
/// A process that uses less than this share of a core only waits.
const WAITING_LOAD: f64 = 0.05;

impl Activity {
    /// Measures all living processes in `groups`. Only Linux reports them; elsewhere the result is empty.
    pub fn of(groups: &[Pid]) -> Self {
        let mut processes = BTreeMap::new();
        if groups.is_empty() {
            return Self { processes };
        }
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // The process may end meanwhile.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let Some((group, ticks)) = parse(&stat) else { continue };
            if groups.iter().any(|one| one.as_raw_nonzero().get() == group) {
                let io = std::fs::read_to_string(entry.path().join("io")).unwrap_or_default();
                let written = io.lines().find_map(|line| line.strip_prefix("wchar: ")?.trim().parse().ok());
                processes.insert(pid, (ticks, written.unwrap_or(0)));
            }
        }
        Self { processes }
    }

    /// Whether any process is alive.
    pub fn is_alive(&self) -> bool {
        !self.processes.is_empty()
    }

    /// Whether a process has computed, written, started or ended since `before` was measured, `time` ago.
    pub fn progressed_since(&self, before: &Self, time: Duration) -> bool {
        self.processes.len() != before.processes.len()
            || self.processes.iter().any(|(pid, &(ticks, written))| match before.processes.get(pid) {
                None => true,
                Some(&(ticks_before, written_before)) => {
                    let computed = ticks.saturating_sub(ticks_before) as f64 / TICKS_PER_S;
                    written > written_before || computed > WAITING_LOAD * time.as_secs_f64()
                }
            })
    }
}

/// The group and the processor time of a process that has not ended, from its line in `/proc/PID/stat`.
fn parse(stat: &str) -> Option<(i32, u64)> {
    // The name, in parentheses, may contain any character.
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
    fn a_waiting_process_makes_no_progress() {
        let of = |ticks, written| Activity { processes: BTreeMap::from([(7, (ticks, written))]) };
        let second = Duration::from_secs(1);
        assert!(!of(104, 5).progressed_since(&of(100, 5), second));
        assert!(of(110, 5).progressed_since(&of(100, 5), second));
        assert!(of(100, 6).progressed_since(&of(100, 5), second));
        assert!(Activity::default().progressed_since(&of(100, 5), second));
    }
}
