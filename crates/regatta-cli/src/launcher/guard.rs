//! Ends the ranks when their launcher is gone without a word, as after `kill -9`: a process of its own, which reads the
//! launcher's end of a pipe until that closes.

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that runs it.
pub const COMMAND: &str = "end-ranks-without-launcher";
/// What it reads when there is nothing left to end.
const DISMISSED: &str = "done";
/// How long ranks may take to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// The launcher's end.
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

    /// Entrusts it with one more process group.
    pub fn add(&mut self, group: Pid) {
        self.write(&group.as_raw_nonzero().to_string());
    }

    /// There is nothing left to end.
    pub fn dismiss(mut self) {
        self.write(DISMISSED);
        drop(self.child.stdin.take());
        // It may have been ended by somebody; then there is nothing to wait for.
        let _ = self.child.wait();
    }

    fn write(&mut self, line: &str) {
        if let Some(pipe) = &mut self.child.stdin {
            // A guard that somebody has ended guards nothing; the job goes on without.
            let _ = writeln!(pipe, "{line}");
        }
    }
}

/// Runs as the guard: until the launcher is gone.
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
            // They may have ended; and a stopped process takes its signals when it goes on.
            let _ = kill_process_group(group, signal);
            let _ = kill_process_group(group, Signal::CONT);
        }
        let begun = Instant::now();
        while groups.iter().any(|&group| test_kill_process_group(group).is_ok()) {
            if begun.elapsed() >= GRACE {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        groups.retain(|&group| test_kill_process_group(group).is_ok());
    }
    ExitCode::SUCCESS
}
