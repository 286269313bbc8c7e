//! The machine's cores and each worker's share of them.

use regatta::plan::threads_per_worker;
use std::time::Duration;

/// How often to look whether other programs compute, and the time between: shorter than anybody notices.
const LOOKS: usize = 5;
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Cores that this process may use.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Threads that this rank computes with, where `local_ranks` ranks of its job share the machine.
pub fn threads(local_ranks: usize) -> usize {
    // A launcher that binds its ranks leaves each with its own share already, and ours says how many threads that is.
    wanted()
        .or(number(crate::launcher::SHARE))
        .unwrap_or_else(|| threads_per_worker(available(), local_ranks))
}

/// Threads of each of `workers` ranks that are to be started.
pub fn of_each(workers: usize) -> usize {
    wanted().unwrap_or_else(|| threads_per_worker(available(), workers))
}

/// What the user says in `REGATTA_THREADS`.
fn wanted() -> Option<usize> {
    number("REGATTA_THREADS")
}

fn number(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok().filter(|threads| *threads > 0)
}

/// Whether no other program computes now on the cores that this process may use, as far as can be known: to ask before
/// ranks are started. A rank that is bound to a core which others want has less of it than its peers have of theirs, and
/// they wait for it.
#[cfg(target_os = "linux")]
pub fn alone() -> bool {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let core = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    // What runs on this host may run on the cores that are not ours.
    let elsewhere = stat.lines().filter(core).count().saturating_sub(available());
    // Several looks: what runs for a moment only does not count.
    let others = |_| {
        std::thread::sleep(LOOK_EVERY);
        // As in "0.20 0.18 0.12 1/80 11206": the fourth tells how many threads run now, this one among them.
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let running = load.split([' ', '/']).nth(3).and_then(|running| running.parse::<usize>().ok());
        running.map_or(0, |running| running.saturating_sub(1))
    };
    (0..LOOKS).map(others).min().is_none_or(|others| others <= elsewhere)
}

#[cfg(not(target_os = "linux"))]
pub fn alone() -> bool {
    true
}

/// Binds process `pid` to its share of the cores that this process may use, where `workers` workers of `threads`
/// threads take all of them, once or several times over: worker `index` gets as many as its threads. Where the job leaves
/// cores free, or shares them with other programs, the system places it better than we. `alone` is what [`alone`] has said.
#[cfg(target_os = "linux")]
pub fn bind(pid: u32, index: usize, workers: usize, threads: usize, alone: bool) {
    use rustix::process::Pid;
    if !alone {
        return;
    }
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(mine) = sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| mine.is_set(core)).collect();
    // More workers than cores take turns on each, as many on one as on another.
    let turns = (workers * threads) / cores.len().max(1);
    if turns == 0 || workers * threads != turns * cores.len() || (turns > 1 && threads > 1) {
        return;
    }
    let mut share = CpuSet::new();
    let first = index * threads % cores.len();
    cores[first..first + threads].iter().for_each(|&core| share.set(core));
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // A process that has ended already needs no core; a system that forbids it only costs speed.
    let _ = sched_setaffinity(pid, &share);
}

#[cfg(not(target_os = "linux"))]
pub fn bind(_: u32, _: usize, _: usize, _: usize, _: bool) {}
