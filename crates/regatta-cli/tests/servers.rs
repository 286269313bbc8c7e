//! Parameter servers: whole runs in every mode.

mod common;

use common::{Place, difference, fail, losses, said, signal, succeed, until};

fn train(place: &Place, out: &str, sets: &[&str], more: &[&str]) -> std::process::Command {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.train(out, &[more, &sets].concat())
}

const SGD: [&str; 3] = ["optimizer.kind=sgd", "optimizer.momentum=0.5", "optimizer.lr=0.05"];

#[test]
fn through_servers_losses_are_those_of_an_all_reduce() {
    let place = Place::new();
    let common = ["train.batch=12", "train.check_every=1", "parallel.bucket_mib=0.02"];
    for (index, optimizer) in [&SGD[..], &["optimizer.warmup=4"]].into_iter().enumerate() {
        let sets = [&common[..], optimizer].concat();
        let plain = format!("plain-{index}");
        succeed(&mut train(&place, &plain, &sets, &["--workers", "2"]));
        let right = losses(&place.summary(&plain));
        for (workers, servers, transport) in
            [("2", "1", "shm"), ("2", "3", "tcp"), ("3", "2", "thread"), ("1", "2", "shm"), ("4", "5", "shm")]
        {
            let out = format!("{index}-{workers}-{servers}");
            let more = ["--workers", workers, "--servers", servers, "--transport", transport];
            succeed(&mut train(&place, &out, &sets, &more));
            let summary = place.summary(&out);
            let own = losses(&summary);
            let far = difference(&own, &right);
            assert!(far < 1e-5, "{out} {optimizer:?}: {far}\n{own:?}\n{right:?}");
            assert_eq!(
                summary["world"],
                workers.parse::<usize>().unwrap() + servers.parse::<usize>().unwrap()
            );
        }
    }
    // Whoever may not be ahead of the slowest waits for all.
    let ssp = ["sync.mode=ssp", "sync.staleness=0"];
    succeed(&mut train(
        &place,
        "ssp",
        &[&common[..], &SGD, &ssp].concat(),
        &["--workers", "2", "--servers", "1"],
    ));
    assert!(difference(&losses(&place.summary("ssp")), &losses(&place.summary("plain-0"))) < 1e-5);
}

#[test]
fn half_precision_and_micro_batches_go_through_servers() {
    let place = Place::new();
    for (name, sets) in [
        ("half", &["train.precision=bf16"][..]),
        ("scaled", &["train.precision=f16", "train.loss_scale=1e30", "train.steps=20"]),
        ("micro", &["train.accumulate=2"]),
        ("again", &["parallel.recompute=block"]),
    ] {
        let plain = format!("{name}-plain");
        succeed(&mut train(&place, &plain, sets, &["--workers", "2"]));
        succeed(&mut train(&place, name, sets, &["--workers", "2", "--servers", "2"]));
        let (own, right) = (place.summary(name), place.summary(&plain));
        assert_eq!(own["skipped_steps"], right["skipped_steps"], "{name}");
        let far = difference(&losses(&own), &losses(&right));
        assert!(far < if sets[0].contains("precision") { 1e-2 } else { 1e-5 }, "{name}: {far}");
    }
}

#[test]
fn running_statistics_are_those_of_an_all_reduce() {
    let place = Place::new();
    let text = "[model]\nkind = \"resnet\"\nstages = [1, 1]\nchannels = 8\nside = 12\n[data]\nkind = \"synthetic\"\n\
                classes = 3\nsamples = 60\n[train]\nsteps = 8\nbatch = 6\nlog_every = 1\neval_every = 4\n\
                [optimizer]\nkind = \"sgd\"\nmomentum = 0.9\nlr = 0.05\nclip = 0.0\n";
    std::fs::write(place.path("net.toml"), text).unwrap();
    let run = |out: &str, more: &[&str]| {
        let arguments = [&["train", "net.toml", "--out", out, "--workers", "2"][..], more].concat();
        succeed(&mut place.regatta(&arguments));
        place.summary(out)
    };
    let (own, right) = (run("served", &["--servers", "2"]), run("plain", &[]));
    assert!(difference(&losses(&own), &losses(&right)) < 1e-4);
    // Evaluation uses the running statistics.
    let loss = |summary: &serde_json::Value| summary["val_loss"].as_f64().unwrap();
    assert!((loss(&own) - loss(&right)).abs() < 1e-3, "{} {}", loss(&own), loss(&right));
}

