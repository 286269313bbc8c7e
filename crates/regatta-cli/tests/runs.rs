//! A run's folder, as people use it: whose it is, what is known before and kept after, what is written down.

#![cfg(target_os = "linux")]

mod common;
mod run_folder;

use common::{Place, fail, losses, said, signal, succeed, until};
use run_folder::{start, steps};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A tmpfs that goes when the test does.
struct Disk(PathBuf);

impl Disk {
    fn mount(folder: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&folder).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(&folder).output();
        if !mount.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: mounting a small disk needs root");
            return None;
        }
        Some(Self(folder))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let place = Place::new();
    let long = ["--steps", "100000", "--workers", "2", "--set", "train.checkpoint_every=100000"];
    let mut first = start(&mut place.train("run", &long));
    until("some steps", || {
        fs::read_to_string(place.path("run/metrics.jsonl")).is_ok_and(|text| text.contains("\n"))
    });
    for more in [&["--workers", "1"][..], &["--workers", "2"], &["--resume", "auto"]] {
        let error = fail(&mut place.train("run", more));
        assert!(error.contains("is used by another run (process "), "{error}");
    }
    assert!(first.try_wait().unwrap().is_none(), "the first run has ended");
    signal("-TERM", first.id());
    let output = first.wait_with_output().unwrap();
    assert!(place.path("run/summary.json").exists(), "{}", said(&output));
    // The end of a process gives the folder back, however it ends.
    let killed = start(&mut place.train("killed", &["--steps", "100000", "--workers", "1"]));
    until("a step", || {
        fs::read_to_string(place.path("killed/metrics.jsonl")).is_ok_and(|text| text.contains("\n"))
    });
    signal("-KILL", killed.id());
    killed.wait_with_output().unwrap();
    succeed(&mut place.train("killed", &["--workers", "1"]));
}

#[test]
fn runs_that_begin_at_the_same_moment_have_folders_of_their_own() {
    let place = Place::new();
    let arguments = ["train", "small.toml", "--set", "data.path=text.txt", "--workers"];
    // The data is prepared by one of them.
    let all: Vec<Child> = ["1", "2", "1", "2", "1", "1"]
        .iter()
        .map(|workers| start(&mut place.regatta(&[&arguments[..], &[workers]].concat())))
        .collect();
    for child in all {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    for name in ["small", "small-2", "small-3", "small-4", "small-5", "small-6"] {
        let run = place.path("runs").join(name);
        assert_eq!(lines(&run.join("metrics.jsonl")).len(), 13, "{name}");
        assert!(run.join("summary.json").exists(), "{name}");
    }
    assert_eq!(fs::read_dir(place.path("runs")).unwrap().count(), 6);
    // What cannot begin leaves no folder behind.
    fail(&mut place.regatta(&[&arguments[..], &["1", "--set", "train.batch=100000"]].concat()));
    assert_eq!(fs::read_dir(place.path("runs")).unwrap().count(), 6);
}

#[test]
fn a_file_system_without_locks_is_told_and_used() {
    if !common::have("strace") {
        return;
    }
    let place = Place::new();
    // The data is prepared before, under a lock of its own.
    succeed(&mut place.train("before", &["--workers", "1"]));
    let train = place.train("run", &["--workers", "1"]);
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"]);
    traced.arg(train.get_program()).args(train.get_args()).current_dir(train.get_current_dir().unwrap());
    let output = traced.output().unwrap();
    if said(&output).contains("PTRACE") || said(&output).contains("ptrace") {
        eprintln!("skipped: strace may not trace here");
        return;
    }
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("run cannot be locked (No locks available"), "{}", said(&output));
    assert_eq!(place.summary("run")["steps"], 12);
}

#[test]
fn a_folder_that_a_rank_does_not_share_is_told_before_the_first_step() {
    let place = Place::new();
    succeed(&mut place.train("before", &["--workers", "1"]));
    fs::create_dir(place.path("shared")).unwrap();
    for (mount, wanted) in [
        ("mount -t tmpfs tmpfs shared", "does not see the files of rank 0 in"),
        ("mount --bind shared shared && mount -o remount,bind,ro shared", "cannot write"),
    ] {
        if !unshared(&place, mount, wanted) {
            eprintln!("skipped: mount namespaces need root");
            return;
        }
    }
}

