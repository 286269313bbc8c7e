//! The machine's cores and each worker's share of them.

use regatta::plan::threads_per_worker;
use std::time::Duration;

/// The launcher sets this variable to the number of threads that are a rank's share of the cores.
pub const SHARE: &str = "REGATTA_THREADS_SHARE";
/// Samples of the machine's load before ranks are started, and the time between them: too short to be noticed.
const LOAD_SAMPLES: usize = 5;
const LOAD_SAMPLE_INTERVAL: Duration = Duration::from_millis(1);

/// Cores that this process may use.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Threads that this rank computes with if `local_ranks` ranks of its job share the machine.
pub fn threads(local_ranks: usize) -> usize {
    // Our launcher binds each rank to its share of the cores, which must not be divided once more.
    requested().or(thread_count(SHARE)).unwrap_or_else(|| threads_per_worker(available(), local_ranks))
}

/// Threads of each rank if a job of `workers` ranks is started here.
pub fn threads_of_each(workers: usize) -> usize {
    requested().unwrap_or_else(|| threads_per_worker(available(), workers))
}

/// The user's setting in `REGATTA_THREADS`.
fn requested() -> Option<usize> {
    thread_count("REGATTA_THREADS")
}

fn thread_count(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok().filter(|threads| *threads > 0)
}

/// Whether no other program seems to compute now on the cores that this process may use. Call it before ranks are
/// started: a rank that is bound to a core of another program is slower than its peers, and they wait for it.
#[cfg(target_os = "linux")]
pub fn idle() -> bool {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let core = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    // A running program may be on one of the cores that this process may not use.
    let other_cores = stat.lines().filter(core).count().saturating_sub(available());
    // The minimum of several samples: a program that runs only for a moment does not count.
    let others = |_| {
        std::thread::sleep(LOAD_SAMPLE_INTERVAL);
        // As in "0.20 0.18 0.12 1/80 11206": the fourth number counts the threads that run now, including this one.
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let running = load.split([' ', '/']).nth(3).and_then(|running| running.parse::<usize>().ok());
        running.map_or(0, |running| running.saturating_sub(1))
    };
    (0..LOAD_SAMPLES).map(others).min().is_none_or(|others| others <= other_cores)
}

#[cfg(not(target_os = "linux"))]
pub fn idle() -> bool {
    true
}

/// Binds process `pid`, worker `index`, to as many cores as it has threads, if `workers` workers of `threads` threads
/// use every core that this process may use equally often. If the job leaves cores free, or shares them with other
/// programs (`idle` is the result of [`idle`]), the system's scheduler places the workers better.
#[cfg(target_os = "linux")]
pub fn bind(pid: u32, index: usize, workers: usize, threads: usize, idle: bool) {
    use rustix::process::Pid;
    if !idle {
        return;
    }
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    // Where there are more workers than cores, every core gets the same number of workers.
    let turns = (workers * threads) / cores.len().max(1);
    if turns == 0 || workers * threads != turns * cores.len() || (turns > 1 && threads > 1) {
        return;
    }
    let mut share = CpuSet::new();
    let first = index * threads % cores.len();
    cores[first..first + threads].iter().for_each(|&core| share.set(core));
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // An error is harmless: the process has ended, or it is not bound and may be slower.
    let _ = sched_setaffinity(pid, &share);
}

#[cfg(not(target_os = "linux"))]
pub fn bind(_: u32, _: usize, _: usize, _: usize, _: bool) {}
