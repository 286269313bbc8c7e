//! Jobs of real processes: killed, stopped and started by the launchers that clusters have.

#![cfg(target_os = "linux")]

mod common;

use common::{Place, fail, have, losses, pid_of, said, signal, succeed, until};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LONG: [&str; 6] = ["--workers", "2", "--steps", "4000", "--set", "train.checkpoint_every=50"];

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_killed_worker_ends_the_job_and_resuming_gives_the_undisturbed_run() {
    let place = Place::new();
    for (transport, victim) in [("shm", 1), ("tcp", 1), ("shm", 0)] {
        let out = format!("{transport}-{victim}");
        // A death that was not noticed would cost the deadline.
        let more = [&LONG[..], &["--transport", transport, "--set", "parallel.deadline_s=600"]].concat();
        let child = place.train(&out, &more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let last = place.path(&out).join("checkpoints/last");
        until("a checkpoint", || last.exists());
        signal("-KILL", pid_of(&child, victim));
        let begun = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        assert!(!output.status.success());
        let end: Vec<String> = said(&output).lines().rev().take(3).map(String::from).collect();
        assert!(end.iter().any(|line| line.contains(&format!("rank {victim} was killed"))), "{end:?}");
        let step: usize = fs::read_to_string(&last).unwrap().trim_start_matches("step-").parse().unwrap();
        let steps = (step + 20).to_string();
        let short = ["--workers", "2", "--steps", &steps];
        succeed(&mut place.train(&out, &[&short[..], &["--resume"]].concat()));
        succeed(&mut place.train(&format!("{out}-whole"), &short));
        let (resumed, whole) = (place.summary(&out), place.summary(&format!("{out}-whole")));
        assert_eq!(losses(&resumed), losses(&whole));
        assert_eq!(resumed["parameter_hash"], whole["parameter_hash"]);
    }
}

#[test]
fn a_signal_saves_and_stops() {
    let place = Place::new();
    for (out, name, code) in [("term", "-TERM", 143), ("int", "-INT", 130)] {
        let child = place.train(out, &LONG).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("some steps", || lines(&place.path(out).join("metrics.jsonl")) > 5);
        signal(name, child.id());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains("--resume"), "{}", said(&output));
        let summary = place.summary(out);
        assert_eq!(summary["interrupted"], true);
        let steps = summary["steps"].as_u64().unwrap();
        let last = fs::read_to_string(place.path(out).join("checkpoints/last")).unwrap();
        assert_eq!(last, format!("step-{steps:08}"));
    }
}

#[test]
fn a_stopped_worker_is_named_at_the_deadline() {
    let place = Place::new();
    let more = [&LONG[..], &["--set", "parallel.deadline_s=10"]].concat();
    let child = place.train("run", &more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("some steps", || lines(&place.path("run/metrics.jsonl")) > 5);
    signal("-STOP", pid_of(&child, 1));
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(said(&output).contains("waiting for rank 1"), "{}", said(&output));
}

#[test]
fn a_disk_that_fills_up_costs_a_checkpoint_but_not_the_run() {
    let place = Place::new();
    let disk = place.path("disk");
    fs::create_dir(&disk).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1200k", "tmpfs"]).arg(&disk).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: mounting a small disk needs root");
        return;
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(disk.clone());
    succeed(&mut place.train("disk/run", &["--workers", "2", "--steps", "10"]));
    // Fill what is left.
    let mut filler = fs::File::create(disk.join("filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
    drop(filler);
    let more = ["--workers", "2", "--steps", "30", "--resume", "--set", "train.checkpoint_every=5"];
    let error = fail(&mut place.train("disk/run", &more));
    assert!(error.contains("training continues") && error.contains("No space left"), "{error}");
    let names: Vec<_> = fs::read_dir(disk.join("run/checkpoints"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("tmp")), "{names:?}");
    assert_eq!(fs::read_to_string(disk.join("run/checkpoints/last")).unwrap(), "step-00000010");
    fs::remove_file(disk.join("filler")).unwrap();
    succeed(&mut place.train("disk/run", &more));
    assert_eq!(place.summary("disk/run")["steps"], 30);
}

#[test]
fn mpirun_starts_it_unchanged() {
    if !have("mpirun") {
        return;
    }
    let place = Place::new();
    let train = place.train("mpi", &[]);
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "-n", "2"])
        .arg(train.get_program())
        .args(train.get_args());
    command.current_dir(train.get_current_dir().unwrap());
    succeed(&mut command);
    succeed(&mut place.train("ours", &["--workers", "2"]));
    let (mpi, ours) = (place.summary("mpi"), place.summary("ours"));
    assert_eq!((mpi["world"].as_u64(), &mpi["transport"]), (Some(2), &"shm".into()));
    assert_eq!(losses(&mpi), losses(&ours));
}

#[test]
fn torchruns_variables_start_it_unchanged() {
    let place = Place::new();
    // A port that is free now may be taken by another program the moment after.
    let mut tries = (0..10).map(|_| by_torchruns_variables(&place));
    let outputs = tries.find(|outputs| !outputs.iter().any(|one| said(one).contains("in use")));
    for output in outputs.expect("a port that stays free") {
        assert!(output.status.success(), "{}", said(&output));
    }
    assert_eq!(place.summary("torch")["world"], 2);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut train = place.train("taken", &[]);
    train.env("RANK", "0").env("WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1");
    train.env("MASTER_PORT", taken.local_addr().unwrap().port().to_string());
    assert!(fail(&mut train).contains("in use"));
}

/// A run of two ranks that are told what torchrun tells.
fn by_torchruns_variables(place: &Place) -> Vec<Output> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let ranks: Vec<Child> = (0..2)
        .map(|rank| {
            let mut train = place.train("torch", &[]);
            train.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            train.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
            train.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            train.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect()
}

#[test]
fn launch_prefixes_lines_and_shows_the_failure_last() {
    let place = Place::new();
    let launch = |script: &str| place.regatta(&["launch", "-n", "3", "--", "sh", "-c", script]);
    let output = said(&succeed(&mut launch("echo hello from $RANK of $WORLD_SIZE")));
    for rank in 0..3 {
        assert!(output.contains(&format!("[{rank}] hello from {rank} of 3")), "{output}");
    }
    let begun = Instant::now();
    let output = fail(&mut launch("if [ $RANK = 1 ]; then echo broken >&2; exit 3; fi; exec sleep 1000"));
    assert!(begun.elapsed() < Duration::from_secs(300), "it waited for the ranks that sleep");
    let end: Vec<&str> = output.lines().rev().take(2).collect();
    assert_eq!(end, ["  broken", "error: rank 1 failed with exit code 3; its last output:"]);
    assert!(
        fail(&mut place.regatta(&["launch", "-n", "2", "--", "no-such-program"])).contains("no-such-program")
    );
}
