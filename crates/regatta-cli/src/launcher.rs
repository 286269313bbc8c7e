//! Starts the ranks of a job as local processes, watches them, and ends all when one fails.

use crate::error::Result;
use regatta_comm::rendezvous::{Secret, Security, StoreServer};
use regatta_comm::{Options, TransportKind};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The variable that tells a rank how many threads it has.
pub const THREADS: &str = "REGATTA_THREADS";
/// How long ranks may take to end by themselves after one has failed or a signal has come.
const GRACE_AFTER_FAILURE: Duration = Duration::from_secs(5);
const GRACE_AFTER_SIGNAL: Duration = Duration::from_secs(60);
/// How often the launcher looks for signals.
const TICK: Duration = Duration::from_millis(20);
/// Lines of a rank's standard error that are kept to be shown again at the end.
const KEPT_LINES: usize = 20;

/// What to start.
pub struct Job {
    /// The program of every rank.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Number of ranks.
    pub workers: usize,
    /// Threads that each rank computes with.
    pub threads: usize,
    /// How they communicate; none: the fastest that works.
    pub transport: Option<TransportKind>,
    /// More environment variables.
    pub environment: Vec<(String, String)>,
    /// Rank 0 writes straight to the terminal (it draws a progress bar there).
    pub lead_owns_terminal: bool,
}

/// Runs the job to its end.
///
/// # Errors
/// Ranks that cannot be started, or the first rank that failed: which, how, and what it said.
pub fn launch(job: &Job) -> Result<ExitCode> {
    if job.workers == 0 {
        return Err("a job has at least 1 worker".into());
    }
    let options = Options::from_env()?;
    // A secret of this job's own: what else runs on this machine cannot join it.
    let secret = options.secret.map_or_else(Secret::random, Ok)?;
    let security = Security { secret: Some(secret), tls: options.tls };
    let store = StoreServer::start("127.0.0.1:0", job.workers, &security)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let (sender, events) = channel();
    let mut ranks = Vec::new();
    for rank in 0..job.workers {
        match Rank::start(job, rank, &store, &security, &sender) {
            Ok(started) => ranks.push(started),
            Err(error) => {
                ranks.iter().for_each(|rank| rank.signal(Signal::Kill));
                return Err(format!("cannot start {}: {error}", job.program.display()).into());
            }
        }
    }
    drop(sender);
    let failed = watch(&ranks, &events, &interrupted, &store);
    let tails: Vec<Vec<String>> = ranks.into_iter().map(Rank::finish).collect();
    match failed {
        None => Ok(ExitCode::SUCCESS),
        Some((rank, status)) => Err(describe(rank, status, &tails[rank], &store).into()),
    }
}

