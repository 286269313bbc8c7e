//! Jobs of many ranks that end well, and ranks that die while others end.
#![cfg(target_os = "linux")]

mod common;

use common::{Place, pid_of, said, signal, succeed, until};
use std::process::{Command, Stdio};

/// A measurement of no size, so that the job consists of its beginning and its end.
fn short_job(place: &Place, workers: &str) -> Command {
    let arguments = [
        "bench",
        "collective",
        "--op",
        "all_reduce",
        "--transport",
        "tcp",
        "--sizes",
        "1024",
        "--workers",
        workers,
    ];
    place.regatta(&arguments)
}

#[test]
fn many_ranks_over_tcp_leave_without_a_false_alarm() {
    let place = Place::new();
    for workers in ["16", "32", "64", "32", "64"] {
        let output = succeed(&mut short_job(&place, workers));
        assert!(!said(&output).contains("goodbye"), "{}", said(&output));
    }
}

#[test]
fn many_ranks_train_over_tcp_and_end_well() {
    let place = Place::new();
    let more = ["--workers", "16", "--transport", "tcp", "--steps", "2", "--set", "train.batch=16"];
    succeed(&mut place.train("out", &more));
    assert_eq!(place.summary("out")["steps"], 2);
}

#[test]
fn a_rank_that_is_killed_is_told_of_however_many_there_are() {
    let place = Place::new();
    let steps = "--steps=100000";
    let mut command =
        place.train("out", &["--workers", "12", "--transport", "tcp", steps, "--set", "train.batch=12"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the first step", || {
        std::fs::read_to_string(place.path("out/metrics.jsonl")).is_ok_and(|lines| lines.lines().count() > 1)
    });
    signal("-KILL", pid_of(&child, 7));
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(said(&output).contains("rank 7"), "{}", said(&output));
}
