//! Whole training runs with real processes: parity, repeatability, resuming, bad input.

mod common;

use common::{Place, difference, fail, losses, said, succeed};
use std::fs;

#[test]
fn one_two_and_four_workers_agree_over_every_transport() {
    let place = Place::new();
    for (optimizer, lr, bound) in [("sgd", "0.1", 1e-5), ("adamw", "0.003", 1e-4)] {
        let run = |out: &str, workers: &str, transport: &str, more: &[&str]| {
            let sets = [format!("optimizer.kind={optimizer}"), format!("optimizer.lr={lr}")];
            let mut arguments = vec!["--workers", workers, "--transport", transport];
            sets.iter().for_each(|set| arguments.extend(["--set", set]));
            arguments.extend(more);
            succeed(&mut place.train(&format!("{optimizer}-{out}"), &arguments));
            place.summary(&format!("{optimizer}-{out}"))
        };
        let one = run("one", "1", "thread", &[]);
        assert_eq!((one["world"].as_u64(), losses(&one).len()), (Some(1), 12));
        for transport in ["thread", "shm", "tcp"] {
            for workers in ["2", "4"] {
                let many = run(&format!("{transport}-{workers}"), workers, transport, &[]);
                assert_eq!(many["transport"], transport);
                assert_eq!(many["world"].to_string(), workers);
                let difference = difference(&losses(&one), &losses(&many));
                assert!(difference < bound, "{optimizer} {transport} {workers}: {difference}");
            }
        }
        let again = run("again", "2", "shm", &[]);
        let first = place.summary(&format!("{optimizer}-shm-2"));
        assert_eq!(
            (&again["losses"], &again["parameter_hash"]),
            (&first["losses"], &first["parameter_hash"])
        );
        // Micro-steps add up to the same gradient.
        let cut = run("cut", "2", "shm", &["--set", "train.accumulate=2"]);
        assert!(difference(&losses(&one), &losses(&cut)) < bound);
        // Many small buckets.
        let small = run("small", "2", "shm", &["--set", "parallel.bucket_mib=0.01"]);
        assert!(difference(&losses(&one), &losses(&small)) < bound);
        // The ring over shared memory.
        let ring = run("ring", "4", "shm", &["--set", "parallel.algorithm=ring"]);
        assert!(difference(&losses(&one), &losses(&ring)) < bound);
    }
}

#[test]
fn summary_and_metrics_have_what_they_promise() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--workers", "2"]));
    let summary = place.summary("run");
    for key in [
        "steps",
        "train_loss",
        "val_loss",
        "tokens_per_s",
        "step_ms",
        "comm_ms",
        "comm_exposed_ms",
        "time_to_first_step_s",
        "peak_rss_bytes",
        "losses",
        "world",
        "plan",
        "parameter_hash",
        "memory",
    ] {
        assert!(!summary[key].is_null(), "{key} is missing in {summary}");
    }
    assert_eq!(summary["peak_rss_bytes"].as_array().unwrap().len(), 2);
    assert!(summary["peak_rss_bytes"][1].as_u64().unwrap() > 1 << 20);
    assert_eq!(summary["plan"]["mesh"], serde_json::json!([["data", 2]]));
    assert!(losses(&summary)[11] < losses(&summary)[0]);
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["loss"].is_f64()).count(), 12);
    assert!(lines.iter().any(|line| line["val_loss"].is_f64()));
}

