//! Going on from a checkpoint, as people do: after a restart, from a chosen one, from what is left whole.

#![cfg(target_os = "linux")]

mod common;
mod run_folder;

use common::{Place, fail, losses, said, signal, succeed, until};
use run_folder::{start, steps};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// Changes a byte of a file: of a safetensors file, in the first value behind its head, which is a parameter's.
fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let head = match file.extension().is_some_and(|extension| extension == "safetensors") {
        true => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
        false => 0,
    };
    bytes[head + 2] ^= 64;
    fs::write(file, bytes).unwrap();
}

#[test]
fn resume_auto_begins_and_goes_on() {
    let place = Place::new();
    let more = ["--workers", "2", "--set", "train.checkpoint_every=4", "--resume", "auto"];
    succeed(&mut place.train("run", &[&more[..], &["--steps", "4"]].concat()));
    let output = succeed(&mut place.train("run", &more));
    assert!(said(&output).contains("resuming from run/checkpoints/step-00000004"), "{}", said(&output));
    succeed(&mut place.train("whole", &["--workers", "2"]));
    let (run, whole) = (place.summary("run"), place.summary("whole"));
    assert_eq!(losses(&run), losses(&whole));
    assert_eq!(run["parameter_hash"], whole["parameter_hash"]);
    // Without --out too.
    let arguments =
        ["train", "small.toml", "--set", "data.path=text.txt", "--workers", "1", "--resume", "auto"];
    succeed(&mut place.regatta(&[&arguments[..], &["--steps", "4"]].concat()));
    let output = succeed(&mut place.regatta(&arguments));
    assert!(said(&output).contains("run folder runs/small:"), "{}", said(&output));
    assert_eq!(place.summary("runs/small")["steps"], 12);
    let error = fail(&mut place.train("run", &["--resume", "auto", "--from", "step-4"]));
    assert!(error.contains("every restart would go back"), "{error}");
    let error = fail(&mut place.regatta(&["train", "--resume", "small.toml"]));
    assert!(error.contains("`--resume auto`; the configuration goes before it"), "{error}");
}

#[test]
fn resume_without_a_folder_names_it_or_asks() {
    let place = Place::new();
    let resume = ["train", "small.toml", "--set", "data.path=text.txt", "--workers", "1", "--resume"];
    let error = fail(&mut place.regatta(&resume));
    assert!(error.contains("runs/small: there is no run with a checkpoint"), "{error}");
    let begin = ["train", "small.toml", "--set", "data.path=text.txt", "--workers", "1", "--steps", "4"];
    succeed(&mut place.regatta(&begin));
    // A run that never got as far as a checkpoint is none to go on from.
    fs::create_dir_all(place.path("runs/small-7/checkpoints")).unwrap();
    fs::create_dir_all(place.path("runs/small-er/checkpoints/step-00000001")).unwrap();
    let output = said(&succeed(&mut place.regatta(&resume)));
    assert!(
        output.contains("run folder runs/small:") && output.contains("resuming from runs/small/"),
        "{output}"
    );
    succeed(&mut place.regatta(&begin));
    for more in [&[][..], &["auto"]] {
        let error = fail(&mut place.regatta(&[&resume[..], more].concat()));
        assert!(error.contains("--out; there are runs/small, runs/small-2"), "{error}");
    }
}

#[test]
fn a_second_life_under_torchruns_variables_is_the_undisturbed_run() {
    let place = Place::new();
    let more = ["--steps", "600", "--set", "train.checkpoint_every=100", "--resume", "auto"];
    let life = || -> Vec<Child> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rank = |rank: usize| {
            let mut train = place.train("run", &more);
            train.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            train.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
            train.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            start(&mut train)
        };
        (0..2).map(rank).collect()
    };
    let first = life();
    until("a checkpoint", || place.path("run/checkpoints/last").exists());
    signal("-KILL", first[1].id());
    for rank in first {
        assert!(!rank.wait_with_output().unwrap().status.success());
    }
    for rank in life() {
        let output = rank.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    succeed(&mut place.train("whole", &["--workers", "2", "--steps", "600"]));
    let (run, whole) = (place.summary("run"), place.summary("whole"));
    assert_eq!(losses(&run), losses(&whole));
    assert_eq!(run["parameter_hash"], whole["parameter_hash"]);
}