/// Waits for all ranks; returns the first that failed.
fn watch(
    ranks: &[Rank],
    events: &Receiver<(usize, ExitStatus)>,
    interrupted: &AtomicBool,
    store: &StoreServer,
) -> Option<(usize, ExitStatus)> {
    let mut failed = None;
    let mut running = ranks.len();
    let mut kill_at: Option<Instant> = None;
    let mut forwarded = false;
    while running > 0 {
        match events.recv_timeout(TICK) {
            Ok((rank, status)) => {
                running -= 1;
                let first = store.first_failure().and_then(|(rank, _)| rank);
                if !status.success() && failed.is_some() && first == Some(rank) {
                    // Others may end faster than the one that failed first is found dead.
                    failed = Some((rank, status));
                }
                if !status.success() && failed.is_none() {
                    failed = Some((rank, status));
                    // It may have ended without a word to the others.
                    store.abort(Some(rank), &format!("rank {rank} {}", how(status)));
                    kill_at = Some(Instant::now() + GRACE_AFTER_FAILURE);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if !forwarded && interrupted.load(Ordering::Relaxed) {
            forwarded = true;
            kill_at.get_or_insert(Instant::now() + GRACE_AFTER_SIGNAL);
            ranks.iter().for_each(|rank| rank.signal(Signal::Terminate));
        }
        if kill_at.is_some_and(|at| Instant::now() >= at) {
            kill_at = Some(Instant::now() + GRACE_AFTER_FAILURE);
            ranks.iter().for_each(|rank| rank.signal(Signal::Kill));
        }
    }
    failed
}

fn describe(rank: usize, status: ExitStatus, tail: &[String], store: &StoreServer) -> String {
    let mut text = format!("rank {rank} {}", how(status));
    let said: Vec<&String> = tail.iter().filter(|line| !line.trim().is_empty()).collect();
    if said.is_empty() {
        // Its output went straight to the terminal; the job's store knows why it gave up.
        if let Some((_, reason)) = store.first_failure().filter(|(_, reason)| *reason != text) {
            text.push_str(": ");
            text.push_str(&reason);
        }
    } else {
        text.push_str("; it said last:");
        for line in said {
            text.push_str("\n  ");
            text.push_str(line);
        }
    }
    text
}

#[cfg(unix)]
fn how(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.signal(), status.code()) {
        (Some(9), _) => "was killed (signal 9)".into(),
        (Some(signal), _) => format!("was ended by signal {signal}"),
        (None, Some(code)) => format!("failed with exit code {code}"),
        (None, None) => "failed".into(),
    }
}

#[cfg(not(unix))]
fn how(status: ExitStatus) -> String {
    format!("failed ({status})")
}

#[derive(Clone, Copy)]
enum Signal {
    Terminate,
    Kill,
}

/// A running rank.
struct Rank {
    /// Its process id, until it has been waited for.
    pid: Arc<Mutex<Option<u32>>>,
    threads: Vec<JoinHandle<()>>,
    tail: Arc<Mutex<VecDeque<String>>>,
}

impl Rank {
    fn start(
        job: &Job,
        rank: usize,
        store: &StoreServer,
        security: &Security,
        sender: &Sender<(usize, ExitStatus)>,
    ) -> std::io::Result<Self> {
        let mut command = Command::new(&job.program);
        command.args(&job.arguments).stdin(Stdio::null());
        let address = store.addr();
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", job.workers.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("LOCAL_WORLD_SIZE", job.workers.to_string()),
            ("MASTER_ADDR", address.ip().to_string()),
            ("MASTER_PORT", address.port().to_string()),
            ("REGATTA_STORE", address.to_string()),
            (THREADS, job.threads.to_string()),
        ];
        command.envs(variables);
        if let Some(secret) = &security.secret {
            command.env("REGATTA_SECRET", secret.to_text());
        }
        if let Some(transport) = job.transport {
            command.env("REGATTA_TRANSPORT", transport.to_string());
        }
        command.envs(job.environment.iter().map(|(key, value)| (key, value)));
        let own = job.lead_owns_terminal && rank == 0;
        if !own {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn()?;
        crate::cores::bind(child.id(), rank, job.workers, job.threads);
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let mut readers = vec![];
        if let Some(out) = child.stdout.take() {
            readers.push(forward(rank, out, std::io::stdout(), None));
        }
        if let Some(err) = child.stderr.take() {
            readers.push(forward(rank, err, std::io::stderr(), Some(tail.clone())));
        }
        let pid = Arc::new(Mutex::new(Some(child.id())));
        let waiter = wait(rank, child, pid.clone(), readers, sender.clone());
        Ok(Self { pid, threads: vec![waiter], tail })
    }

    fn signal(&self, signal: Signal) {
        let pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        // The lock is held, so the process has not been reaped and the id is still its own.
        if let Some(pid) = *pid {
            send(pid, signal);
        }
    }

    fn finish(self) -> Vec<String> {
        for thread in self.threads {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
        std::mem::take(&mut *self.tail.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

#[cfg(target_os = "linux")]
fn send(pid: u32, signal: Signal) {
    use rustix::process::{Pid, Signal as Unix, kill_process};
    let signal = match signal {
        Signal::Terminate => Unix::TERM,
        Signal::Kill => Unix::KILL,
    };
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

#[cfg(all(unix, not(target_os = "linux")))]
fn send(pid: u32, signal: Signal) {
    let name = match signal {
        Signal::Terminate => "-TERM",
        Signal::Kill => "-KILL",
    };
    // It may have ended by itself.
    let _ = Command::new("kill").args([name, &pid.to_string()]).status();
}

/// Reports the end of a rank once its output has been passed on.
fn wait(
    rank: usize,
    mut child: Child,
    pid: Arc<Mutex<Option<u32>>>,
    readers: Vec<JoinHandle<()>>,
    sender: Sender<(usize, ExitStatus)>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let status = loop {
            {
                let mut pid = pid.lock().unwrap_or_else(PoisonError::into_inner);
                match child.try_wait() {
                    Ok(None) => {}
                    Ok(Some(status)) => {
                        *pid = None;
                        break status;
                    }
                    Err(_) => {
                        *pid = None;
                        return;
                    }
                }
            }
            // Polling keeps the id valid for `signal`: a process is reaped only under the lock.
            std::thread::sleep(Duration::from_millis(5));
        };
        // The launcher may have stopped listening.
        let _ = sender.send((rank, status));
        for reader in readers {
            let _ = reader.join();
        }
    })
}

/// Passes lines on with the rank before them.
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
            // Our own output may be closed (a pager that ended): go on reading, so that the rank is not blocked.
            let _ = writeln!(to, "[{rank}] {line}");
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
