//! One trial: starts the job, injects the fault, and records what every rank prints and when.

use crate::{Fault, Trial};
use regatta_comm::rendezvous::{Secret, Security, StoreServer};
use regatta_testkit::{Hosts, Link};
use rustix::process::{Pid, Signal, kill_process};
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// `REGATTA_DEADLINE_S` of all jobs.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// Every survivor must get its error within this time after the fault.
pub const ERROR_LIMIT: Duration = Duration::from_secs(DEADLINE.as_secs() + 3);
/// The longest time until all ranks are ready.
const START_LIMIT: Duration = Duration::from_secs(40);
/// Time after the fault until late processes are ended. It is longer than [`ERROR_LIMIT`], to report how late they
/// are.
const WAIT_LIMIT: Duration = Duration::from_secs(30);
/// The longest time from the end of a process's output to its end.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Shm,
    Tcp,
    /// TCP between this many hosts.
    Hosts(usize),
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shm => f.write_str("shm"),
            Self::Tcp => f.write_str("tcp"),
            Self::Hosts(hosts) => write!(f, "tcp/{hosts} hosts"),
        }
    }
}

/// What was recorded of one rank.
#[derive(Debug, Default)]
pub struct RankRecord {
    /// Its error, and how many seconds after the fault it came (negative: before).
    pub error: Option<(f64, String)>,
    /// All other lines that it printed, except `ready` and `mismatch`.
    pub rest: Vec<String>,
    /// How many seconds after the fault its process ended by itself.
    pub ended: Option<f64>,
}

/// What was recorded of a trial.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Why the fault was not injected, if it was not.
    pub not_started: Option<String>,
    pub ranks: Vec<RankRecord>,
    /// Processes, shared memory and namespaces that the trial left behind.
    pub leaked: Vec<String>,
}

/// A process that is killed and waited for when this is dropped.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        // This fails if the process has already ended.
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A rank, a time, and a line that the rank printed then, or `None` at the end of its output.
type Line = (usize, Instant, Option<String>);

/// Sends the lines of `output` to `lines`, from a new thread.
fn read_lines(rank: usize, output: impl std::io::Read + Send + 'static, lines: Sender<Line>) {
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if lines.send((rank, Instant::now(), Some(line))).is_err() {
                return;
            }
        }
        // This fails if the trial has been aborted.
        let _ = lines.send((rank, Instant::now(), None));
    });
}

/// The store of a job, which runs while this lives.
enum Store {
    /// In this process.
    Local { _server: StoreServer },
    /// In a process on host 0.
    Remote { _process: Process },
}