#[test]
fn checkpoints_are_those_of_all_plans() {
    let place = Place::new();
    let sets = ["train.checkpoint_every=5", "train.keep=9", "optimizer.constant=true", "train.batch=12"];
    let served = ["--workers", "2", "--servers", "2"];
    let steps = ["--steps", "12"];
    succeed(&mut train(&place, "whole", &sets, &[&served[..], &steps].concat()));
    let whole = place.summary("whole");
    // From a checkpoint the same servers go on bit for bit; others, and workers without any, within rounding.
    for (name, ranks) in [
        ("same", &served[..]),
        ("others", &["--workers", "3", "--servers", "1"]),
        ("none", &["--workers", "2"]),
        ("sharded", &["--workers", "2", "--zero", "1"]),
    ] {
        let copy = std::process::Command::new("cp")
            .arg("-r")
            .arg(place.path("whole"))
            .arg(place.path(name))
            .status();
        assert!(copy.unwrap().success());
        let more = [ranks, &steps, &["--resume", "--from", "step-5"]].concat();
        let output = said(&succeed(&mut train(&place, name, &sets, &more)));
        let summary = place.summary(name);
        if name == "same" {
            assert_eq!(summary["parameter_hash"], whole["parameter_hash"], "{output}");
            assert!(!output.contains("differs"), "{output}");
        }
        let far = difference(&losses(&summary), &losses(&whole));
        assert!(far < 1e-5, "{name}: {far}");
    }
    // And servers go on where workers have been alone.
    succeed(&mut train(&place, "alone", &sets, &[&["--workers", "2"][..], &steps].concat()));
    let right = losses(&place.summary("alone"));
    let more = [&served[..], &steps, &["--resume", "--from", "step-5"]].concat();
    succeed(&mut train(&place, "alone", &sets, &more));
    let far = difference(&losses(&place.summary("alone")), &right);
    assert!(far < 1e-5, "{far}");
}

