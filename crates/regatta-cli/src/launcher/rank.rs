//! One rank: its process group, its output, and its end.

use super::activity::Activity;
use super::event::{End, Event};
use super::job::Job;
use crate::cores::{self, SHARE};
use crate::signals;
use regatta_comm::rendezvous::{Security, StoreServer};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Last lines of a rank's standard error that the error of a failed job repeats.
const KEPT_LINES: usize = 20;
/// Longest reason of a failure that is read, in bytes.
const MAX_REASON_BYTES: u64 = 64 << 10;
/// How long child processes of a rank may take to end after the rank and after each signal.
const GRACE_FOR_CHILDREN: Duration = Duration::from_secs(5);
/// How long to wait for the rest of the output when all processes have ended.
const GRACE_FOR_OUTPUT: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(10);

/// What a rank wrote last.
pub struct LastOutput {
    /// Why it failed, as reported by the rank itself.
    pub reason: Option<String>,
    /// The last lines of its standard error.
    pub tail: Vec<String>,
}

/// A rank that was started. Its process is waited for only when the job has ended: until then the system cannot give
/// its process id and group id to another process.
pub struct Rank {
    child: Child,
    pid: Pid,
    reason: Option<PipeReader>,
    readers: Vec<JoinHandle<()>>,
    tail: Arc<Mutex<VecDeque<String>>>,
}

impl Rank {
    pub fn start(
        job: &Job,
        rank: usize,
        store: &StoreServer,
        security: &Security,
        sender: &Sender<Event>,
        idle: bool,
    ) -> std::io::Result<Self> {
        let mut command = Command::new(&job.program);
        command.args(&job.arguments).process_group(0).stdin(Stdio::null());
        let address = store.addr();
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", job.workers.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("LOCAL_WORLD_SIZE", job.workers.to_string()),
            ("MASTER_ADDR", address.ip().to_string()),
            ("MASTER_PORT", address.port().to_string()),
            ("REGATTA_STORE", address.to_string()),
            (SHARE, job.threads.to_string()),
            (signals::LAUNCHED, if job.own { signals::OWN } else { "1" }.into()),
        ];
        command.envs(variables);
        if let Some(secret) = &security.secret {
            command.env("REGATTA_SECRET", secret.to_text());
        }
        if let Some(transport) = job.transport {
            command.env("REGATTA_TRANSPORT", transport.to_string());
        }
        command.envs(job.environment.iter().map(|(key, value)| (key, value)));
        let mut reason = None;
        if job.own {
            // Our own ranks read no input. Their standard input is a pipe into which they write why they fail.
            let (reader, writer) = std::io::pipe()?;
            rustix::io::ioctl_fionbio(&reader, true)?;
            command.stdin(writer);
            reason = Some(reader);
        }
        if !(job.own && rank == 0) {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let computing = job.workers - job.servers;
        if rank < computing {
            cores::bind(child.id(), rank, computing, job.threads, idle);
        }
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let mut readers = vec![];
        if let Some(out) = child.stdout.take() {
            readers.push(forward(rank, out, std::io::stdout(), None));
        }
        if let Some(err) = child.stderr.take() {
            readers.push(forward(rank, err, std::io::stderr(), Some(tail.clone())));
        }
        let sender = sender.clone();
        std::thread::spawn(move || {
            if let Some(end) = wait(pid) {
                // The launcher may have stopped listening.
                let _ = sender.send(Event::Ended(rank, end));
            }
        });
        Ok(Self { child, pid, reason, readers, tail })
    }

    /// The process group that the rank leads.
    pub fn group(&self) -> Pid {
        self.pid
    }

    /// Signals the rank and its child processes, as a terminal would.
    pub fn signal_group(&self, signal: Signal) {
        // The processes may have ended.
        let _ = kill_process_group(self.pid, signal);
    }

    /// Signals only the rank: a child process that does not handle the signal would end.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }

    /// Waits for its process, which has ended, and for the rest of its output.
    pub fn finish(mut self) -> LastOutput {
        let _ = self.child.wait();
        let begun = Instant::now();
        for reader in self.readers {
            // A process that has left the group may keep the pipe open for ever.
            while !reader.is_finished() && begun.elapsed() < GRACE_FOR_OUTPUT {
                std::thread::sleep(POLL);
            }
            if reader.is_finished() {
                // A reader that panicked has no more output.
                let _ = reader.join();
            }
        }
        let mut reason = vec![];
        if let Some(pipe) = self.reason {
            // After an error, as when another process still has the pipe open, what was read before counts.
            let _ = pipe.take(MAX_REASON_BYTES).read_to_end(&mut reason);
        }
        let reason = String::from_utf8_lossy(&reason).trim().to_string();
        let tail = std::mem::take(&mut *self.tail.lock().unwrap_or_else(PoisonError::into_inner)).into();
        LastOutput { reason: Some(reason).filter(|reason| !reason.is_empty()), tail }
    }
}

/// Ends all processes that still run in the groups of `ranks`.
pub fn end_groups(ranks: &[Rank]) {
    let groups: Vec<Pid> = ranks.iter().map(Rank::group).collect();
    for signal in [Signal::TERM, Signal::KILL] {
        if !Activity::of(&groups).is_alive() {
            return;
        }
        for rank in ranks {
            rank.signal_group(signal);
            // A stopped process handles the signal only after SIGCONT.
            rank.signal_group(Signal::CONT);
        }
        let begun = Instant::now();
        while Activity::of(&groups).is_alive() && begun.elapsed() < GRACE_FOR_CHILDREN {
            std::thread::sleep(POLL);
        }
    }
}

/// Waits for the end of a process without reaping it: its id stays reserved.
pub fn wait(pid: Pid) -> Option<End> {
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(Some(status)) => {
                let signal = status.terminating_signal().map(End::Signal);
                return signal.or(status.exit_status().map(End::Code));
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Copies lines from a rank to the launcher's output, each after the number of the rank; `tail` gets the last ones.
fn forward(
    rank: usize,
    from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    tail: Option<Arc<Mutex<VecDeque<String>>>>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut bytes = vec![];
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let line = String::from_utf8_lossy(&bytes);
            let line = line.trim_end_matches(['\n', '\r']);
            // Our own output may be closed (a pager that ended). Reading goes on, so that the rank is not blocked.
            let _ = to.write_all(format!("[{rank}] {line}\n").as_bytes());
            if let Some(tail) = &tail {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                if tail.len() == KEPT_LINES {
                    tail.pop_front();
                }
                tail.push_back(line.to_string());
            }
            bytes.clear();
        }
    })
}
