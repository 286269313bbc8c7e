//! The launcher: how the ends of ranks are told, what is left running, which exit codes come out.

#![cfg(target_os = "linux")]

mod common;
mod terminal;

use common::{Place, fail, losses, pid_of, said, signal, succeed, until};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use terminal::{CTRL_BACKSLASH, Terminal, processes_with};

const LONG: [&str; 4] = ["--workers", "2", "--steps", "100000"];
/// Far below the `sleep 300` of what must not be waited for, far above what a stalled machine takes.
const SOON: Duration = Duration::from_secs(100);

fn piped(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Ends what a failed test leaves behind.
struct Marked(String);

impl Marked {
    fn new(name: &str) -> Self {
        Self(format!("REGATTA_TEST_RUN={name}-{}", std::process::id()))
    }

    fn mark(&self, command: &mut Command) {
        let (key, value) = self.0.split_once('=').unwrap();
        command.env(key, value);
    }

    fn is_gone(&self) -> bool {
        processes_with(&self.0).is_empty()
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        for process in processes_with(&self.0) {
            let _ = Command::new("kill").args(["-KILL", &process.pid.to_string()]).status();
        }
    }
}

/// Runs a launch to its end, which comes long before that of what it has started.
fn launch(place: &Place, marked: &Marked, workers: &str, script: &str) -> Output {
    let begun = Instant::now();
    let mut command = place.regatta(&["launch", "-n", workers, "--", "bash", "-c", script]);
    marked.mark(&mut command);
    let output = piped(&mut command).wait_with_output().unwrap();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    until("all that it started to end", || marked.is_gone());
    output
}

#[test]
fn a_child_that_holds_the_pipe_delays_nothing() {
    let place = Place::new();
    let marked = Marked::new("pipe");
    let output = launch(&place, &marked, "2", "sleep 300 & exit 3");
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("failed with exit code 3"), "{}", said(&output));
    // Nor does it where all went well.
    let output = launch(&place, &marked, "2", "sleep 300 & echo done");
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("[1] done"), "{}", said(&output));
    // One that has left the group and the session is not ours to end; it is not waited for either.
    let output = launch_leaving(&place, "setsid sleep 300 & exit 3");
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
}

fn launch_leaving(place: &Place, script: &str) -> Output {
    let marked = Marked::new("left");
    let begun = Instant::now();
    let mut command = place.regatta(&["launch", "-n", "1", "--", "bash", "-c", script]);
    marked.mark(&mut command);
    let output = piped(&mut command).wait_with_output().unwrap();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    output
}

#[test]
fn a_ranks_exit_code_is_the_launchers() {
    let place = Place::new();
    let marked = Marked::new("code");
    for (script, code) in [("exit 7", 7), ("exit 0", 0), ("kill -SEGV $$", 139), ("exit 255", 255)] {
        let output = launch(&place, &marked, "2", script);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", said(&output));
    }
}

#[test]
fn a_signal_ends_ranks_with_all_that_they_started() {
    let place = Place::new();
    for (name, code) in [("-TERM", 143), ("-INT", 130), ("-HUP", 129), ("-QUIT", 131)] {
        let marked = Marked::new(&format!("tree{name}"));
        let script = "sleep 300 & touch started-$RANK; wait";
        let mut command = place.regatta(&["launch", "-n", "2", "--", "sh", "-c", script]);
        marked.mark(&mut command);
        let begun = Instant::now();
        let child = piped(&mut command);
        let started = ["started-0", "started-1"].map(|name| place.path(name));
        until("both ranks", || started.iter().all(|file| file.exists()));
        signal(name, child.id());
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(!said(&output).contains("error"), "{}", said(&output));
        until("all that it started to end", || marked.is_gone());
        started.iter().for_each(|file| fs::remove_file(file).unwrap());
    }
}

#[test]
fn a_second_signal_ends_ranks_that_do_not_listen() {
    let place = Place::new();
    let marked = Marked::new("deaf");
    let script = "trap 'touch heard' TERM; touch started; while true; do sleep 300 & wait; done";
    let mut command = place.regatta(&["launch", "-n", "1", "--", "bash", "-c", script]);
    marked.mark(&mut command);
    let begun = Instant::now();
    let child = piped(&mut command);
    until("the rank", || place.path("started").exists());
    signal("-TERM", child.id());
    until("the rank to hear it", || place.path("heard").exists());
    // Signals within a second of the first are copies of it.
    std::thread::sleep(Duration::from_millis(1100));
    signal("-TERM", child.id());
    let output = child.wait_with_output().unwrap();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(output.status.code(), Some(143), "{}", said(&output));
    until("all that it started to end", || marked.is_gone());
}

#[test]
fn ranks_end_with_a_launcher_that_was_killed() {
    let place = Place::new();
    let marked = Marked::new("orphans");
    let script = "sleep 300 & touch started-$RANK; wait";
    let mut command = place.regatta(&["launch", "-n", "2", "--", "sh", "-c", script]);
    marked.mark(&mut command);
    // Files, not pipes: what outlives the launcher would hold a pipe.
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("both ranks", || (0..2).all(|rank| place.path(&format!("started-{rank}")).exists()));
    child.kill().unwrap();
    child.wait().unwrap();
    until("all that it started to end", || marked.is_gone());

    let mut command = place.train("run", &LONG);
    marked.mark(&mut command);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("some steps", || lines(&place.path("run/metrics.jsonl")) > 5);
    // Also where a rank is stopped.
    signal("-STOP", pid_of(&child, 1));
    child.kill().unwrap();
    child.wait().unwrap();
    until("all that it started to end", || marked.is_gone());
}

