//! Signals: which ones this process takes, and what each means to a rank and to the launcher.
//!
//! The first of SIGHUP, SIGINT, SIGQUIT and SIGTERM asks to save and stop, the second ends at once. One wish may arrive
//! several times: `timeout`, systemd and Slurm signal the launcher and the ranks, mpirun passes on what the ranks have
//! got already. [`Stops`] tells such copies from a second wish. Ranks of our own launcher leave that to it.

use crate::error::Result;
use regatta::train::{OnUserSignal, Requests};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};
use signal_hook::low_level::{emulate_default_handler, exit};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Says to a process that our launcher has started it, which then also ends it.
pub const LAUNCHED: &str = "REGATTA_LAUNCHED";
/// Its value where the ranks are this program, as those of `regatta train` are.
pub const OWN: &str = "own";

/// Variables of other launchers that stay while their ranks run: Open MPI's and torchrun's.
const FOREIGN: [&str; 2] = ["OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"];

/// Signals that ask to save and stop.
pub const STOPS: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];
/// Signals whose meaning is the user's.
pub const USER: [i32; 2] = [SIGUSR1, SIGUSR2];
/// Signals of job control, which the launcher passes on.
const JOB_CONTROL: [i32; 2] = [SIGTSTP, SIGCONT];

/// A signal that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub signal: i32,
    /// A key of the terminal sent it, not a process.
    pub by_key: bool,
}

/// Who deals with signals.
enum Taker {
    /// Nothing is running that could be saved: signals do what they do to any program.
    Nobody,
    /// A rank, or a process whose threads are all ranks.
    Rank {
        requests: Arc<Requests>,
        user: OnUserSignal,
        launched: bool,
        stops: Stops,
    },
    Launcher(Box<dyn Fn(Received) + Send>),
}

struct Signals {
    taker: Arc<Mutex<Taker>>,
    handle: signal_hook::iterator::Handle,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

/// From now on this process takes signals, which do at first what they do to any program, but for SIGUSR1 and SIGUSR2:
/// there is nothing to save yet.
pub fn take() -> Result<()> {
    if SIGNALS.get().is_some() {
        return Ok(());
    }
    let mut signals =
        SignalsInfo::<WithOrigin>::new(STOPS.iter().chain(&USER).filter(|&&signal| !ignored(signal)))?;
    let taker = Arc::new(Mutex::new(Taker::Nobody));
    let own = Signals { taker: taker.clone(), handle: signals.handle() };
    if SIGNALS.set(own).is_err() {
        return Ok(());
    }
    std::thread::Builder::new().name("regatta-signals".into()).spawn(move || {
        for origin in signals.forever() {
            let received = Received { signal: origin.signal, by_key: by_key(&origin) };
            taker.lock().unwrap_or_else(PoisonError::into_inner).take(received);
        }
    })?;
    Ok(())
}

/// From now on signals are requests to a run.
pub fn ask(requests: Arc<Requests>, user: OnUserSignal) {
    let launched = launched();
    set(Taker::Rank { requests, user, launched, stops: Stops::default() });
}

/// mpirun and torchrun start their ranks in sessions or groups of their own. So a terminal that closes ends the launcher
/// alone, and so does `kill -9` of it. Its ranks would train on, unseen: they take it as SIGHUP, and save and stop.
#[cfg(unix)]
pub fn stop_with_launcher() -> Result<()> {
    use std::os::unix::process::parent_id;
    // A rank that was started by hand may outlive the shell that did.
    if launched() || FOREIGN.iter().all(|name| std::env::var_os(name).is_none()) {
        return Ok(());
    }
    let launcher = parent_id();
    std::thread::Builder::new().name("regatta-launcher".into()).spawn(move || {
        while parent_id() == launcher {
            std::thread::sleep(Duration::from_secs(1));
        }
        if let Some(signals) = SIGNALS.get() {
            let gone = Received { signal: SIGHUP, by_key: false };
            signals.taker.lock().unwrap_or_else(PoisonError::into_inner).take(gone);
        }
    })?;
    Ok(())
}

/// From now on signals are sent to the launcher's loop; until the result is dropped.
pub fn hand_to<T: Send + 'static>(sender: Sender<T>, wrap: fn(Received) -> T) -> Result<Handed> {
    take()?;
    if let Some(signals) = SIGNALS.get() {
        for signal in JOB_CONTROL {
            if !ignored(signal) {
                signals.handle.add_signal(signal)?;
            }
        }
    }
    // The launcher may have stopped listening.
    set(Taker::Launcher(Box::new(move |received| drop(sender.send(wrap(received))))));
    Ok(Handed)
}

/// While it lives, the launcher's loop gets the signals.
pub struct Handed;

impl Drop for Handed {
    fn drop(&mut self) {
        set(Taker::Nobody);
    }
}

/// Whether our launcher has started this process, or what has started it.
fn launched() -> bool {
    std::env::var_os(LAUNCHED).is_some_and(|value| !value.is_empty())
}

/// Whether this process is a rank that this program has started of itself.
pub fn own_rank() -> bool {
    std::env::var_os(LAUNCHED).is_some_and(|value| value == OWN)
}

/// The exit code of what a signal has stopped, as shells have it.
pub fn exit_code(signal: i32) -> u8 {
    128u8.saturating_add(u8::try_from(signal).unwrap_or(0))
}

/// The signal that an exit code speaks of.
pub fn of_exit_code(code: i32) -> Option<i32> {
    STOPS.into_iter().chain(USER).find(|&signal| i32::from(exit_code(signal)) == code)
}