/// Starts the store, and returns it with its address.
fn start_store(
    trial: &Trial,
    hosts: Option<&Hosts>,
    mark: &str,
    secret: &Secret,
) -> Result<(Store, String), Box<dyn Error>> {
    let Some(hosts) = hosts else {
        let security = Security { secret: Some(secret.clone()), ..Security::default() };
        let server = StoreServer::start("127.0.0.1:0", trial.world, &security)?;
        let address = server.addr().to_string();
        return Ok((Store::Local { _server: server }, address));
    };
    let child = hosts
        .command(0, std::env::current_exe()?)
        .env("CHAOS_ROLE", "store")
        .env("REGATTA_SECRET", secret.to_text())
        .env("CHAOS_TRIAL", mark)
        .env("WORLD_SIZE", trial.world.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut process = Process(child);
    let output = process.0.stdout.take().ok_or("the store has no output")?;
    let address = BufReader::new(output).lines().next().ok_or("the store ended")??;
    Ok((Store::Remote { _process: process }, address))
}

/// Runs `trial`.
pub fn run(trial: &Trial) -> Result<Outcome, Box<dyn Error>> {
    let mark = format!("{}-{}", std::process::id(), trial.seed);
    let hosts = match trial.transport {
        Transport::Hosts(count) => Some(Hosts::new(count, &Link::default())?),
        _ => None,
    };
    let secret = Secret::random()?;
    let (store, address) = start_store(trial, hosts.as_ref(), &mark, &secret)?;
    let program = std::env::current_exe()?;
    let (sender, lines) = channel();
    let mut processes = vec![];
    for rank in 0..trial.world {
        let mut command = match &hosts {
            Some(hosts) => hosts.command(trial.host(rank), &program),
            None => Command::new(&program),
        };
        let transport = match trial.transport {
            Transport::Shm => "shm",
            // With half of the seeds, the ranks of a host communicate over shared memory.
            Transport::Hosts(_) if trial.seed.is_multiple_of(2) => "mixed",
            _ => "tcp",
        };
        command
            .env("CHAOS_ROLE", "rank")
            .env("CHAOS_TRIAL", &mark)
            .env("CHAOS_SEED", trial.seed.to_string())
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", trial.world.to_string())
            .env("REGATTA_STORE", &address)
            .env("REGATTA_TRANSPORT", transport)
            .env("REGATTA_SECRET", secret.to_text())
            .env("REGATTA_DEADLINE_S", DEADLINE.as_secs().to_string())
            // No warnings, because every line other than the error is counted as a problem.
            .env("REGATTA_WARN_S", "1000")
            .env("REGATTA_TRACE", "off")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if trial.fault == Fault::Mismatch && rank == trial.victim {
            command.env("CHAOS_MISMATCH", trial.operation.to_string());
        }
        let mut process = Process(command.spawn()?);
        read_lines(rank, process.0.stdout.take().ok_or("no output")?, sender.clone());
        // Lines on standard error (such as a panic) are recorded too, but the end of standard error is not.
        let (error_sender, error_lines) = channel();
        read_lines(rank, process.0.stderr.take().ok_or("no output")?, error_sender);
        let sender = sender.clone();
        std::thread::spawn(move || {
            error_lines.iter().filter(|line| line.2.is_some()).try_for_each(|line| sender.send(line))
        });
        processes.push(process);
    }
    let outcome = observe(trial, hosts.as_ref(), &mut processes, &lines);
    let pids: Vec<u32> = processes.iter().map(|process| process.0.id()).collect();
    drop((processes, store, hosts));
    Ok(Outcome { leaked: leaked(&mark, &pids), ..outcome })
}

/// Waits until all ranks are ready, injects the fault, and records everything until the ranks end.
fn observe(
    trial: &Trial,
    hosts: Option<&Hosts>,
    processes: &mut [Process],
    lines: &Receiver<Line>,
) -> Outcome {
    let mut outcome = Outcome::default();
    outcome.ranks.resize_with(trial.world, RankRecord::default);
    // Lines are collected before the time of the fault is known.
    let mut printed: Vec<Line> = vec![];
    let mut ready = 0;
    let mut fault = None;
    let mut fault_due = None;
    let began = Instant::now();
    while fault.is_none() {
        let until = fault_due.unwrap_or(began + START_LIMIT);
        match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok((_, at, Some(line))) if line == "ready" => {
                ready += 1;
                if ready == trial.world && trial.fault != Fault::Mismatch {
                    fault_due = Some(at + trial.after);
                }
            }
            Ok((_, _, Some(line))) if line == "mismatch" => {
                fault = Some(Instant::now());
                inject(trial, hosts, processes);
            }
            Ok(line) => {
                let ended = line.2.is_none();
                printed.push(line);
                if ended {
                    outcome.not_started = Some("a rank ended before the fault".into());
                    break;
                }
            }
            Err(RecvTimeoutError::Timeout) if fault_due.is_some() => {
                fault = Some(Instant::now());
                inject(trial, hosts, processes);
            }
            Err(_) => {
                outcome.not_started =
                    Some(format!("{ready} of {} ranks were ready in {START_LIMIT:?}", trial.world));
                break;
            }
        }
    }
    let zero = fault.unwrap_or_else(Instant::now);
    // All survivors end by themselves, so their outputs end too.
    let stopped = (trial.fault == Fault::Stop).then_some(trial.victim);
    let mut open: Vec<usize> = (0..trial.world)
        .filter(|&rank| Some(rank) != stopped || fault.is_none())
        .filter(|&rank| !printed.iter().any(|line| line.0 == rank && line.2.is_none()))
        .collect();
    while !open.is_empty() {
        let left = (zero + WAIT_LIMIT).saturating_duration_since(Instant::now());
        let Ok(line) = lines.recv_timeout(left) else { break };
        if line.2.is_none() {
            open.retain(|&rank| rank != line.0);
        }
        printed.push(line);
    }
    // A process may still run for a moment after it has closed its output.
    for (rank, process) in processes.iter_mut().enumerate() {
        let until = Instant::now() + EXIT_LIMIT;
        while Some(rank) != stopped && !open.contains(&rank) && Instant::now() < until {
            if let Ok(Some(_)) = process.0.try_wait() {
                outcome.ranks[rank].ended = Some(zero.elapsed().as_secs_f64());
                break;
            }
            std::thread::yield_now();
        }
        if Some(rank) == stopped {
            process.signal(Signal::KILL);
        }
    }
    printed.extend(lines.try_iter());
    for (rank, at, line) in printed {
        let Some(line) = line else { continue };
        let seen = &mut outcome.ranks[rank];
        let after = match at.checked_duration_since(zero) {
            Some(after) => after.as_secs_f64(),
            None => -zero.duration_since(at).as_secs_f64(),
        };
        match line.strip_prefix("error: ") {
            Some(text) if seen.error.is_none() => seen.error = Some((after, text.into())),
            // `ready` may be read after the fault, because the reading thread is late.
            None if line == "ready" => {}
            _ => seen.rest.push(line),
        }
    }
    outcome
}

/// Injects the fault.
fn inject(trial: &Trial, hosts: Option<&Hosts>, processes: &mut [Process]) {
    match trial.fault {
        Fault::Kill => processes[trial.victim].signal(Signal::KILL),
        Fault::Stop => processes[trial.victim].signal(Signal::STOP),
        Fault::Cut => hosts.into_iter().for_each(|hosts| hosts.cut(trial.victim)),
        // The victim waits for a line before its mismatched call. If it has ended, that is recorded elsewhere.
        Fault::Mismatch => {
            drop(processes[trial.victim].0.stdin.take().map(|mut input| input.write_all(b"\n")))
        }
    }
}

/// What the trial left behind: processes that have its mark in their environment, shared memory of its processes, and
/// namespaces.
fn leaked(mark: &str, pids: &[u32]) -> Vec<String> {
    let mark = format!("CHAOS_TRIAL={mark}");
    let names = |folder: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let marked = |pid: &String| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let processes = names("/proc").into_iter().filter(marked).map(|pid| format!("process {pid}"));
    let of_trial = |name: &String| pids.iter().any(|pid| name.starts_with(&format!("regatta-shm-{pid}-")));
    let segments = names("/dev/shm").into_iter().filter(of_trial).map(|name| format!("/dev/shm/{name}"));
    let namespaces = names("/run/netns")
        .into_iter()
        .filter(|name| name.starts_with(&format!("regatta-{}-", std::process::id())))
        .map(|name| format!("namespace {name}"));
    processes.chain(segments).chain(namespaces).collect()
}