#[test]
fn workers_that_wait_for_nobody_learn_and_resume() {
    let place = Place::new();
    let common = ["train.batch=12", "train.eval_every=5", "train.checkpoint_every=10", "optimizer.lr=3e-3"];
    for (index, (mode, ranks)) in [
        (&["sync.mode=async"][..], ["--workers", "3", "--servers", "2", "--transport", "shm"]),
        (&["sync.mode=ssp", "sync.staleness=2"], ["--workers", "2", "--servers", "1", "--transport", "tcp"]),
        (&["sync.mode=async"], ["--workers", "4", "--servers", "1", "--transport", "thread"]),
        (&["sync.mode=ssp", "sync.staleness=1"], ["--workers", "1", "--servers", "1", "--transport", "shm"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("run-{index}");
        let sets = [&common[..], mode].concat();
        let output =
            said(&succeed(&mut train(&place, &out, &sets, &[&ranks[..], &["--steps", "60"]].concat())));
        let summary = place.summary(&out);
        assert_eq!(
            (summary["steps"].as_u64(), summary["interrupted"].as_bool()),
            (Some(60), Some(false)),
            "{output}"
        );
        let own = losses(&summary);
        let ends = own[own.len() - 5..].iter().sum::<f64>() / 5.0;
        assert!(ends < 0.8 * own[0], "{mode:?} does not learn: {own:?}");
        // All pushes are in the checkpoint's count of updates.
        let resume = [&ranks[..], &["--steps", "80", "--resume"]].concat();
        succeed(&mut train(&place, &out, &sets, &resume));
        assert_eq!(place.summary(&out)["steps"], 80);
        // A job without servers goes on from it.
        let sets = &common[..];
        succeed(&mut train(&place, &out, sets, &["--workers", "2", "--steps", "85", "--resume"]));
        let after = losses(&place.summary(&out));
        assert!(after[after.len() - 1] < 0.9 * own[0], "{after:?}");
    }
}

#[test]
fn a_signal_stops_workers_and_servers_and_the_run_goes_on() {
    let place = Place::new();
    for mode in ["sync.mode=sync", "sync.mode=async", "sync.mode=ssp"] {
        let out = mode.replace(['.', '='], "-");
        let sets = [mode, "sync.staleness=3", "train.batch=12"];
        let sets = if mode.ends_with("ssp") { &sets[..] } else { &[sets[0], sets[2]] };
        let ranks = ["--workers", "2", "--servers", "1", "--steps", "1000000"];
        let mut run = train(&place, &out, sets, &ranks).spawn().unwrap();
        until("metrics", || {
            std::fs::read_to_string(place.path(&out).join("metrics.jsonl"))
                .is_ok_and(|text| text.lines().count() > 3)
        });
        signal("-TERM", run.id());
        assert_eq!(run.wait().unwrap().code(), Some(143), "{mode}");
        let summary = place.summary(&out);
        assert_eq!(summary["interrupted"], true);
        let steps = summary["steps"].as_u64().unwrap() + 5;
        let steps = steps.to_string();
        let more = ["--workers", "2", "--servers", "1", "--steps", &steps, "--resume"];
        succeed(&mut train(&place, &out, sets, &more));
        assert_eq!(place.summary(&out)["steps"].to_string(), steps);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_server_that_dies_ends_the_job_by_its_name() {
    use std::process::Stdio;
    let place = Place::new();
    for mode in ["sync.mode=sync", "sync.mode=async"] {
        let out = mode.replace(['.', '='], "-");
        let ranks = ["--workers", "2", "--servers", "2", "--steps", "1000000"];
        let mut command = train(&place, &out, &[mode, "train.batch=12"], &ranks);
        let run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("metrics", || {
            std::fs::read_to_string(place.path(&out).join("metrics.jsonl"))
                .is_ok_and(|text| text.lines().count() > 3)
        });
        signal("-KILL", common::pid_of(&run, 3));
        let output = run.wait_with_output().unwrap();
        assert!(!output.status.success());
        assert!(said(&output).contains("rank 3"), "{}", said(&output));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_rank_that_stands_still_is_named_at_the_deadline() {
    use std::process::Stdio;
    let place = Place::new();
    for (mode, stopped) in [
        (&["sync.mode=sync"][..], 1),
        (&["sync.mode=sync"], 2),
        (&["sync.mode=ssp", "sync.staleness=1"], 1),
        (&["sync.mode=async"], 2),
    ] {
        let out = format!("{}-{stopped}", mode[0].replace(['.', '='], "-"));
        let ranks = ["--workers", "2", "--servers", "1", "--steps", "1000000"];
        let sets = [mode, &["train.batch=12", "parallel.deadline_s=4"]].concat();
        let mut command = train(&place, &out, &sets, &ranks);
        let run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("metrics", || {
            std::fs::read_to_string(place.path(&out).join("metrics.jsonl"))
                .is_ok_and(|text| text.lines().count() > 3)
        });
        signal("-STOP", common::pid_of(&run, stopped));
        let output = run.wait_with_output().unwrap();
        let text = said(&output);
        assert!(!output.status.success());
        assert!(text.contains(&format!("still waiting for rank {stopped}")), "{mode:?} {stopped}: {text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn others_go_on_without_workers_that_die() {
    use std::process::Stdio;
    let place = Place::new();
    for (index, (mode, transport)) in [
        (&["sync.mode=async"][..], "shm"),
        (&["sync.mode=ssp", "sync.staleness=2"], "tcp"),
        (&["sync.mode=async"], "tcp"),
        (&["sync.mode=ssp", "sync.staleness=1"], "shm"),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("run-{index}");
        let ranks = ["--workers", "4", "--servers", "2", "--steps", "600", "--transport", transport];
        let sets = [mode, &["train.batch=12", "train.checkpoint_every=100"]].concat();
        let mut command = train(&place, &out, &sets, &ranks);
        let run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = || {
            std::fs::read_to_string(place.path(&out).join("metrics.jsonl"))
                .map_or(0, |text| text.lines().count())
        };
        // One after the other, and then nobody but the first is left.
        for (dies, after) in [(2, 20), (1, 60), (3, 100)] {
            until("metrics", || lines() > after);
            signal("-KILL", common::pid_of(&run, dies));
        }
        let output = run.wait_with_output().unwrap();
        let text = said(&output);
        assert!(output.status.success(), "{mode:?} {transport}: {text}");
        for dies in [1, 2, 3] {
            assert!(text.contains(&format!("rank {dies} was killed (signal 9)")), "{text}");
        }
        let summary = place.summary(&out);
        assert_eq!((summary["steps"].as_u64(), summary["interrupted"].as_bool()), (Some(600), Some(false)));
        let own = losses(&summary);
        assert!(own[own.len() - 1] < 0.5 * own[0], "{own:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let place = Place::new();
    let served = ["--workers", "2", "--servers", "1"];
    for (sets, ranks, reason) in [
        (&["sync.mode=async"][..], &["--workers", "2"][..], "`sync.mode`: \"async\" needs parameter servers"),
        (&["sync.staleness=3"], &served, "sync.staleness"),
        (&["sync.mode=ssp", "sync.staleness=-1"], &served, "sync.staleness"),
        (&["sync.mode=later"], &served, "sync.mode"),
        (&["sync.mode=ssp"], &["--workers", "2"], "needs parameter servers"),
        (&["local.every=4"], &served, "`local.every`: does not go with sync.servers = 1"),
        (&["compress.kind=bf16"], &served, "`compress.kind`: does not go with sync.servers = 1"),
        (&["parallel.zero=1"], &served, "`parallel.zero`: does not go with sync.servers = 1"),
        (
            &["parallel.mesh=\"data=2,tensor=2\""],
            &["--servers", "1"],
            "splits it or its workers along tensor",
        ),
        (&["parallel.mesh=\"pipe=2\""], &["--servers", "1"], "along pipe"),
        (&["parallel.mesh=\"replica=2\""], &["--servers", "1"], "along replica"),
        (&[], &["--workers", "2", "--servers", "2000"], "more than the parts that the model has"),
        (&["parallel.transport=mpi"], &served, "over MPI"),
        (&[], &["--workers", "2", "--servers=-1"], "--servers"),
    ] {
        let text = fail(&mut train(&place, "refused", sets, ranks));
        assert!(text.contains(reason), "{sets:?} {ranks:?}: {text}");
        assert!(!place.path("refused").exists(), "{sets:?}: {text}");
    }
    // Ranks of another launcher, of which none is left to work.
    let mut alone = train(&place, "refused", &[], &["--servers", "1"]);
    alone.envs([("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]);
    let text = fail(&mut alone);
    assert!(text.contains("has no worker"), "{text}");
}

#[test]
fn gradients_that_are_not_finite_are_refused_by_the_rank_that_pushed_them() {
    let place = Place::new();
    for mode in ["sync.mode=sync", "sync.mode=async"] {
        let out = mode.replace(['.', '='], "-");
        // The loss is finite for a while, and then it is not.
        let sets =
            [mode, "optimizer.lr=1e6", "optimizer.kind=sgd", "optimizer.clip=0", "train.checkpoint_every=1"];
        let text =
            fail(&mut train(&place, &out, &sets, &["--workers", "2", "--servers", "2", "--steps", "500"]));
        assert!(text.contains("not finite") || text.contains("the loss is"), "{mode}: {text}");
    }
}
