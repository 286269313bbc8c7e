//! Signals: which ones this process handles, and what each means to a rank and to the launcher.
//!
//! The first of SIGHUP, SIGINT, SIGQUIT and SIGTERM asks to save and stop, the second ends at once. One request may
//! arrive several times: `timeout`, systemd and Slurm signal the launcher and the ranks, and mpirun passes on signals
//! that the ranks have received already. [`StopRequests`] tells such duplicates from a second request. Ranks of our own
//! launcher leave that to the launcher.

use crate::error::Result;
use regatta::config::OnUserSignal;
use regatta::train::Requests;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};
use signal_hook::low_level::{emulate_default_handler, exit};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The launcher sets this variable for its ranks: it ends them, too.
pub const LAUNCHED: &str = "REGATTA_LAUNCHED";
/// Its value if the ranks run this program, as those of `regatta train` do.
pub const OWN: &str = "own";

/// Variables of other launchers that run as long as their ranks: Open MPI's and torchrun's.
const FOREIGN: [&str; 2] = ["OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"];

/// Signals that ask to save and stop.
pub const STOPS: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];
/// Signals whose meaning the user chooses.
pub const USER: [i32; 2] = [SIGUSR1, SIGUSR2];
/// How often a rank looks whether its launcher has ended.
const LAUNCHER_POLL: Duration = Duration::from_secs(1);
/// Shells add a signal's number to this for the exit code.
const SIGNAL_EXIT_BASE: u8 = 128;
/// Signals of job control, which the launcher passes on.
const JOB_CONTROL: [i32; 2] = [SIGTSTP, SIGCONT];

/// A signal that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub signal: i32,
    /// Whether a key of the terminal sent it, and not a process.
    pub by_key: bool,
}

/// What handles signals.
enum Handler {
    /// Nothing is running that could be saved: signals have their default effect.
    Default,
    /// A rank, or a process whose threads are all ranks.
    Rank {
        requests: Arc<Requests>,
        user: OnUserSignal,
        launched: bool,
        stops: StopRequests,
    },
    Launcher(Box<dyn Fn(Received) + Send>),
}

struct Signals {
    handler: Arc<Mutex<Handler>>,
    registration: signal_hook::iterator::Handle,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

/// Installs the signal handlers. At first signals have their default effect, except that SIGUSR1 and SIGUSR2 are
/// ignored: there is nothing to save yet.
pub fn install() -> Result<()> {
    if SIGNALS.get().is_some() {
        return Ok(());
    }
    let mut signals =
        SignalsInfo::<WithOrigin>::new(STOPS.iter().chain(&USER).filter(|&&signal| !ignored(signal)))?;
    let handler = Arc::new(Mutex::new(Handler::Default));
    let own = Signals { handler: handler.clone(), registration: signals.handle() };
    if SIGNALS.set(own).is_err() {
        return Ok(());
    }
    std::thread::Builder::new().name("regatta-signals".into()).spawn(move || {
        for origin in signals.forever() {
            let received = Received { signal: origin.signal, by_key: by_key(&origin) };
            handler.lock().unwrap_or_else(PoisonError::into_inner).handle(received);
        }
    })?;
    Ok(())
}

/// From now on signals become requests to a run.
pub fn send_to_run(requests: Arc<Requests>, user: OnUserSignal) {
    let launched = launched();
    set(Handler::Rank { requests, user, launched, stops: StopRequests::default() });
}

/// Makes a rank of mpirun or torchrun save and stop, as after SIGHUP, when its launcher has ended. These launchers
/// start their ranks in sessions or groups of their own: a closed terminal, or `kill -9` of the launcher, does not
/// reach them.
#[cfg(unix)]
pub fn stop_with_launcher() -> Result<()> {
    use std::os::unix::process::parent_id;
    // A rank that was started by hand may outlive its shell.
    if launched() || FOREIGN.iter().all(|name| std::env::var_os(name).is_none()) {
        return Ok(());
    }
    let launcher = parent_id();
    std::thread::Builder::new().name("regatta-launcher".into()).spawn(move || {
        while parent_id() == launcher {
            std::thread::sleep(LAUNCHER_POLL);
        }
        if let Some(signals) = SIGNALS.get() {
            let hangup = Received { signal: SIGHUP, by_key: false };
            signals.handler.lock().unwrap_or_else(PoisonError::into_inner).handle(hangup);
        }
    })?;
    Ok(())
}

/// Sends signals to the launcher's loop until the result is dropped.
pub fn send_to_launcher<T: Send + 'static>(sender: Sender<T>, wrap: fn(Received) -> T) -> Result<Forwarding> {
    install()?;
    if let Some(signals) = SIGNALS.get() {
        for signal in JOB_CONTROL {
            if !ignored(signal) {
                signals.registration.add_signal(signal)?;
            }
        }
    }
    // Sending fails if the launcher's loop has ended.
    set(Handler::Launcher(Box::new(move |received| drop(sender.send(wrap(received))))));
    Ok(Forwarding)
}

/// The launcher's loop receives signals until this is dropped.
pub struct Forwarding;

impl Drop for Forwarding {
    fn drop(&mut self) {
        set(Handler::Default);
    }
}

/// Whether our launcher has started this process or one of its parents.
fn launched() -> bool {
    std::env::var_os(LAUNCHED).is_some_and(|value| !value.is_empty())
}

