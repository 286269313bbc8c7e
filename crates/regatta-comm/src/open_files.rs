//! The system's limit on open files, which a job of many ranks meets first: every connection is one.

#[cfg(target_os = "linux")]
use crate::error::Error;
use crate::error::Result;

/// What the process may need beside what is counted.
#[cfg(target_os = "linux")]
const SPARE: u64 = 16;

/// Makes room for `needed` more open files, and for `useful` beyond them where the system allows it.
///
/// # Errors
/// A limit below what is needed.
#[cfg(target_os = "linux")]
pub(crate) fn prepare(needed: usize, useful: usize) -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Ok(open) = std::fs::read_dir("/proc/self/fd").map(|entries| entries.count() as u64) else {
        return Ok(());
    };
    let least = open.saturating_add(needed as u64);
    let enough = least.saturating_add(useful as u64).saturating_add(SPARE);
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current.filter(|&soft| soft < enough) else { return Ok(()) };
    let most = limit.maximum.map_or(enough, |hard| hard.min(enough));
    let raised = most > soft
        && setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: limit.maximum }).is_ok();
    let allowed = if raised { most } else { soft };
    match allowed < least {
        true => Err(Error::Rendezvous(format!(
            "this process needs {least} open files for the connections to the job's ranks, of which the system allows it \
             {allowed}: raise the limit (`ulimit -n {}`)",
            enough.next_power_of_two().max(1024)
        ))),
        false => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn prepare(_: usize, _: usize) -> Result<()> {
    Ok(())
}