#[test]
fn torchrun_restarts_a_killed_rank_with_the_same_command() {
    let python = std::env::var("REGATTA_PYTHON").unwrap_or_else(|_| "/tmp/regatta-python/bin/python".into());
    let torchrun = Path::new(&python).with_file_name("torchrun");
    if !torchrun.exists() {
        eprintln!("skipped: torchrun is not installed");
        return;
    }
    let place = Place::new();
    let train =
        place.train("run", &["--steps", "3000", "--set", "train.checkpoint_every=100", "--resume", "auto"]);
    let mut command = Command::new(torchrun);
    command.args(["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", "0", "--no-python"]);
    command.arg(train.get_program()).args(train.get_args()).current_dir(train.get_current_dir().unwrap());
    let job = start(&mut command);
    until("a checkpoint", || place.path("run/checkpoints/last").exists());
    // Rank 0 is known by what it has written; a child of torchrun's.
    let who = fs::read_to_string(place.path("run/lock")).unwrap();
    let pid = who.split_whitespace().nth(1).unwrap().parse().unwrap();
    signal("-KILL", pid);
    let output = job.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("resuming from"), "{}", said(&output));
    succeed(&mut place.train("whole", &["--workers", "2", "--steps", "3000"]));
    let (run, whole) = (place.summary("run"), place.summary("whole"));
    assert_eq!(losses(&run), losses(&whole));
    assert_eq!(run["parameter_hash"], whole["parameter_hash"]);
}

#[test]
fn a_finished_run_that_is_resumed_keeps_its_summary() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--workers", "1"]));
    let path = place.path("run/summary.json");
    let before = fs::read(&path).unwrap();
    let output = said(&succeed(&mut place.train("run", &["--workers", "1", "--resume"])));
    assert!(output.contains("no step was left to do") && !output.contains("tokens/s"), "{output}");
    assert_eq!(fs::read(&path).unwrap(), before);
    fs::remove_file(&path).unwrap();
    succeed(&mut place.train("run", &["--workers", "1", "--resume"]));
    let after = place.summary("run");
    for key in ["tokens_per_s", "step_ms", "mfu", "comm_ms", "comm_exposed_ms", "time_to_first_step_s"] {
        assert!(after[key].is_null(), "{key} is {}", after[key]);
    }
    let before: Value = serde_json::from_slice(&before).unwrap();
    for key in ["steps", "train_loss", "val_loss", "best_val_loss", "parameter_hash", "parameters", "plan"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    let output = said(&succeed(&mut place.train("run", &["--workers", "1", "--resume", "--steps", "5"])));
    assert!(output.contains("the checkpoint is of step 12, but train.steps is 5"), "{output}");
}

#[test]
fn losses_come_back_to_the_last_bit_and_checkpoints_do_not_grow() {
    let place = Place::new();
    let every = ["--workers", "1", "--set", "train.checkpoint_every=40", "--set", "train.keep=10"];
    succeed(&mut place.train("whole", &[&every[..], &["--steps", "200"]].concat()));
    for steps in ["37", "111", "200"] {
        let more = if steps == "37" { vec![] } else { vec!["--resume"] };
        succeed(&mut place.train("parts", &[&every[..], &["--steps", steps], &more].concat()));
    }
    let read = |name: &str| fs::read_to_string(place.path(name).join("losses.csv")).unwrap();
    assert_eq!(read("whole"), read("parts"));
    assert_eq!(read("whole").lines().count(), 201);
    assert_eq!(steps(&place.path("whole")), [40, 80, 120, 160, 200]);
    let size = |step: usize| {
        let folder = place.path("whole/checkpoints").join(format!("step-{step:08}"));
        fs::metadata(folder.join("manifest.json")).unwrap().len()
    };
    // It differs by digits of numbers and by the validation's result.
    assert!(size(200).abs_diff(size(40)) < 200, "{} {}", size(40), size(200));
    let summary = fs::read_to_string(place.path("whole/summary.json")).unwrap();
    assert!(!summary.contains("\"losses\""));
}

