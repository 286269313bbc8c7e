//! Signals as people and schedulers send them, under each launcher: what they end with, and that a run goes on from its
//! checkpoint with the same bits. `benches/signals.sh` runs the table many times.

#![cfg(target_os = "linux")]

mod common;
mod terminal;

use common::{Place, losses, succeed, until};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use terminal::{CTRL_C, CTRL_Z, Process, Terminal, processes_with};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Launcher {
    Train,
    Launch,
    Torchrun,
    Mpirun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    CtrlC,
    CtrlCTwice,
    Close,
    CtrlZThenFg,
    TermLauncher,
    TermRank,
    TermGroup,
}

use Action::{Close, CtrlC, CtrlCTwice, CtrlZThenFg, TermGroup, TermLauncher, TermRank};
use Launcher::{Launch, Mpirun, Torchrun, Train};

const ACTIONS: [Action; 7] = [CtrlC, CtrlCTwice, Close, CtrlZThenFg, TermLauncher, TermRank, TermGroup];

impl Action {
    fn name(self) -> &'static str {
        match self {
            CtrlC => "Ctrl-C",
            CtrlCTwice => "Ctrl-C twice",
            Close => "terminal closed",
            CtrlZThenFg => "Ctrl-Z, fg",
            TermLauncher => "TERM to launcher",
            TermRank => "TERM to one rank",
            TermGroup => "TERM to group",
        }
    }
}

impl Launcher {
    fn name(self) -> &'static str {
        match self {
            Train => "regatta train",
            Launch => "regatta launch",
            Torchrun => "torchrun",
            Mpirun => "mpirun",
        }
    }

    /// What starts two ranks of `train`; nothing where it is not installed.
    fn command(self, train: &str) -> Option<String> {
        let program = common::in_shell();
        Some(match self {
            Train => format!("{program} {train} --workers 2"),
            Launch => format!("{program} launch -n 2 -- {program} {train}"),
            Torchrun => {
                let folder = torch()?;
                format!("{folder}/torchrun --no-python --nproc-per-node 2 --master-port 0 {program} {train}")
            }
            Mpirun => {
                if !common::have("mpirun") {
                    return None;
                }
                // The default of a second may be too short for a save on a busy machine.
                let patient = "--mca odls_base_sigkill_timeout 3";
                format!("mpirun --allow-run-as-root --oversubscribe {patient} -n 2 {program} {train}")
            }
        })
    }

    /// The exit code that a run ends with which `action` has stopped. Others' launchers have codes of their own.
    fn expected(self, action: Action) -> Option<i32> {
        let ours = matches!(self, Train | Launch);
        match action {
            CtrlC | CtrlCTwice if ours => Some(130),
            TermLauncher | TermRank | TermGroup if ours => Some(143),
            CtrlZThenFg if ours => Some(0),
            _ => None,
        }
    }
}