#[test]
fn a_resumed_run_is_bitwise_the_undisturbed_one() {
    let place = Place::new();
    // With dropout, whose masks must go on as well, and several epochs.
    let more = ["--workers", "2", "--set", "model.dropout=0.1", "--set", "train.checkpoint_every=5"];
    succeed(&mut place.train("whole", &more));
    let stopped = [&more[..], &["--steps", "7"]].concat();
    succeed(&mut place.train("parts", &stopped));
    assert!(fail(&mut place.train("parts", &more)).contains("--resume"));
    succeed(&mut place.train("parts", &[&more[..], &["--resume"]].concat()));
    let (whole, parts) = (place.summary("whole"), place.summary("parts"));
    assert_eq!(losses(&whole), losses(&parts));
    assert_eq!(
        (&whole["parameter_hash"], &whole["val_loss"]),
        (&parts["parameter_hash"], &parts["val_loss"])
    );
    let lines = fs::read_to_string(place.path("parts/metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().filter(|line| !line.contains("\"loss\":null")).count(), 12);
    // Only what `last` and `best` name is kept.
    let kept: Vec<_> = fs::read_dir(place.path("parts/checkpoints")).unwrap().flatten().collect();
    assert!(kept.len() <= 4, "{kept:?}");
    // Another number of workers goes on too.
    succeed(&mut place.train("elsewhere", &stopped));
    let one = ["--workers", "1", "--resume", "--set", "model.dropout=0.1"];
    succeed(&mut place.train("elsewhere", &one));
    assert_eq!(place.summary("elsewhere")["steps"], 12);
}

#[test]
fn text_streams_from_a_checkpoint() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--set", "sample.prompt=\"line\"", "--set", "sample.tokens=20"]));
    assert!(place.summary("run")["sample"].as_str().unwrap().starts_with("line"));
    let generate = ["generate", "run", "--prompt", "line 3", "--tokens", "40"];
    let once = said(&succeed(&mut place.regatta(&generate)));
    assert!(once.starts_with("line 3") && once.trim_end().len() > 30, "{once}");
    assert_eq!(once, said(&succeed(&mut place.regatta(&generate))));
    assert!(fail(&mut place.regatta(&["generate", "run", "--prompt", "ä"])).contains("'ä'"));
    assert!(fail(&mut place.regatta(&["generate", "nowhere"])).contains("checkpoint nowhere"));
}

#[test]
fn digits_and_bpe_and_folders_train() {
    let place = Place::new();
    let digits = |len: usize| regatta::data::mnist::Digits {
        pixels: (0..len * 784).map(|i| if (i / 784) % 10 == (i % 784) / 79 { 255 } else { 0 }).collect(),
        labels: (0..len).map(|i| (i % 10) as u8).collect(),
    };
    regatta::data::mnist::Digits::write(&place.path("idx"), &[digits(200), digits(40)]).unwrap();
    succeed(&mut place.regatta(&["data", "mnist", "--from", "idx", "--out", "digits"]));
    for kind in ["mlp", "cnn"] {
        let text = format!(
            "[model]\nkind = \"{kind}\"\n[data]\nkind = \"mnist\"\npath = \"digits\"\n[train]\nsteps = 30\nbatch = 20\n\
             eval_batches = 0\n[optimizer]\nlr = 3e-3\n[parallel]\nworkers = 2\n"
        );
        fs::write(place.path("digits.toml"), text).unwrap();
        succeed(&mut place.regatta(&["train", "digits.toml", "--out", kind]));
        assert!(place.summary(kind)["val_accuracy"].as_f64().unwrap() > 0.9, "{}", place.summary(kind));
    }
    fs::create_dir(place.path("texts")).unwrap();
    for n in 0..8 {
        fs::write(place.path(&format!("texts/{n}.txt")), format!("text {n} of some words\n").repeat(200))
            .unwrap();
    }
    let more = ["--set", "data.path=texts", "--set", "data.tokenizer=bpe", "--set", "data.vocab_size=300"];
    succeed(&mut place.train("bpe", &more));
    let prepared = said(&succeed(&mut place.regatta(&["data", "text", "texts", "--vocab-size", "300"])));
    assert!(prepared.contains("tokens (bpe)"), "{prepared}");
}