#[test]
fn what_differs_from_the_run_before_is_told_and_other_data_refused() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--workers", "1", "--steps", "4"]));
    let resume = |more: &[&str]| place.train("run", &[&["--workers", "1", "--resume"], more].concat());
    // The same text under another name is the same text.
    fs::copy(place.path("text.txt"), place.path("copy.txt")).unwrap();
    let output = said(&succeed(&mut resume(&["--steps", "5", "--set", "data.path=copy.txt"])));
    assert!(!output.contains("warning"), "{output}");
    let changed = [
        "--steps",
        "6",
        "--set",
        "train.seed=7",
        "--set",
        "optimizer.lr=0.001",
        "--set",
        "model.dropout=0.1",
    ];
    let output = said(&succeed(&mut resume(&changed)));
    for part in [
        "train.seed 7 instead of 1337",
        "optimizer.lr 0.001 instead of 0.01",
        "model.dropout 0.1 instead of 0.0",
        "not be the same bit for bit",
    ] {
        assert!(output.contains(part), "{part:?} is not in {output}");
    }
    let output = said(&succeed(&mut place.train("run", &["--workers", "2", "--resume", "--steps", "7"])));
    assert!(output.contains("the plan mesh data=2"), "{output}");
    // A text of the same characters and the same length.
    let text = fs::read_to_string(place.path("text.txt")).unwrap();
    fs::write(place.path("other.txt"), text.replacen("line 1 ", "line 2 ", 1)).unwrap();
    for workers in ["1", "2"] {
        let other = ["--resume", "--workers", workers, "--set", "data.path=other.txt"];
        let error = fail(&mut place.train("run", &other));
        assert!(
            error.contains("other data or with another tokenizer") && error.contains("--other-data"),
            "{error}"
        );
        let output = said(&succeed(&mut place.train("run", &[&other[..], &["--other-data"]].concat())));
        assert!(output.contains("as --other-data allows"), "{output}");
        succeed(&mut place.train(&format!("run-{workers}"), &["--workers", "1", "--steps", "3"]));
        fs::remove_dir_all(place.path("run")).unwrap();
        succeed(&mut place.train("run", &["--workers", "1", "--steps", "4"]));
    }
    // Without --resume these say nothing, so they are refused.
    assert!(fail(&mut place.train("new", &["--other-data"])).contains("--resume"));
    assert!(fail(&mut place.train("new", &["--from", "last"])).contains("--resume"));
}

/// A run with checkpoints after 4, 8 and 12 steps, the best one after 4.
fn three(place: &Place, out: &str) -> PathBuf {
    let more = ["--workers", "2", "--set", "train.checkpoint_every=4", "--set", "train.keep=3"];
    succeed(&mut place.train(out, &more));
    let run = place.path(out);
    assert_eq!(steps(&run), [4, 8, 12]);
    fs::write(run.join("checkpoints/best"), "step-00000004").unwrap();
    run
}

#[test]
fn what_is_damaged_is_told_and_the_newest_whole_one_taken() {
    let place = Place::new();
    three(&place, "whole");
    let whole = place.summary("whole");
    let step = |run: &Path, step: usize| run.join(format!("checkpoints/step-{step:08}"));
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path), &'a str);
    let cases: [Damage; 5] = [
        ("data", &|run| damage(&step(run, 12).join("rank-00000.safetensors")), "does not match its checksum"),
        (
            "short",
            &|run| fs::write(step(run, 12).join("rank-00000.safetensors"), "x").unwrap(),
            "bytes instead of",
        ),
        ("manifest", &|run| damage(&step(run, 12).join("manifest.json")), "manifest.json"),
        ("gone", &|run| fs::remove_dir_all(step(run, 12)).unwrap(), "step-00000012"),
        ("garbage", &|run| fs::write(run.join("checkpoints/last"), "garbage").unwrap(), "garbage"),
    ];
    for (name, harm, wanted) in cases {
        let run = three(&place, name);
        harm(&run);
        let output = said(&succeed(&mut place.train(name, &["--workers", "2", "--resume"])));
        assert!(output.contains(wanted), "{name}: {output}");
        if name == "garbage" {
            assert!(output.contains("using step-00000012 instead"), "{output}");
        } else {
            let lost = "using step-00000008 instead; the training of steps 9 to 12 is lost";
            assert!(output.contains(lost), "{name}: {output}");
        }
        let again = place.summary(name);
        assert_eq!(
            (losses(&again), &again["parameter_hash"]),
            (losses(&whole), &whole["parameter_hash"]),
            "{name}"
        );
    }
    // A text from a run whose best checkpoint is damaged.
    let run = three(&place, "generate");
    damage(&step(&run, 4).join("rank-00000.safetensors"));
    for mesh in [&[][..], &["--mesh", "tensor=2"]] {
        let output =
            succeed(&mut place.regatta(&[&["generate", "generate", "--tokens", "5"], mesh].concat()));
        let said = said(&output);
        assert!(
            said.contains("does not match its checksum") && said.contains("using step-00000012"),
            "{said}"
        );
    }
    // Where nothing is whole, the first reason is told.
    for step in [8, 12] {
        damage(&run.join(format!("checkpoints/step-{step:08}/rank-00000.safetensors")));
    }
    for resume in [&["--resume"][..], &["--resume", "auto"]] {
        let error = fail(&mut place.train("generate", &[&["--workers", "2"], resume].concat()));
        assert!(error.contains("step-00000012") && error.contains("does not match its checksum"), "{error}");
    }
    assert_eq!(steps(&run), [4, 8, 12]);
}