/// The signal's name.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

fn set(taker: Taker) {
    if let Some(signals) = SIGNALS.get() {
        *signals.taker.lock().unwrap_or_else(PoisonError::into_inner) = taker;
    }
}

fn by_key(origin: &Origin) -> bool {
    matches!(origin.cause, Cause::Kernel)
}

impl Taker {
    fn take(&mut self, received: Received) {
        let signal = received.signal;
        match self {
            // A save that is asked for before there is anything to save is no reason to end.
            Self::Nobody if USER.contains(&signal) => {}
            Self::Nobody => {
                // It cannot fail for signals that exist.
                let _ = emulate_default_handler(signal);
            }
            Self::Launcher(send) => send(received),
            Self::Rank { requests, user: OnUserSignal::Save, .. } if USER.contains(&signal) => {
                requests.save()
            }
            Self::Rank { requests, launched, stops, .. } => match stops.count(received, Instant::now()) {
                Wish::Stop => {
                    requests.stop(signal.unsigned_abs());
                    announce(signal);
                }
                // The launcher knows whether it is a second wish, and ends us if so.
                Wish::Copy => {}
                Wish::End if *launched => {}
                Wish::End => exit(i32::from(exit_code(signal))),
            },
        }
    }
}

/// Says that the run stops, where rank 0 of it is in this process.
fn announce(signal: i32) {
    let rank =
        ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"].iter().find_map(|name| std::env::var(name).ok());
    if rank.is_none_or(|rank| rank == "0") {
        let again = if signal == SIGINT { "Ctrl-C again ends it" } else { "a second signal ends it" };
        // The second signal must be heard, too.
        let name = name(signal);
        crate::out::aside(format!("{name}: saving and stopping after this step; {again} at once"));
    }
}

/// What a signal that asks to stop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The first: save and stop.
    Stop,
    /// One more way in which the first has come.
    Copy,
    /// The second: end at once.
    End,
}

/// Tells a second wish to end from copies of the first.
#[derive(Debug, Default)]
pub struct Stops {
    first: Option<Instant>,
}

impl Stops {
    /// Signals that processes send so soon after the first are copies of it.
    const COPIES: Duration = Duration::from_secs(1);

    /// What a signal that comes `now` is.
    pub fn count(&mut self, received: Received, now: Instant) -> Wish {
        match self.first {
            None => {
                self.first = Some(now);
                Wish::Stop
            }
            // A terminal that closes is no wish to hurry, and says so up to three times: kernel, shell and session.
            Some(_) if received.signal == SIGHUP => Wish::Copy,
            // Whoever presses a key twice means it.
            Some(_) if received.by_key => Wish::End,
            Some(first) if now.saturating_duration_since(first) < Self::COPIES => Wish::Copy,
            Some(_) => Wish::End,
        }
    }
}

/// Whether this process was started with the signal ignored, as `nohup` and shells without job control do: it stays so.
#[cfg(target_os = "linux")]
fn ignored(signal: i32) -> bool {
    static IGNORED: OnceLock<u64> = OnceLock::new();
    let mask = IGNORED.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    });
    (1..=64).contains(&signal) && mask & (1 << (signal - 1)) != 0
}

#[cfg(not(target_os = "linux"))]
fn ignored(_: i32) -> bool {
    false
}

/// Lets this process write to its terminal also where it is not in the terminal's foreground, as ranks of our launcher are
/// not: `stty tostop` would stop them. For this thread and those it starts.
#[cfg(unix)]
pub fn write_from_background() {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    set.add(Signal::SIGTTOU);
    // Blocking a signal that exists cannot fail.
    let _ = set.thread_block();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(signals: &[(i32, bool, u64)]) -> Vec<Wish> {
        let (mut stops, begun) = (Stops::default(), Instant::now());
        let count = |&(signal, by_key, ms): &(i32, bool, u64)| {
            stops.count(Received { signal, by_key }, begun + Duration::from_millis(ms))
        };
        signals.iter().map(count).collect()
    }

    #[test]
    fn copies_are_told_from_a_second_wish() {
        use Wish::{Copy, End, Stop};
        // Ctrl-C twice, also quickly.
        assert_eq!(wishes(&[(SIGINT, true, 0), (SIGINT, true, 150)]), [Stop, End]);
        // Ctrl-C, and what mpirun makes of it.
        assert_eq!(
            wishes(&[(SIGINT, true, 0), (SIGTERM, false, 20), (SIGTERM, false, 900)]),
            [Stop, Copy, Copy]
        );
        // `timeout` signals its child and then the group.
        assert_eq!(wishes(&[(SIGTERM, false, 0), (SIGTERM, false, 1)]), [Stop, Copy]);
        assert_eq!(wishes(&[(SIGTERM, false, 0), (SIGTERM, false, 1500)]), [Stop, End]);
        // A terminal that closes.
        assert_eq!(
            wishes(&[(SIGHUP, true, 0), (SIGHUP, false, 1), (SIGHUP, true, 2000)]),
            [Stop, Copy, Copy]
        );
        assert_eq!(wishes(&[(SIGHUP, true, 0), (SIGTERM, false, 5000)]), [Stop, End]);
    }

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!([SIGHUP, SIGINT, SIGQUIT, SIGTERM].map(exit_code), [129, 130, 131, 143]);
        assert_eq!(
            (of_exit_code(143), of_exit_code(130), of_exit_code(1)),
            (Some(SIGTERM), Some(SIGINT), None)
        );
    }
}
