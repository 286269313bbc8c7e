//! A job over an MPI library: the library's own launcher starts the ranks, and this one watches it.

use super::event::{End, Event};
use super::guard::Guard;
use super::job::Job;
use super::rank::wait;
use crate::cores::SHARE;
use crate::error::{Exit, Result};
use crate::signals::{self, STOPS};
use regatta_comm::TransportKind;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::SIGTSTP;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

/// Names the launcher of the MPI library that the program was built with, where `mpirun` is another library's.
const LAUNCHER: &str = "REGATTA_MPIRUN";

/// Runs the job to its end.
///
/// # Errors
/// The program has no MPI, its launcher cannot be started, or it says that the job failed; the ranks have then said why.
/// A job that a signal has stopped ends with the signal's exit code and no message.
pub fn launch(job: &Job) -> Result<()> {
    if job.own {
        TransportKind::Mpi.check_built()?;
    }
    let launcher =
        std::env::var_os(LAUNCHER).filter(|name| !name.is_empty()).unwrap_or_else(|| "mpirun".into());
    let name = launcher.display();
    let (sender, events) = channel();
    let _signals = signals::send_to_launcher(sender.clone(), Event::Signal)?;
    let mut guard = Guard::start().map_err(|error| format!("cannot start the launcher's guard: {error}"))?;
    let mut command = Command::new(&launcher);
    // A group of its own, so that a key of the terminal reaches it once, from here.
    command.args(["-n", &job.workers.to_string()]).process_group(0).stdin(Stdio::null());
    command.arg(&job.program).args(&job.arguments);
    command.env("REGATTA_TRANSPORT", TransportKind::Mpi.to_string()).env(SHARE, job.threads.to_string());
    // Open MPI 4 and 5: more ranks than cores, and as many cores for a rank as it has threads. Other libraries allow both.
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    command.env("PRTE_MCA_hwloc_default_binding_policy", "none");
    command.envs(job.environment.iter().map(|(key, value)| (key, value)));
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            guard.dismiss();
            return Err(format!(
                "cannot start {name}: {error}; ranks over MPI are started by the launcher of the MPI library: install \
                 it, or name it in {LAUNCHER}"
            )
            .into());
        }
    };
    let pid = Pid::from_child(&child);
    guard.add(pid);
    std::thread::spawn(move || {
        if let Some(end) = wait(pid) {
            // Nobody may listen any longer.
            let _ = sender.send(Event::Ended(0, end));
        }
    });
    let mut stopped_by = None;
    let mut outcome = None;
    while outcome.is_none() {
        match events.recv() {
            Ok(Event::Signal(received)) => {
                // It passes signals on to its ranks.
                if let Some(signal) = Signal::from_named_raw(received.signal) {
                    let _ = kill_process(pid, signal);
                }
                if received.signal == SIGTSTP {
                    // As the terminal asked. This process goes on here after SIGCONT.
                    let _ = kill_process(rustix::process::getpid(), Signal::STOP);
                }
                if STOPS.contains(&received.signal) {
                    stopped_by.get_or_insert(received.signal);
                }
            }
            Ok(Event::Ended(_, end)) => outcome = Some(end),
            Err(_) => break,
        }
    }
    guard.dismiss();
    let _ = child.wait();
    match (outcome, stopped_by) {
        (Some(End::Code(0)), _) => Ok(()),
        (_, Some(signal)) => Err(Exit { message: None, code: signals::exit_code(signal) }.into()),
        (Some(end), None) => {
            let message = Some(format!("{name} {end}: its output above says why"));
            Err(Exit { message, code: end.exit_code() }.into())
        }
        (None, None) => Err(format!("the end of {name} could not be waited for").into()),
    }
}
