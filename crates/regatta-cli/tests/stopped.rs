//! Processes that are stopped and go on: Ctrl-Z, `scontrol suspend`, a busy host.
#![cfg(target_os = "linux")]

mod common;

use common::{Place, pid_of, said, signal, until};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A wait in an operation ends after so many seconds here, and processes are stopped for longer.
const DEADLINE_S: &str = "3";
const STOPPED: Duration = Duration::from_secs(5);

fn start(place: &Place, transport: &str) -> Child {
    let deadline = format!("parallel.deadline_s={DEADLINE_S}");
    let more = ["--workers", "3", "--transport", transport, "--steps", "4000", "--set", &deadline];
    let mut command: Command = place.train("out", &[&more[..], &["--set", "train.batch=6"]].concat());
    command.env("REGATTA_DEADLINE_S", DEADLINE_S);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the third step", || steps(place) > 2);
    child
}

fn steps(place: &Place) -> usize {
    std::fs::read_to_string(place.path("out/metrics.jsonl")).map_or(0, |lines| lines.lines().count())
}

/// The launcher, where it is no rank, and the ranks.
fn processes(child: &Child, transport: &str) -> Vec<u32> {
    match transport {
        "thread" => vec![child.id()],
        _ => (0..3).map(|rank| pid_of(child, rank)).chain([child.id()]).collect(),
    }
}

fn end(child: Child, place: &Place) -> Output {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(place.summary("out")["steps"], 4000);
    output
}

/// Sleeps: time that passes is what is tested.
fn pass(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn ranks_that_are_stopped_one_after_the_other_go_on() {
    // In the order in which they were stopped, and the other way round.
    for (transport, turned) in [("tcp", true), ("shm", true), ("tcp", false)] {
        let place = Place::new();
        let child = start(&place, transport);
        let mut processes = processes(&child, transport);
        for &process in &processes {
            signal("-STOP", process);
            pass(Duration::from_millis(300));
        }
        pass(STOPPED);
        if turned {
            processes.reverse();
        }
        for &process in &processes {
            signal("-CONT", process);
            pass(Duration::from_millis(300));
        }
        end(child, &place);
    }
}

#[test]
fn a_job_that_is_stopped_as_a_whole_goes_on() {
    for transport in ["tcp", "shm", "thread"] {
        let place = Place::new();
        let child = start(&place, transport);
        let processes: Vec<String> = processes(&child, transport).iter().map(u32::to_string).collect();
        for name in ["-STOP", "-CONT"] {
            // One call for all, as a terminal does it.
            assert!(Command::new("kill").arg(name).args(&processes).status().unwrap().success());
            pass(if name == "-STOP" { STOPPED } else { Duration::ZERO });
        }
        end(child, &place);
    }
}

#[test]
fn a_rank_that_stays_stopped_is_named() {
    for transport in ["tcp", "shm"] {
        let place = Place::new();
        let child = start(&place, transport);
        let stopped = pid_of(&child, 1);
        signal("-STOP", stopped);
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success());
        let text = said(&output);
        assert!(text.contains("waiting for rank 1"), "{text}");
    }
}