#[test]
fn user_signals_save_and_go_on_or_stop_as_the_key_says() {
    let place = Place::new();
    for (name, number) in [("-USR1", 10), ("-USR2", 12)] {
        let out = format!("save{name}");
        let child = piped(&mut place.train(&out, &LONG));
        let metrics = place.path(&out).join("metrics.jsonl");
        let last = place.path(&out).join("checkpoints/last");
        until("some steps", || lines(&metrics) > 5);
        signal(name, child.id());
        until("a checkpoint", || last.exists());
        let before = lines(&metrics);
        until("more steps", || lines(&metrics) > before + 5);
        // Under any other launcher it is a rank that gets the signal.
        let saved = fs::read_to_string(&last).unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        signal(name, pid_of(&child, 1));
        until("another checkpoint", || fs::read_to_string(&last).is_ok_and(|now| now != saved));
        signal("-TERM", child.id());
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));

        let out = format!("stop{name}");
        let more = [&LONG[..], &["--set", "train.on_user_signal=\"stop\""]].concat();
        let child = piped(&mut place.train(&out, &more));
        until("some steps", || lines(&place.path(&out).join("metrics.jsonl")) > 5);
        signal(name, child.id());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + number), "{}", said(&output));
        assert_eq!(place.summary(&out)["stopped_by"], number);
        assert!(last.exists());
    }
}

#[test]
fn a_signal_that_comes_twice_at_once_is_one() {
    let place = Place::new();
    // As systemd, Slurm and container runtimes do: to the launcher and to each rank; and as `timeout` does: twice.
    let child = piped(&mut place.train("all", &LONG));
    until("some steps", || lines(&place.path("all/metrics.jsonl")) > 5);
    let pids = [child.id(), pid_of(&child, 0), pid_of(&child, 1), child.id()].map(|pid| pid.to_string());
    let kill = Command::new("kill").arg("-TERM").args(&pids).args(&pids[1..3]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", said(&output));
    assert_eq!(place.summary("all")["interrupted"], true);
    // In one process, too.
    for workers in [&["--workers", "1"][..], &["--workers", "2", "--transport", "thread"]] {
        let out = format!("threads-{}", workers[1]);
        let child = piped(&mut place.train(&out, &[workers, &["--steps", "100000"]].concat()));
        until("some steps", || lines(&place.path(&out).join("metrics.jsonl")) > 5);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid, &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(143), "{}", said(&output));
        assert_eq!(place.summary(&out)["stopped_by"], 15);
    }
}

#[test]
fn what_nohup_ignores_stays_ignored() {
    let place = Place::new();
    let train = place.train("run", &["--workers", "2", "--steps", "300"]);
    let mut command = Command::new("nohup");
    command.arg(train.get_program()).args(train.get_args()).current_dir(train.get_current_dir().unwrap());
    for (key, _) in train.get_envs() {
        command.env_remove(key);
    }
    let child = piped(&mut command);
    until("some steps", || lines(&place.path("run/metrics.jsonl")) > 5);
    signal("-HUP", child.id());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(place.summary("run")["steps"], 300);
}

#[test]
fn a_terminal_that_stops_background_output_does_not_stop_the_run() {
    let place = Place::new();
    let Some(mut terminal) = Terminal::open(&place) else { return };
    let marked = Marked::new("tostop");
    terminal.run("stty tostop");
    let train = "train small.toml --set data.path=text.txt --workers 2 --out run";
    terminal.type_line(&format!("{} {} {train}", marked.0, common::in_shell()));
    assert_eq!(terminal.exit_code(), 0, "{}", terminal.screen());
    assert!(terminal.screen().contains("12 steps: training loss"), "{}", terminal.screen());
    // The key that makes a core of other programs.
    terminal.type_line(&format!("{} {} {train}-2 --steps 100000", marked.0, common::in_shell()));
    until("some steps", || lines(&place.path("run-2/metrics.jsonl")) > 5);
    terminal.press(CTRL_BACKSLASH);
    assert_eq!(terminal.exit_code(), 131, "{}", terminal.screen());
    assert_eq!(place.summary("run-2")["interrupted"], true);
    assert!(marked.is_gone());
}

#[test]
fn a_failed_start_is_told_once() {
    let place = Place::new();
    // Only ranks can find out: the launcher sees a folder that is fine.
    let error = fail(&mut place.train("run", &["--workers", "2", "--resume"]));
    let told = |text: &str| error.matches(text).count();
    assert_eq!(told("error:"), 1, "{error}");
    assert_eq!(told("there is no checkpoint to resume from"), 1, "{error}");
    // Neither does a loss that overflows come from each rank.
    let error = fail(&mut place.train(
        "overflow",
        &[
            "--workers",
            "2",
            "--set",
            "optimizer.kind=sgd",
            "--set",
            "optimizer.lr=1e6",
            "--set",
            "optimizer.clip=0",
        ],
    ));
    assert_eq!(error.matches("error:").count(), 1, "{error}");
    assert_eq!(error.matches("the loss is").count(), 1, "{error}");
}

#[test]
fn a_run_that_a_signal_stopped_goes_on_with_the_same_bits() {
    let place = Place::new();
    let child = piped(&mut place.train("run", &LONG));
    until("some steps", || lines(&place.path("run/metrics.jsonl")) > 5);
    signal("-HUP", child.id());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(129));
    let steps = (place.summary("run")["steps"].as_u64().unwrap() + 5).to_string();
    succeed(&mut place.train("run", &["--workers", "2", "--resume", "--steps", &steps]));
    succeed(&mut place.train("whole", &["--workers", "2", "--steps", &steps]));
    let (run, whole) = (place.summary("run"), place.summary("whole"));
    assert_eq!((losses(&run), &run["parameter_hash"]), (losses(&whole), &whole["parameter_hash"]));
}
