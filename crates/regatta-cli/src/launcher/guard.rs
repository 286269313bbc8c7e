//! Ends the ranks when their launcher dies without ending them, as after `kill -9`. The guard is a process of its own;
//! it reads from a pipe that closes when the launcher dies.

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that runs the guard.
pub const COMMAND: &str = "end-ranks-without-launcher";
/// The launcher sends this line when nothing is left to end.
const DISMISSED: &str = "done";
/// How long ranks may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How often to look whether ranks have ended.
const POLL: Duration = Duration::from_millis(20);

/// The launcher's handle of its guard.
pub struct Guard {
    child: Child,
}

impl Guard {
    pub fn start() -> std::io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // In a group of its own, where the terminal's keys do not reach it.
        command.arg(COMMAND).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { child: command.spawn()? })
    }

    /// Adds a process group, which the guard ends if the launcher dies.
    pub fn add(&mut self, group: Pid) {
        self.write(&group.as_raw_nonzero().to_string());
    }

    /// Ends the guard: nothing is left for it to do.
    pub fn dismiss(mut self) {
        self.write(DISMISSED);
        drop(self.child.stdin.take());
        // It does not matter how the guard ended.
        let _ = self.child.wait();
    }

    fn write(&mut self, line: &str) {
        if let Some(pipe) = &mut self.child.stdin {
            // Writing fails if the guard was killed; the job goes on without it.
            let _ = writeln!(pipe, "{line}");
        }
    }
}

/// Runs the guard until the launcher dies or dismisses it.
pub fn run() -> ExitCode {
    let mut groups: Vec<Pid> = vec![];
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        if line == DISMISSED {
            return ExitCode::SUCCESS;
        }
        groups.extend(line.parse().ok().and_then(Pid::from_raw));
    }
    for signal in [Signal::TERM, Signal::KILL] {
        for &group in &groups {
            // The processes may have ended. A stopped process handles the signal only after SIGCONT.
            let _ = kill_process_group(group, signal);
            let _ = kill_process_group(group, Signal::CONT);
        }
        let begun = Instant::now();
        while groups.iter().any(|&group| test_kill_process_group(group).is_ok()) {
            if begun.elapsed() >= GRACE {
                break;
            }
            std::thread::sleep(POLL);
        }
        groups.retain(|&group| test_kill_process_group(group).is_ok());
    }
    ExitCode::SUCCESS
}