#[test]
fn a_checkpoint_can_be_chosen() {
    let place = Place::new();
    for (from, step) in [("best", 4), ("step-8", 8), ("step-00000004", 4), ("last", 12)] {
        let out = format!("run-{from}");
        three(&place, &out);
        let more = ["--workers", "1", "--steps", "16", "--resume", "--from", from];
        let output = said(&succeed(&mut place.train(&out, &more)));
        assert!(output.contains(&format!("resuming after step {step}")), "{output}");
        assert_eq!(
            output.contains("the next checkpoint replaces those of later steps, up to 12"),
            step < 12,
            "{output}"
        );
        assert_eq!(place.summary(&out)["steps"], 16);
    }
    let run = three(&place, "run");
    for command in [
        &["train", "small.toml", "--set", "data.path=text.txt", "--out", "run", "--resume"][..],
        &["generate", "run"],
    ] {
        let with = |from: &str| fail(&mut place.regatta(&[command, &["--from", from]].concat()));
        assert!(
            with("step-5").contains("there is no checkpoint of step 5; there are: step-4, step-8, step-12")
        );
        assert!(with("first").contains("use last, best or step-N"));
    }
    // The chosen one is taken or nothing is.
    damage(&run.join("checkpoints/step-00000008/rank-00000.safetensors"));
    let resume = |from: &str| place.train("run", &["--workers", "1", "--resume", "--from", from]);
    assert!(fail(&mut resume("step-8")).contains("does not match its checksum"));
    assert!(fail(&mut place.regatta(&["generate", "run", "--from", "step-8"])).contains("does not match"));
    fs::remove_file(run.join("checkpoints/best")).unwrap();
    assert!(fail(&mut resume("best")).contains("there is no best checkpoint yet"));
    let text = |from: &str| {
        said(&succeed(&mut place.regatta(&["generate", "run", "--tokens", "30", "--from", from])))
    };
    assert_eq!(text("last"), text("step-12"));
    assert_ne!(text("step-4"), text("step-12"));
}

#[test]
fn checkpoints_are_kept_as_told_and_come_by_the_clock() {
    let place = Place::new();
    let more = ["--workers", "2", "--steps", "20", "--set", "train.checkpoint_every=2"];
    let keep = ["--set", "train.keep=2", "--set", "train.keep_every=6"];
    succeed(&mut place.train("kept", &[&more[..], &keep].concat()));
    assert_eq!(steps(&place.path("kept")), [6, 12, 18, 20]);
    let clock = [
        "--workers",
        "2",
        "--steps",
        "40",
        "--set",
        "train.checkpoint_minutes=1e-6",
        "--set",
        "train.keep=100",
    ];
    let output = said(&succeed(&mut place.train("clock", &clock)));
    assert!(steps(&place.path("clock")).len() > 2, "{:?}", steps(&place.path("clock")));
    assert!(output.contains("run folder clock: checkpoints every 0.000001 minutes, "), "{output}");
    let off =
        ["--workers", "2", "--steps", "40", "--set", "train.checkpoint_minutes=0", "--set", "train.keep=100"];
    let output = succeed(&mut place.train("off", &off));
    assert_eq!(steps(&place.path("off")), [40]);
    // The first line says when and where.
    let output = String::from_utf8(output.stderr).unwrap();
    let first = output.lines().next().unwrap();
    assert_eq!(
        first,
        "run folder off: checkpoints at the best validation loss and at the end, in off/checkpoints"
    );
    let output = said(&succeed(&mut place.train("default", &["--workers", "1"])));
    assert!(output.contains("run folder default: checkpoints every 15 minutes, "), "{output}");
}