/// Whether this process is a rank of this program that our launcher has started.
pub fn own_rank() -> bool {
    std::env::var_os(LAUNCHED).is_some_and(|value| value == OWN)
}

/// The exit code of a program that a signal has stopped, as in shells.
pub fn exit_code(signal: i32) -> u8 {
    SIGNAL_EXIT_BASE.saturating_add(u8::try_from(signal).unwrap_or(0))
}

/// The signal that an exit code stands for.
pub fn of_exit_code(code: i32) -> Option<i32> {
    STOPS.into_iter().chain(USER).find(|&signal| i32::from(exit_code(signal)) == code)
}

/// The signal's name.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

fn set(handler: Handler) {
    if let Some(signals) = SIGNALS.get() {
        *signals.handler.lock().unwrap_or_else(PoisonError::into_inner) = handler;
    }
}

fn by_key(origin: &Origin) -> bool {
    matches!(origin.cause, Cause::Kernel)
}

impl Handler {
    fn handle(&mut self, received: Received) {
        let signal = received.signal;
        match self {
            // A request to save must not end the process before there is anything to save.
            Self::Default if USER.contains(&signal) => {}
            Self::Default => {
                // This cannot fail for signals that exist.
                let _ = emulate_default_handler(signal);
            }
            Self::Launcher(send) => send(received),
            Self::Rank { requests, user: OnUserSignal::Save, .. } if USER.contains(&signal) => {
                requests.save()
            }
            Self::Rank { requests, launched, stops, .. } => match stops.classify(received, Instant::now()) {
                Request::Stop => {
                    requests.stop(signal.unsigned_abs());
                    announce(signal);
                }
                // Our launcher knows whether this is a second request, and ends the rank if so.
                Request::Duplicate => {}
                Request::End if *launched => {}
                Request::End => exit(i32::from(exit_code(signal))),
            },
        }
    }
}

/// Prints that the run stops, if its rank 0 is in this process.
fn announce(signal: i32) {
    let rank =
        ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"].iter().find_map(|name| std::env::var(name).ok());
    if rank.is_none_or(|rank| rank == "0") {
        let again = if signal == SIGINT { "Ctrl-C again ends it" } else { "a second signal ends it" };
        // In the background: a blocked terminal must not delay the second signal.
        let name = name(signal);
        crate::out::note_in_background(format!(
            "{name}: saving and stopping after this step; {again} at once"
        ));
    }
}

/// What a signal that asks to stop means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// The first request: save and stop.
    Stop,
    /// The first request again, by another way.
    Duplicate,
    /// The second request: end at once.
    End,
}

/// Tells a second request to stop from duplicates of the first.
#[derive(Debug, Default)]
pub struct StopRequests {
    first: Option<Instant>,
}

impl StopRequests {
    /// A signal that a process sends within this time after the first is a duplicate of it.
    const DUPLICATES_WITHIN: Duration = Duration::from_secs(1);

    /// What a signal that arrives `now` means.
    pub fn classify(&mut self, received: Received, now: Instant) -> Request {
        match self.first {
            None => {
                self.first = Some(now);
                Request::Stop
            }
            // A closed terminal does not ask to hurry. It causes up to three signals: from kernel, shell and session.
            Some(_) if received.signal == SIGHUP => Request::Duplicate,
            // A key that is pressed twice is a second request.
            Some(_) if received.by_key => Request::End,
            Some(first) if now.saturating_duration_since(first) < Self::DUPLICATES_WITHIN => {
                Request::Duplicate
            }
            Some(_) => Request::End,
        }
    }
}

/// Whether this process was started with the signal ignored, as by `nohup` or a shell without job control. Such a
/// signal stays ignored.
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

/// Lets this thread, and the threads that it starts, write to the terminal from the background: ranks of our launcher
/// are not in the terminal's foreground, and `stty tostop` would stop them.
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

    fn requests(signals: &[(i32, bool, u64)]) -> Vec<Request> {
        let (mut stops, begun) = (StopRequests::default(), Instant::now());
        let classify = |&(signal, by_key, ms): &(i32, bool, u64)| {
            stops.classify(Received { signal, by_key }, begun + Duration::from_millis(ms))
        };
        signals.iter().map(classify).collect()
    }

    #[test]
    fn duplicates_are_told_from_a_second_request() {
        use Request::{Duplicate, End, Stop};
        // Ctrl-C twice, also quickly.
        assert_eq!(requests(&[(SIGINT, true, 0), (SIGINT, true, 150)]), [Stop, End]);
        // Ctrl-C, and the signals that mpirun sends after it.
        assert_eq!(
            requests(&[(SIGINT, true, 0), (SIGTERM, false, 20), (SIGTERM, false, 900)]),
            [Stop, Duplicate, Duplicate]
        );
        // `timeout` signals its child and then the group.
        assert_eq!(requests(&[(SIGTERM, false, 0), (SIGTERM, false, 1)]), [Stop, Duplicate]);
        assert_eq!(requests(&[(SIGTERM, false, 0), (SIGTERM, false, 1500)]), [Stop, End]);
        // A terminal that closes.
        assert_eq!(
            requests(&[(SIGHUP, true, 0), (SIGHUP, false, 1), (SIGHUP, true, 2000)]),
            [Stop, Duplicate, Duplicate]
        );
        assert_eq!(requests(&[(SIGHUP, true, 0), (SIGTERM, false, 5000)]), [Stop, End]);
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
