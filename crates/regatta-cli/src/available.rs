//! How much memory this process and its machine may use.

use std::fs;
use std::path::Path;

/// A limit of memory, and what sets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// Bytes.
    pub bytes: u64,
    /// What sets the limit, as in `the memory limit of its cgroup`.
    pub by: &'static str,
}

/// The memory that this process may use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Available {
    /// The limit of all processes here together, swap included: the machine's, or the cgroup's if that is lower.
    pub together: Option<Bound>,
    /// The bytes of that limit that are free now.
    pub free: Option<u64>,
    /// The limit of each process.
    pub process: Option<Bound>,
}

/// Asks the system how much memory this process may use.
pub fn available() -> Available {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let swap = field(&meminfo, "SwapTotal").unwrap_or(0);
    let of_machine = field(&meminfo, "MemTotal")
        .map(|bytes| Bound { bytes: bytes.saturating_add(swap), by: "the machine's memory" });
    let of_cgroup = cgroup(&cgroups, Path::new("/sys/fs/cgroup"), swap)
        .map(|bytes| Bound { bytes, by: "the memory limit of its cgroup" });
    let together = [of_machine, of_cgroup].into_iter().flatten().min_by_key(|bound| bound.bytes);
    let free = field(&meminfo, "MemAvailable");
    let free = free.map(|free| free.min(together.as_ref().map_or(u64::MAX, |bound| bound.bytes)));
    Available { together, free, process: of_process() }
}

/// The value of a line of /proc/meminfo in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit of the process's cgroups, plus the swap that it may use; `root` is where cgroups are mounted.
/// Version 2 has a single tree, version 1 has a tree for memory.
fn cgroup(cgroups: &str, root: &Path, swap: u64) -> Option<u64> {
    let mut smallest: Option<u64> = None;
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (tree, limit, with_swap) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.swap.max"),
            of if of.split(',').any(|one| one == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "")
            }
            _ => continue,
        };
        let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        // The limits of all parents hold too. In a container the path may be the host's: then the root is the
        // container's cgroup.
        let own = tree.join(path.trim_start_matches('/'));
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&tree)) {
            let Some(limit) = read(&folder.join(limit)) else { continue };
            let swap =
                if with_swap.is_empty() { swap } else { read(&folder.join(with_swap)).unwrap_or(swap) };
            let limit = limit.saturating_add(swap);
            smallest = Some(smallest.map_or(limit, |other| other.min(limit)));
        }
    }
    smallest
}

#[cfg(target_os = "linux")]
fn of_process() -> Option<Bound> {
    use rustix::process::{Resource, getrlimit};
    let bounds = [
        (Resource::As, "the limit of address space (ulimit -v)"),
        (Resource::Data, "the limit of data (ulimit -d)"),
    ];
    let bound = |(resource, by)| getrlimit(resource).current.map(|bytes| Bound { bytes, by });
    bounds.into_iter().filter_map(bound).min_by_key(|bound| bound.bytes)
}

#[cfg(not(target_os = "linux"))]
fn of_process() -> Option<Bound> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        let meminfo = "MemTotal:       16384 kB\nMemAvailable:    8192 kB\nSwapTotal:          0 kB\n";
        assert_eq!((field(meminfo, "MemTotal"), field(meminfo, "MemFree")), (Some(16 << 20), None));
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory.max", "max\n");
        write("jobs/memory.max", "3000\n");
        write("jobs/memory.swap.max", "0\n");
        write("jobs/one/memory.max", "9000\n");
        write("memory/job/memory.limit_in_bytes", "2000\n");
        let limit = |cgroups: &str| cgroup(cgroups, root.path(), 500);
        assert_eq!(limit("0::/jobs/one\n"), Some(3000));
        assert_eq!(limit("0::/\n"), None);
        assert_eq!(limit("0::/not/seen/here\n"), None);
        assert_eq!(limit("4:cpu:/job\n7:memory:/job\n"), Some(2500));
        let here = available();
        assert!(here.together.as_ref().is_none_or(|bound| bound.bytes > 0), "{here:?}");
    }
}
