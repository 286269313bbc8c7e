//! `examples/own_model.rs`: a model and data of one's own under every plan, through a program of one's own.

mod common;

use common::{Place, difference, fail, losses, said, succeed};
use std::path::PathBuf;
use std::process::Command;

/// The program, built by cargo with the other examples of the workspace.
fn program() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_BIN_EXE_regatta")).with_file_name("examples").join("own_model");
    assert!(path.exists(), "{} is not built: cargo build --release --workspace --examples", path.display());
    path
}

fn own(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(place.path("")).args(arguments);
    command
}

fn train(place: &Place, out: &str, more: &str) -> Command {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../regatta/examples/own_model.toml");
    let mut command = own(place, &["train", config, "--out", out, "--set", "train.steps=24"]);
    let sgd = "--set optimizer.kind=sgd --set optimizer.lr=0.02 --set train.accumulate=2 --set optimizer.constant=true";
    command.args(sgd.split_whitespace()).args(more.split_whitespace());
    command
}

const PLANS: [&str; 5] = [
    "--mesh data=2",
    "--mesh tensor=2",
    "--mesh pipe=2",
    "--mesh data=2 --zero 3",
    "--mesh data=2,tensor=2,pipe=2",
];

#[test]
fn a_model_of_ones_own_has_the_losses_of_one_worker_under_every_plan() {
    let place = Place::new();
    succeed(&mut train(&place, "one", "--workers 1"));
    let one = losses(&place.summary("one"));
    assert!(one[23] < one[0], "nothing is learnt: {one:?}");
    for (index, plan) in PLANS.into_iter().enumerate() {
        let out = format!("plan-{index}");
        succeed(&mut train(&place, &out, plan));
        let found = difference(&losses(&place.summary(&out)), &one);
        assert!(found < 1e-5, "{plan}: {found:.1e}");
        // The plan can be looked at, too.
        let show = own(
            &place,
            &["plan", "show", concat!(env!("CARGO_MANIFEST_DIR"), "/../regatta/examples/own_model.toml")],
        )
        .args(plan.split_whitespace())
        .output()
        .unwrap();
        assert!(show.status.success(), "{plan}: {}", said(&show));
    }
}

#[test]
fn a_model_of_ones_own_goes_on_bit_for_bit_and_under_another_plan() {
    let place = Place::new();
    let whole = "--mesh tensor=2";
    succeed(&mut train(&place, "whole", whole));
    succeed(&mut train(&place, "parts", &format!("{whole} --steps 10")));
    let resumed = format!("{whole} --resume");
    succeed(&mut train(&place, "parts", &resumed));
    assert_eq!(losses(&place.summary("parts")), losses(&place.summary("whole")));
    assert_eq!(place.summary("parts")["parameter_hash"], place.summary("whole")["parameter_hash"]);
    // From one plan to another.
    succeed(&mut train(&place, "other", "--mesh data=2 --zero 3 --steps 10"));
    succeed(&mut train(&place, "other", "--mesh pipe=2 --resume"));
    let found = difference(&losses(&place.summary("other")), &losses(&place.summary("whole")));
    assert!(found < 1e-5, "{found:.1e}");
    succeed(&mut own(&place, &["checkpoint", "verify", "other"]));
    // The program without that model says what it knows.
    let error = fail(&mut place.regatta(&["checkpoint", "verify", "other"]));
    assert!(error.contains("unknown model.kind `gated`"), "{error}");
}