/// Two ranks, of which one sees another file system in the place of the folder, as a host that mounts it otherwise. Whether
/// this could be tried.
fn unshared(place: &Place, mount: &str, wanted: &str) -> bool {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: usize, before: &str| {
        let train = place.train("shared/run", &["--transport", "tcp"]);
        let mut command = Command::new("unshare");
        let script = format!("{before}; exec \"$0\" \"$@\"");
        command.args(["--mount", "sh", "-c", &script]).arg(train.get_program()).args(train.get_args());
        command.current_dir(train.get_current_dir().unwrap());
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        start(&mut command)
    };
    let ranks = [rank(0, "true"), rank(1, mount)];
    let outputs: Vec<Output> = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect();
    if said(&outputs[0]).contains("unshare:") || said(&outputs[1]).contains("mount:") {
        return false;
    }
    for output in &outputs {
        assert_eq!(output.status.code(), Some(1), "{}", said(output));
        let said = said(output);
        assert!(said.contains("rank 1 on ") && said.contains(wanted), "{said}");
        assert!(said.contains("give --out a folder there"), "{said}");
    }
    assert!(!place.path("shared/run/metrics.jsonl").exists(), "a step was done");
    true
}

#[test]
fn what_can_be_known_before_is_told_before_the_first_step() {
    let place = Place::new();
    for workers in ["1", "2"] {
        for (more, wanted) in [
            (["--set", "sample.prompt=ä line"], "sample.prompt"),
            (["--trace", "none/trace.json"], "cannot write the trace none/trace.json"),
            (["--set", "train.checkpoint_url=file:///proc/none"], "/proc/none"),
        ] {
            let error = fail(&mut place.train("run", &[&["--workers", workers], &more[..]].concat()));
            assert!(error.contains(wanted), "{error}");
            // Where ranks have met, what they did last may stay for whoever looks for the reason.
            assert!(!place.path("run/checkpoints").exists() && !place.path("run/metrics.jsonl").exists());
            assert!(workers == "2" || !place.path("run").exists(), "{more:?} left something");
        }
    }
    fs::write(place.path("file"), "").unwrap();
    let error = fail(&mut place.train("file", &[]));
    assert!(error.contains("cannot create the run's folder file"), "{error}");
}

#[test]
fn what_fails_after_training_costs_no_summary() {
    let place = Place::new();
    let Some(disk) = Disk::mount(place.path("disk"), "size=200k") else { return };
    for workers in ["1", "2"] {
        let out = format!("full-{workers}");
        let url = format!("train.checkpoint_url=file://{}/{workers}", disk.0.display());
        let error = fail(&mut place.train(&out, &["--workers", workers, "--set", &url]));
        assert!(
            error.contains("could not be written") && error.contains("the summary was written"),
            "{error}"
        );
        let summary = place.summary(&out);
        assert_eq!((summary["steps"].as_u64(), losses(&summary).len()), (Some(12), 12));
        assert!(summary["val_loss"].is_f64() && summary["parameter_hash"].as_str().unwrap().len() == 16);
    }
}

#[test]
fn a_validation_loss_that_is_not_finite_costs_no_checkpoint() {
    let place = Place::new();
    // A learning rate that leaps up takes the last step's parameters beyond all numbers, when no one evaluates before.
    let leap =
        ["--set", "optimizer.constant=false", "--set", "optimizer.lr=1e-3", "--set", "optimizer.min_lr=1e6"];
    let more = [
        &leap[..],
        &[
            "--set",
            "optimizer.weight_decay=1e6",
            "--set",
            "optimizer.decay_steps=2",
            "--set",
            "optimizer.clip=0",
        ],
        &["--steps", "2", "--set", "train.checkpoint_every=1"],
    ]
    .concat();
    for workers in ["1", "2"] {
        let out = format!("run-{workers}");
        let output = succeed(&mut place.train(&out, &[&more[..], &["--workers", workers]].concat()));
        assert!(said(&output).contains("no best checkpoint is written"), "{}", said(&output));
        let run = place.path(&out);
        let summary = place.summary(&out);
        assert!(
            ["NaN", "Infinity"].contains(&summary["val_loss"].as_str().unwrap()),
            "{}",
            summary["val_loss"]
        );
        assert!(summary["best_val_loss"].is_null());
        let evaluated =
            lines(&run.join("metrics.jsonl")).into_iter().find(|line| !line["val_loss"].is_null());
        assert_eq!(evaluated.unwrap()["val_loss"], summary["val_loss"]);
        assert!(!run.join("checkpoints/best").exists());
        assert_eq!(steps(&run), [1, 2]);
        // All can be read, and the one before goes on.
        let verified = succeed(&mut place.regatta(&["checkpoint", "verify", &out]));
        assert!(said(&verified).contains("2 checkpoint(s)") && said(&verified).contains(": intact"));
        succeed(&mut place.regatta(&["checkpoint", "inspect", &out]));
        let output = succeed(&mut place.train(&out, &["--resume", "--from", "step-1", "--workers", workers]));
        assert!(said(&output).contains("going back to step 1"), "{}", said(&output));
        assert_eq!(place.summary(&out)["steps"], 12);
        assert!(run.join("checkpoints/best").exists());
    }
}