/// The folder of a Python with torch.
fn torch() -> Option<String> {
    let python = std::env::var("REGATTA_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = "import torch, sys, os; print(os.path.dirname(sys.executable))";
    let output = Command::new(&python).args(["-c", script]).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?.trim().to_string();
    let found = output.status.success() && Path::new(&folder).join("torchrun").exists();
    if !found {
        eprintln!("skipped: {python} has no torchrun");
    }
    found.then_some(folder)
}

/// What became of a run.
struct Outcome {
    /// The launcher's exit code, where a terminal is left that can be asked.
    code: Option<i32>,
    /// `saved`, `ended at once` or `finished`.
    how: &'static str,
    /// Whether going on from the checkpoint gives the undisturbed run's numbers.
    same_bits: bool,
}

/// Runs that were started so far.
static RUNS: AtomicUsize = AtomicUsize::new(0);

/// Steps that go on after a resume, to compare them.
const MORE: usize = 5;

fn run(place: &Place, launcher: Launcher, action: Action, number: usize) -> Option<Outcome> {
    let out = format!("run-{number}");
    // Steps of seconds, so that the second Ctrl-C comes before the first has been answered.
    let slow = action == CtrlCTwice;
    let (batch, steps) = match action {
        CtrlCTwice => ("train.batch=16000 --set train.accumulate=4000 --set train.last_batch=pad", 100),
        CtrlZThenFg => ("train.batch=8", 400),
        _ => ("train.batch=8", 100_000),
    };
    let options = format!("--set data.path=text.txt --set train.eval_batches=1 --set {batch}");
    let every = if slow { 1 } else { 50 };
    let train = format!(
        "train small.toml {options} --set train.checkpoint_every={every} --steps {steps} --out {out}"
    );
    let command = launcher.command(&train)?;
    // Tables run at the same time: none may signal the processes of another.
    let unique = RUNS.fetch_add(1, Ordering::Relaxed);
    let marker = format!("REGATTA_TEST_RUN={}-{unique}", std::process::id());
    let mut terminal = Terminal::open(place)?;
    terminal.type_line(&format!("{marker} {command}"));
    let last = place.path(&out).join("checkpoints/last");
    terminal.until("a checkpoint", |_| last.exists());
    let all = processes_with(&marker);
    let of_rank = |rank: usize| -> &Process {
        let all = all.iter();
        let mut of_rank = all.filter(|process| process.rank() == Some(rank));
        of_rank.next().unwrap_or_else(|| panic!("no rank {rank}"))
    };
    let leader = all.iter().find(|process| process.parent == terminal.shell()).unwrap();
    let code = match action {
        CtrlC => {
            terminal.press(CTRL_C);
            Some(terminal.exit_code())
        }
        CtrlCTwice => {
            terminal.press(CTRL_C);
            match launcher {
                // It tells its ranks later, and what they say later still.
                Mpirun => {
                    terminal.wait_for("^C");
                    until("mpirun to take the key", || !interrupt_is_pending(leader.pid));
                }
                _ => terminal.wait_for("saving and stopping"),
            }
            terminal.press(CTRL_C);
            Some(terminal.exit_code())
        }
        Close => {
            terminal.close();
            None
        }
        CtrlZThenFg => {
            terminal.press(CTRL_Z);
            if matches!(launcher, Train | Launch) {
                terminal.wait_for("Stopped");
            }
            if launcher != Torchrun {
                // torchrun's ranks are in sessions of their own, and go on.
                until("all ranks to stop", || (0..2).all(|rank| state(of_rank(rank).pid) == 'T'));
                // Longer than a step takes by far.
                std::thread::sleep(Duration::from_millis(300));
                assert!((0..2).all(|rank| state(of_rank(rank).pid) == 'T'));
            }
            match launcher {
                // It stops its ranks, but not itself.
                Mpirun => common::signal("-CONT", leader.pid),
                _ => terminal.type_line("fg"),
            }
            Some(terminal.exit_code())
        }
        TermLauncher => {
            common::signal("-TERM", leader.pid);
            Some(terminal.exit_code())
        }
        TermRank => {
            common::signal("-TERM", of_rank(1).pid);
            Some(terminal.exit_code())
        }
        TermGroup => {
            let group = format!("-{}", leader.group);
            assert!(Command::new("kill").args(["-TERM", "--", &group]).status().unwrap().success());
            Some(terminal.exit_code())
        }
    };
    until("all processes to end", || processes_with(&marker).is_empty());
    let summary = fs::read(place.path(&out).join("summary.json")).ok();
    let summary: Option<serde_json::Value> = summary.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let how = match &summary {
        None => "ended at once",
        Some(summary) if summary["interrupted"] == true => "saved",
        Some(_) => "finished",
    };
    let last = fs::read_to_string(last).unwrap();
    let done: usize = last.trim_start_matches("step-").parse().unwrap();
    if let Some(summary) = &summary {
        assert_eq!(summary["steps"], done);
    }
    let steps = (done + if slow { 1 } else { MORE }).to_string();
    let arguments = |out: &str| -> Vec<String> {
        let words = format!("train small.toml {options} --workers 2 --steps {steps} --out {out}");
        words.split_whitespace().map(String::from).collect()
    };
    let whole = format!("whole-{number}");
    let [resumed, whole] = [(&out, &["--resume"][..]), (&whole, &[])].map(|(out, more)| {
        let arguments = arguments(out);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        succeed(&mut place.regatta(&arguments));
        place.summary(out)
    });
    let same_bits =
        losses(&resumed) == losses(&whole) && resumed["parameter_hash"] == whole["parameter_hash"];
    Some(Outcome { code, how, same_bits })
}

/// Whether SIGINT has been sent to a process that has not taken it yet.
fn interrupt_is_pending(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let masks = status.lines().filter_map(|line| Some(line.split_once("Pnd:")?.1));
    let mut masks = masks.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    masks.any(|mask| mask & (1 << (signal_hook::consts::SIGINT - 1)) != 0)
}

fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim().chars().next().unwrap_or('X')
}

/// Runs each case so many times, prints the table, and returns what is not as promised.
fn table(launcher: Launcher, rounds: usize) -> Vec<String> {
    let mut problems = vec![];
    for action in ACTIONS {
        // For others' launchers see docs/jobs.md: what they give a run that is to be saved.
        let mut counts = BTreeMap::<(String, &str, bool), usize>::new();
        for _ in 0..rounds {
            let place = Place::new();
            let Some(outcome) = run(&place, launcher, action, 0) else { return problems };
            let code = outcome.code.map_or("-".into(), |code| code.to_string());
            let how = match action {
                // torchrun passes the first one on, and waits. mpirun ends alone, and its ranks save.
                CtrlCTwice if matches!(launcher, Torchrun | Mpirun) => "saved",
                CtrlCTwice => "ended at once",
                CtrlZThenFg => "finished",
                _ => "saved",
            };
            let right_code = launcher.expected(action).is_none_or(|expected| outcome.code == Some(expected));
            if !(outcome.same_bits && right_code && outcome.how == how) {
                problems.push(format!(
                    "{} under {}: {}, exit code {code}, {}",
                    action.name(),
                    launcher.name(),
                    outcome.how,
                    if outcome.same_bits { "same bits" } else { "other bits" }
                ));
            }
            *counts.entry((code, outcome.how, outcome.same_bits)).or_default() += 1;
        }
        for ((code, how, same_bits), count) in counts {
            let bits = if same_bits { "resumes with the same bits" } else { "RESUMES WITH OTHER BITS" };
            println!(
                "{:<16} {:<18} {count:>3} x  {how:<14} exit code {code:<4} {bits}",
                launcher.name(),
                action.name()
            );
        }
    }
    problems
}

fn rounds() -> usize {
    std::env::var("REGATTA_SIGNALS_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

#[test]
fn signals_under_regatta_train() {
    assert_eq!(table(Train, rounds()), Vec::<String>::new());
}

#[test]
fn signals_under_regatta_launch() {
    assert_eq!(table(Launch, rounds()), Vec::<String>::new());
}

#[test]
fn signals_under_torchrun() {
    assert_eq!(table(Torchrun, rounds()), Vec::<String>::new());
}

#[test]
fn signals_under_mpirun() {
    assert_eq!(table(Mpirun, rounds()), Vec::<String>::new());
}