/// Held-out images are normalised by the running statistics.
#[test]
fn a_residual_network_learns_made_up_images() {
    let place = Place::new();
    let text = "[model]\nkind = \"resnet\"\nstages = [1, 1]\nchannels = 12\nside = 12\n[data]\nkind = \"synthetic\"\n\
                samples = 2000\nclasses = 4\n[train]\nsteps = 100\nbatch = 32\neval_batches = 0\n[optimizer]\nkind = \"sgd\"\nlr = 0.1\n\
                momentum = 0.9\n[parallel]\nworkers = 2\n";
    fs::write(place.path("resnet.toml"), text).unwrap();
    succeed(&mut place.regatta(&["train", "resnet.toml", "--out", "run"]));
    let summary = place.summary("run");
    assert!(summary["val_accuracy"].as_f64().unwrap() > 0.9, "{summary}");
    let cifar = ["train", "resnet.toml", "--set", "data.kind=cifar10", "--out", "none"];
    assert!(fail(&mut place.regatta(&cifar)).contains("12 x 12"));
    let cifar = [&cifar[..], &["--set", "model.side=32"]].concat();
    assert!(fail(&mut place.regatta(&cifar)).contains("unpack CIFAR-10's binary version"));
}

#[test]
fn bad_input_is_a_sentence_and_leaves_nothing() {
    let place = Place::new();
    fs::write(place.path("short.txt"), "short").unwrap();
    fs::write(place.path("broken.toml"), "[model\n").unwrap();
    for (arguments, wanted) in [
        (vec!["--set", "data.path=none.txt"], "none.txt: cannot be read"),
        (vec!["--set", "data.path=short.txt"], "a window of 16 takes 17"),
        (vec!["--set", "train.batch=9", "--workers", "2"], "a batch of 9 does not divide among 2"),
        (vec!["--set", "train.stepz=9"], "did you mean `steps`?"),
        (vec!["--set", "model.heads=5"], "is not a multiple of the 5 heads"),
        (vec!["--set", "optimizer.lr=-1"], "out of range"),
        (vec!["--set", "parallel.transport=shn"], "did you mean `shm`?"),
        (vec!["--workers", "0"], "must be at least 1"),
        (vec!["--resume"], "checkpoint"),
        (vec!["--set", "train.batch=100000"], "one batch needs 100000"),
    ] {
        let error = fail(&mut place.train("out", &arguments));
        assert!(error.contains(wanted), "{arguments:?}: {error}");
        assert!(!place.path("out/checkpoints").exists() && !place.path("out/summary.json").exists());
    }
    assert!(fail(&mut place.regatta(&["train", "broken.toml"])).contains("broken.toml"));
    assert!(fail(&mut place.regatta(&["train", "absent.toml"])).contains("absent.toml"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let many = (cores + 1).to_string();
    let output =
        succeed(&mut place.train("many", &["--workers", &many, "--set", &format!("train.batch={many}")]));
    assert!(said(&output).contains("take turns"), "{}", said(&output));
}

#[test]
fn damaged_and_foreign_checkpoints_are_refused() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "2"]));
    let folder = place.path("run/checkpoints/step-00000002");
    let resume =
        |more: &[&str]| fail(&mut place.train("run", &[&["--resume", "--workers", "2"], more].concat()));
    assert!(resume(&["--set", "model.embed=64"]).contains("[model]"));
    assert!(resume(&["--set", "model.layers=3"]).contains("has no layers.2"));
    assert!(resume(&["--set", "train.batch=16"]).contains("train.batch"));
    let (file, manifest) = (folder.join("rank-00000.safetensors"), folder.join("manifest.json"));
    let (bytes, text) = (fs::read(&file).unwrap(), fs::read_to_string(&manifest).unwrap());
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert!(resume(&[]).contains("rank-00000.safetensors"));
    let mut flipped = bytes.clone();
    let last = flipped.len() - 5;
    flipped[last] ^= 64;
    fs::write(&file, &flipped).unwrap();
    let error = resume(&[]);
    assert!(error.contains("rank-00000.safetensors: tensor second/norm.gamma does not match"), "{error}");
    fs::remove_file(&file).unwrap();
    assert!(resume(&[]).contains("rank-00000.safetensors"));
    fs::write(&file, &bytes).unwrap();
    fs::write(&manifest, "{\"format\":\"other\"}").unwrap();
    assert!(resume(&[]).contains("manifest.json"));
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(resume(&[]).contains("manifest.json"));
    fs::write(&manifest, &text).unwrap();
    succeed(&mut place.train("run", &["--resume", "--workers", "2"]));
}