#[test]
fn metrics_tell_of_all_steps_and_have_the_same_keys() {
    let place = Place::new();
    let more =
        ["--workers", "2", "--steps", "40", "--set", "train.log_every=10", "--set", "train.eval_every=20"];
    succeed(&mut place.train("run", &more));
    let all = lines(&place.path("run/metrics.jsonl"));
    let keys = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    assert!(all.iter().all(|line| keys(line) == keys(&all[0])));
    let trained: Vec<&Value> = all.iter().filter(|line| !line["loss"].is_null()).collect();
    let evaluated: Vec<&Value> = all.iter().filter(|line| !line["val_loss"].is_null()).collect();
    let at = |lines: &[&Value]| lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((at(&trained), at(&evaluated)), (vec![1, 10, 20, 30, 40], vec![20, 40]));
    // Means and the largest of the steps since the line before.
    let losses = losses(&place.summary("run"));
    for pair in trained.windows(2) {
        let steps = pair[0]["step"].as_u64().unwrap() as usize..pair[1]["step"].as_u64().unwrap() as usize;
        let of = &losses[steps];
        let (mean, max) = (of.iter().sum::<f64>() / of.len() as f64, of.iter().copied().fold(0.0, f64::max));
        let close = |key: &str, wanted: f64| (pair[1][key].as_f64().unwrap() - wanted).abs() < 1e-12 * wanted;
        assert!(close("loss", mean) && close("loss_max", max), "{}", pair[1]);
        assert!(pair[1]["step_ms_max"].as_f64() >= pair[1]["step_ms"].as_f64());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let (mut time, mut epochs) = (now - 600.0, 0.0);
    for line in &all {
        assert_eq!(line["tokens"], line["step"].as_u64().unwrap() * 8 * 16);
        let of = |key: &str| line[key].as_f64().unwrap();
        assert!(
            of("time") >= time && of("time") <= now && of("elapsed_s") > 0.0 && of("epochs") >= epochs,
            "{line}"
        );
        (time, epochs) = (of("time"), of("epochs"));
        assert_eq!(line["skipped_steps"], 0);
    }
    assert!(epochs > 0.0);
    let summary = place.summary("run");
    assert_eq!(summary["version"], env!("CARGO_PKG_VERSION"));
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(summary["hosts"], serde_json::json!([host.trim(), host.trim()]));
    let started = summary["started"].as_str().unwrap();
    assert!(started.starts_with("20") && started.ends_with('Z'), "{started}");
}

#[test]
fn a_stall_leaves_a_trace_in_the_metrics() {
    let place = Place::new();
    let more = ["--workers", "1", "--steps", "4000", "--set", "train.log_every=100"];
    let child = start(&mut place.train("run", &more));
    let path = place.path("run/metrics.jsonl");
    until("some lines", || fs::read_to_string(&path).is_ok_and(|text| text.lines().count() > 3));
    signal("-STOP", child.id());
    // The stall itself.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    signal("-CONT", child.id());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let most = lines(&path).iter().filter_map(|line| line["step_ms_max"].as_f64()).fold(0.0, f64::max);
    assert!(most > 1000.0, "the longest step took {most} ms");
}

#[test]
fn a_folder_without_checkpoints_is_told_as_such() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    for arguments in
        [&["generate", "empty"][..], &["checkpoint", "inspect", "empty"], &["checkpoint", "verify", "empty"]]
    {
        let error = fail(&mut place.regatta(arguments));
        assert!(error.contains("there is no complete checkpoint: give the folder of a run"), "{error}");
        assert!(!error.contains("--resume"), "{error}");
    }
    let error = fail(&mut place.train("empty", &["--resume"]));
    assert!(error.contains("leave out --resume, or use --resume auto"), "{error}");
}
