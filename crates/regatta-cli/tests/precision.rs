//! Training with 16-bit numbers and on devices: through the operations that are not fused.

mod common;

use common::{Place, difference, fail, losses, said, succeed};
use std::fs;

#[test]
fn sixteen_bit_numbers_train_as_f32_does_under_every_kind_of_plan() {
    let place = Place::new();
    let run = |out: &str, more: &[&str]| {
        succeed(&mut place.train(out, more));
        place.summary(out)
    };
    let one = run("f32", &["--workers", "1"]);
    for precision in ["bf16", "f16"] {
        let set = format!("train.precision={precision}");
        let with = |name: &str, more: &[&str]| {
            run(&format!("{precision}-{name}"), &[&["--set", &set], more].concat())
        };
        let alone = with("alone", &["--workers", "1"]);
        assert_eq!(
            (alone["precision"].as_str(), alone["skipped_steps"].as_u64()),
            (Some(precision), Some(0))
        );
        assert_eq!(alone["loss_scale"].as_f64(), Some(if precision == "f16" { 65536.0 } else { 1.0 }));
        let off = difference(&losses(&one), &losses(&alone));
        assert!(off > 0.0 && off < 0.02, "{precision}: {off}");
        for (name, more) in [
            ("data", &["--workers", "2"][..]),
            ("zero1", &["--workers", "2", "--set", "parallel.zero=1"]),
            ("zero3", &["--workers", "2", "--set", "parallel.zero=3"]),
            ("again", &["--workers", "1", "--set", "parallel.recompute=block"]),
            ("pipe", &["--mesh", "pipe=2", "--set", "train.accumulate=2"]),
            (
                "bubble",
                &[
                    "--mesh",
                    "pipe=2",
                    "--set",
                    "train.accumulate=2",
                    "--set",
                    "parallel.schedule=zero-bubble",
                ],
            ),
        ] {
            let off = difference(&losses(&alone), &losses(&with(name, more)));
            assert!(off < 0.02, "{precision} {name}: {off}");
        }
    }
}

#[test]
fn steps_that_overflow_are_skipped_and_reported_and_the_scale_is_resumed() {
    let place = Place::new();
    let more = ["--workers", "2", "--set", "train.precision=f16", "--set", "train.loss_scale=4194304"];
    let output = succeed(&mut place.train("whole", &more));
    let whole = place.summary("whole");
    let skipped = whole["skipped_steps"].as_u64().unwrap();
    assert!((2..11).contains(&skipped), "{skipped}");
    assert_eq!(whole["loss_scale"].as_f64(), Some(4194304.0 / 2f64.powi(skipped as i32)));
    assert!(said(&output).contains("step 1 is skipped"), "{}", said(&output));
    let metrics = fs::read_to_string(place.path("whole/metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let first = &lines[0];
    assert_eq!((first["skipped_steps"].as_u64(), first["loss_scale"].as_f64()), (Some(1), Some(4194304.0)));
    // Nothing is learnt in steps that are skipped: the first two see the same parameters.
    assert!(losses(&whole)[11] < losses(&whole)[0]);
    // Stopped while it still overflows, and gone on with.
    succeed(&mut place.train("parts", &[&more[..], &["--steps", "2"]].concat()));
    assert_eq!(place.summary("parts")["skipped_steps"], 2);
    succeed(&mut place.train("parts", &[&more[..], &["--resume"]].concat()));
    let parts = place.summary("parts");
    assert_eq!(losses(&whole), losses(&parts));
    for key in ["skipped_steps", "loss_scale", "parameter_hash"] {
        assert_eq!(whole[key], parts[key], "{key}");
    }
}

#[test]
fn a_scale_changes_nothing_in_f32_and_a_loss_that_is_not_finite_ends_the_run() {
    let place = Place::new();
    succeed(&mut place.train("plain", &["--workers", "1"]));
    succeed(&mut place.train("scaled", &["--workers", "1", "--set", "train.loss_scale=1024"]));
    let (plain, scaled) = (place.summary("plain"), place.summary("scaled"));
    assert!(plain["loss_scale"].is_null());
    // A power of two: no bit is lost.
    assert_eq!(losses(&plain), losses(&scaled));
    let wild = ["--workers", "1", "--set", "optimizer.kind=sgd", "--set", "optimizer.lr=1e6"];
    let wild = [&wild[..], &["--set", "optimizer.clip=0"]].concat();
    let wild = fail(&mut place.train("wild", &wild));
    assert!(wild.contains("lower optimizer.lr"), "{wild}");
}

#[test]
fn devices_that_cannot_be_had_say_why() {
    let place = Place::new();
    let with = |device: &str| fail(&mut place.train("run", &["--set", &format!("train.device={device}")]));
    assert!(with("gpu").contains("the devices are cpu, vulkan, cuda, wgpu"), "{}", with("gpu"));
    assert!(with("cpu:7").contains("finds 1 device"), "{}", with("cpu:7"));
    #[cfg(not(feature = "cuda"))]
    assert!(with("cuda").contains("build it with `--features cuda`"), "{}", with("cuda"));
    #[cfg(not(feature = "vulkan"))]
    assert!(with("vulkan:1").contains("build it with `--features vulkan`"), "{}", with("vulkan:1"));
    let split = ["--mesh", "tensor=2", "--set", "train.precision=bf16"];
    assert!(fail(&mut place.train("run", &split)).contains("use data and pipe"));
}

/// On software Vulkan, too (Debian: mesa-vulkan-drivers).
#[cfg(feature = "wgpu")]
#[test]
fn wgpu_gives_the_losses_of_the_cpu() {
    on_device("wgpu");
}

#[cfg(feature = "vulkan")]
#[test]
fn vulkan_gives_the_losses_of_the_cpu() {
    on_device("vulkan");
}

#[cfg(any(feature = "vulkan", feature = "wgpu"))]
fn on_device(name: &str) {
    let place = Place::new();
    let run = |out: &str, more: &[&str]| {
        let steps = ["--steps", "10", "--workers", "2"];
        let output = place.train(out, &[&steps[..], more].concat()).output().unwrap();
        match output.status.success() {
            true => Ok(place.summary(out)),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    let cpu = run("cpu", &[]).unwrap();
    let device = match run("device", &["--set", &format!("train.device={name}")]) {
        Err(said) if said.contains("finds no device") => return eprintln!("skipped: {said}"),
        other => other.unwrap(),
    };
    assert_eq!(device["device"], name);
    let off = difference(&losses(&cpu), &losses(&device));
    assert!(off > 0.0 && off < 1e-4, "{off}");
    assert_ne!(cpu["parameter_hash"], device["parameter_hash"]);
}
