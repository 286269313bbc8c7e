//! Whole training runs under every plan: all of them give the losses of one worker, and each the same bits every time.

mod common;

use common::{Place, difference, fail, losses, said, succeed};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

const TRAIN: &str = r#"
[data]
path = "text.txt"

[train]
steps = 8
batch = 16
accumulate = 4
eval_batches = 1
log_every = 8

[parallel]
threads = 1

[optimizer]
constant = true
"#;

const GPT: &str = r#"
[model]
kind = "gpt"
layers = 4
heads = 4
embed = 32
block = 32
"#;

const ENCODER_DECODER: &str = r#"
[model]
kind = "encoder-decoder"
encoder_layers = 2
decoder_layers = 2
heads = 4
embed = 32
block = 16
"#;

const CNN: &str = r#"
[model]
kind = "cnn"
channels = [4, 8]
hidden = 16
dropout = 0.0
"#;

const RESNET: &str = r#"
[model]
kind = "resnet"
stages = [1, 2]
channels = 6
side = 8
"#;

/// An optimizer, its learning rate, and by how much losses may differ from one worker's, relatively: AdamW divides by
/// roots of squares, which makes more of rounding.
type Rule = (&'static str, &'static str, f64);
const SGD: Rule = ("sgd", "0.1", 1e-5);
const ADAMW: Rule = ("adamw", "0.003", 1e-4);

/// A mesh, and what the plan has beside it, as flags in one string.
type Spread = (&'static str, &'static str);

/// A folder with a configuration of `model` in it.
fn place(model: &str) -> Place {
    let place = Place::new();
    let mut text = format!("{model}{TRAIN}");
    if model == CNN {
        let digits = |len: usize| regatta::data::mnist::Digits {
            pixels: (0..len * 784).map(|i| ((i * i / 97 + i / 784 * 31) % 256) as u8).collect(),
            labels: (0..len).map(|i| (i % 10) as u8).collect(),
        };
        regatta::data::mnist::Digits::write(&place.path("digits"), &[digits(80), digits(16)]).unwrap();
        text = text.replace("path = \"text.txt\"", "kind = \"mnist\"\npath = \"digits\"");
    }
    if model == RESNET {
        let data = "kind = \"synthetic\"\nclasses = 4\nsamples = 160";
        text = text.replace("path = \"text.txt\"", data).replace("eval_batches = 1", "eval_batches = 0");
    }
    fs::write(place.path("plan.toml"), text).unwrap();
    place
}

/// A run under `spread` into `out`.
fn train(place: &Place, out: &str, (mesh, more): (&str, &str)) -> Command {
    let mut command = place.regatta(&["train", "plan.toml", "--out", out, "--mesh", mesh]);
    command.args(more.split_whitespace());
    command
}

fn run(place: &Place, out: &str, spread: (&str, &str)) -> Value {
    succeed(&mut train(place, out, spread));
    place.summary(out)
}

fn refused(place: &Place, spread: Spread) -> String {
    let error = fail(&mut train(place, "refused", spread));
    assert!(!place.path("refused").exists(), "{spread:?} left something behind: {error}");
    error
}

/// Trains under every one of `plans` with the flags `common` and compares with one worker.
fn agree(place: &Place, rule: Rule, common: &str, plans: &[Spread]) {
    let (optimizer, lr, bound) = rule;
    // Losses of the steps, and on held-out data at the end.
    let all = |(mesh, more): Spread| {
        let flags = format!("--set optimizer.kind={optimizer} --set optimizer.lr={lr} {common} {more}");
        let summary = run(place, "agree", (mesh, &flags));
        fs::remove_dir_all(place.path("agree")).unwrap();
        let mut all = losses(&summary);
        all.push(summary["val_loss"].as_f64().unwrap());
        all
    };
    let one = all(("data=1", ""));
    assert!(one[7] < one[0], "nothing is learnt: {one:?}");
    let mut worse = vec![];
    for spread in plans {
        let difference = difference(&one, &all(*spread));
        println!("{optimizer} {common} {spread:?}: {difference:.1e}");
        if difference.is_nan() || difference >= bound {
            worse.push(format!("{spread:?}: {difference:.1e}"));
        }
    }
    assert!(worse.is_empty(), "{optimizer}, bound {bound:.0e}: {worse:#?}");
}

/// Every axis and every way to save memory, alone and together.
const PLANS: [Spread; 23] = [
    ("data=2", ""),
    ("data=2", "--zero 1"),
    ("data=2", "--zero 2"),
    ("data=2", "--zero 3"),
    ("replica=2,data=2", "--zero 2"),
    ("tensor=2", ""),
    ("tensor=4", ""),
    ("pipe=2", "--schedule gpipe"),
    ("pipe=2", "--schedule 1f1b"),
    ("pipe=2", "--schedule interleaved"),
    ("pipe=2", "--schedule zero-bubble"),
    ("data=2,tensor=2", ""),
    ("data=2,pipe=2", ""),
    ("tensor=2,pipe=2", ""),
    ("tensor=2,pipe=2", "--schedule interleaved --set parallel.recompute=block"),
    ("data=2,tensor=2,pipe=2", ""),
    ("data=2,tensor=2,pipe=2", "--zero 1 --schedule zero-bubble"),
    ("data=2,tensor=2,pipe=2", "--zero 3 --schedule interleaved"),
    ("data=1", "--set parallel.recompute=block"),
    ("data=1", "--set parallel.offload=true"),
    ("data=2", "--zero 3 --set parallel.recompute=block --set parallel.offload=true"),
    ("data=2,pipe=2", "--zero 3 --set parallel.recompute=all"),
    ("tensor=2,pipe=2", "--schedule interleaved --set parallel.recompute=all"),
];

#[test]
fn a_gpt_under_sgd_has_the_losses_of_one_worker() {
    agree(&place(GPT), SGD, "", &PLANS);
}

#[test]
fn a_gpt_under_adamw_has_the_losses_of_one_worker() {
    agree(&place(GPT), ADAMW, "", &PLANS);
}

#[test]
fn regions_split_by_time_have_the_losses_of_one_worker() {
    let sequence = "--set parallel.sequence=true";
    let zero = "--set parallel.sequence=true --zero 1 --schedule zero-bubble";
    let plans = [("tensor=2", sequence), ("tensor=2,pipe=2", sequence), ("data=2,tensor=2,pipe=2", zero)];
    for rule in [SGD, ADAMW] {
        agree(&place(GPT), rule, "", &plans);
    }
    agree(&place(GPT), ADAMW, "--set model.dropout=0.2 --set model.bias=true", &plans[..2]);
    agree(&place(ENCODER_DECODER), ADAMW, "", &plans[..2]);
}

#[test]
fn an_encoder_decoder_has_the_losses_of_one_worker() {
    let plans = [
        ("data=2", "--zero 3"),
        ("tensor=2", ""),
        ("pipe=2", "--schedule gpipe"),
        ("pipe=2", "--schedule 1f1b"),
        ("pipe=2", "--schedule interleaved"),
        ("pipe=2", "--schedule zero-bubble"),
        ("pipe=3", ""),
        ("data=2,tensor=2,pipe=2", "--zero 1"),
        ("data=1", "--set parallel.recompute=block"),
    ];
    let place = place(ENCODER_DECODER);
    agree(&place, SGD, "", &plans);
    agree(&place, ADAMW, "", &plans);
}

#[test]
fn a_convolutional_network_has_the_losses_of_one_worker() {
    let plans = [
        ("data=2", "--zero 2"),
        ("pipe=2", "--schedule gpipe"),
        ("pipe=2", "--schedule zero-bubble"),
        ("pipe=2", "--schedule interleaved"),
        ("data=2,pipe=2", "--zero 3 --set parallel.recompute=block"),
    ];
    let place = place(CNN);
    agree(&place, ("sgd", "0.02", SGD.2), "", &plans);
    agree(&place, ADAMW, "", &plans);
    // The masks are drawn where the layer is.
    agree(&place, ADAMW, "--set model.dropout=0.25 --set train.seed=7", &plans[1..4]);
}

/// Statistics are those of a micro-batch, so micro-batches are as large under every plan; the loss on held-out data is by
/// the running ones.
#[test]
fn a_residual_network_has_the_losses_of_one_worker() {
    let plans = [
        ("data=2", "--micro-batches 2"),
        ("data=2", "--micro-batches 2 --zero 1"),
        ("data=2", "--micro-batches 2 --zero 2"),
        ("data=4", "--micro-batches 1 --zero 3"),
        ("pipe=2", "--schedule 1f1b"),
        ("pipe=2", "--schedule zero-bubble"),
        ("pipe=2", "--schedule interleaved"),
        ("data=1", "--set parallel.recompute=block"),
        ("data=2,pipe=2", "--micro-batches 2 --zero 3 --set parallel.recompute=block"),
    ];
    let place = place(RESNET);
    agree(&place, ("sgd", "0.05", SGD.2), "--set optimizer.momentum=0.9", &plans);
    agree(&place, ADAMW, "", &plans);
    let error = refused(&place, ("tensor=2", ""));
    assert!(error.contains("no layers that can be split over the axis tensor"), "{error}");
}

#[test]
fn running_statistics_go_on_under_another_plan() {
    let place = place(RESNET);
    let [whole, one] = ["whole", "one"];
    let wanted = run(&place, whole, ("data=1", ""));
    run(&place, one, ("data=2", "--micro-batches 2 --zero 2 --steps 4"));
    succeed(train(&place, one, ("pipe=2", "")).arg("--resume"));
    let found = place.summary(one);
    assert!(difference(&losses(&wanted), &losses(&found)) < 1e-4);
    let val = |summary: &Value| vec![summary["val_loss"].as_f64().unwrap()];
    assert!(difference(&val(&wanted), &val(&found)) < 1e-4);
}

#[test]
fn dropout_draws_the_masks_of_one_worker() {
    let plans = [
        ("tensor=2", ""),
        ("pipe=2", "--schedule zero-bubble"),
        ("tensor=2,pipe=2", "--schedule interleaved"),
        ("data=1", "--set parallel.recompute=block"),
        // Masks follow the sample, whichever worker and micro-batch it comes to.
        ("data=2", ""),
        ("data=4", "--micro-batches 1"),
        ("data=1", "--micro-batches 2"),
        ("replica=2,data=2", "--zero 2 --micro-batches 2"),
        ("data=2,tensor=2,pipe=2", "--zero 3"),
    ];
    agree(&place(GPT), SGD, "--set model.dropout=0.2", &plans);
    agree(&place(ENCODER_DECODER), SGD, "--set model.dropout=0.2", &plans);
}

/// A number of workers, stages and parts of layers that is no power of two.
#[test]
fn dropout_draws_the_masks_of_one_worker_on_three_ranks() {
    let plans = [
        ("data=3", "--micro-batches 1"),
        ("data=3", "--micro-batches 2 --zero 3"),
        ("tensor=3", ""),
        ("pipe=3", ""),
        ("data=1", "--micro-batches 4"),
    ];
    let common = "--set model.dropout=0.1 --set train.batch=12 --set model.heads=6 --set model.embed=36 --set train.accumulate=2";
    for model in [GPT, ENCODER_DECODER] {
        agree(&place(model), SGD, common, &plans);
    }
}

#[test]
fn other_norms_activations_and_losses_have_the_losses_of_one_worker() {
    let plans = [("tensor=2", ""), ("pipe=2", ""), ("tensor=2", "--set parallel.sequence=true")];
    let rms = "--set model.norm=rms --set model.activation=silu --set model.label_smoothing=0.1";
    agree(&place(GPT), SGD, rms, &plans);
    agree(
        &place(ENCODER_DECODER),
        SGD,
        "--set model.activation=relu --set model.label_smoothing=0.2",
        &plans,
    );
}

#[test]
fn a_plan_run_twice_gives_the_same_bits() {
    let place = place(GPT);
    let plans = [
        ("data=2", "--zero 3"),
        ("tensor=2", "--set model.dropout=0.1"),
        ("pipe=2", "--schedule zero-bubble"),
        ("data=2,tensor=2", "--zero 1"),
        ("data=2,tensor=2,pipe=2", "--zero 2 --schedule interleaved"),
    ];
    for (n, spread) in plans.into_iter().enumerate() {
        let [first, again] = ["first", "again"].map(|out| run(&place, &format!("{n}-{out}"), spread));
        assert_eq!(losses(&first), losses(&again), "{spread:?}");
        assert_eq!(first["parameter_hash"], again["parameter_hash"], "{spread:?}");
        assert_eq!(first["val_loss"], again["val_loss"], "{spread:?}");
    }
}

#[test]
fn recomputation_changes_no_bit() {
    let place = place(GPT);
    for (n, mesh) in ["data=1", "pipe=2", "tensor=2,pipe=2"].into_iter().enumerate() {
        let of = |recompute: &str| {
            let more = format!("--set model.dropout=0.1 --set parallel.recompute={recompute}");
            run(&place, &format!("{n}-{recompute}"), (mesh, &more))
        };
        let kept = of("none");
        for again in [of("block"), of("all")] {
            assert_eq!(losses(&again), losses(&kept), "{mesh}");
            assert_eq!(again["parameter_hash"], kept["parameter_hash"], "{mesh}");
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

#[test]
fn a_checkpoint_goes_on_under_another_plan() {
    let place = place(GPT);
    let plans = [
        ("data=2,tensor=2", "--zero 1"),
        ("pipe=2", ""),
        ("data=1", ""),
        ("data=2,pipe=2", "--zero 3 --schedule interleaved"),
        ("tensor=2", "--set parallel.offload=true"),
    ];
    let continued = |from: usize, to: usize| {
        let (mesh, more) = plans[to];
        let out = format!("{from}-{to}");
        copy(&place.path(&format!("{from}")), &place.path(&out));
        succeed(train(&place, &out, (mesh, more)).arg("--resume"));
        losses(&place.summary(&out))
    };
    for (from, others) in [(0, [1, 2, 3]), (2, [0, 3, 4])] {
        let (mesh, more) = plans[from];
        let more = format!("{more} --steps 4");
        let first = losses(&run(&place, &format!("{from}"), (mesh, &more)));
        let wanted = continued(from, from);
        assert_eq!((first.len(), wanted.len()), (4, 8));
        assert_eq!(first, wanted[..4]);
        for to in others {
            let found = continued(from, to);
            assert_eq!(found[..4], wanted[..4]);
            let difference = difference(&wanted[4..], &found[4..]);
            println!("{:?} to {:?}: {difference:.1e}", plans[from], plans[to]);
            assert!(difference < 1e-6, "{:?} to {:?}: {difference:.1e}", plans[from], plans[to]);
        }
    }
}

#[test]
fn plans_that_cannot_be_are_refused_before_anything_runs() {
    let gpt = place(GPT);
    for (mesh, more, wanted) in [
        (
            "data=2",
            "--workers 4",
            "mesh data=2 is for 2 ranks, but the job has 4: use data=4, or start 2 ranks",
        ),
        ("date=2", "", "has no axis `date`; the axes are replica, pipe, data, tensor"),
        ("data=2,data=2", "", "twice"),
        ("pipe=0", "", "at least 1"),
        ("pipe=7", "", "the model has 6 blocks, so it can be cut into at most 6 stages, not 7"),
        ("pipe=4", "--schedule interleaved", "at most 6 stages, not 8"),
        (
            "tensor=3",
            "",
            "layers.0.up.weight: its dimension mlp of 128 does not divide over the 3 ranks of the axis tensor",
        ),
        (
            "tensor=4",
            "--set model.heads=2",
            "layers.0.attention.qkv.weight: its dimension heads of 2 does not divide over the 4 ranks of the axis tensor",
        ),
        ("data=2", "--zero 4", "parallel.zero"),
        ("pipe=2", "--schedule gpip", "use one of gpipe, 1f1b, interleaved, zero-bubble"),
        ("pipe=2", "--set parallel.schedule=gpip", "zero-bubble"),
        ("pipe=2", "--set parallel.chunks=2", "the schedule 1f1b takes 1 model chunk per stage, not 2"),
        (
            "data=8",
            "",
            "a batch of 16 does not divide among 32 (8 workers x 4 micro-batches, as train.accumulate or --micro-batches says); use a batch of 32, or",
        ),
        (
            "tensor=2",
            "--set parallel.sequence=true --set model.block=31",
            "31 tokens cannot be divided evenly over the 2 ranks of the axis tensor",
        ),
        ("tensor=2", "--set parallel.sequence=true --set parallel.layout.mlp=none", "the dimension mlp"),
        ("tensor=2", "--set parallel.layout.mlp=date", "there is no axis `date`"),
        ("tensor=2", "--set parallel.layout.embed=tensor", "both split over the axis tensor"),
        ("data=2", "--set parallel.recompute=always", "parallel.recompute"),
    ] {
        let error = refused(&gpt, (mesh, more));
        assert!(error.contains(wanted), "{mesh} {more}: {error}");
    }
    let error = refused(&place(CNN), ("tensor=2", ""));
    assert!(error.contains("no layers that can be split over the axis tensor; use data and pipe"), "{error}");
}

#[test]
fn a_pipeline_that_stays_half_empty_is_warned_of() {
    let place = place(GPT);
    let output = succeed(&mut train(&place, "few", ("pipe=4", "--micro-batches 2 --steps 1")));
    let wanted =
        "2 micro-batches do not fill a pipeline of 4 stages: it waits 60% of the time; use at least 4";
    assert!(said(&output).contains(wanted), "{}", said(&output));
}

#[test]
fn text_is_the_same_from_every_spread_of_the_model() {
    let place = place(GPT);
    run(&place, "run", ("data=2", "--steps 30 --zero 1"));
    // More tokens than the context of 32 has room for.
    let text = |flags: &str, mesh: &str| {
        let mut command = place.regatta(&["generate", "run", "--prompt", "line 3", "--tokens", "60"]);
        command.args(flags.split_whitespace());
        if !mesh.is_empty() {
            command.args(["--mesh", mesh]);
        }
        let output = succeed(&mut command);
        String::from_utf8(output.stdout).unwrap()
    };
    for flags in ["--temperature 0", "--temperature 1 --top-k 0 --seed 3"] {
        let one = text(flags, "");
        assert!(one.starts_with("line 3") && one.len() > 60, "{one}");
        for mesh in ["tensor=2", "pipe=2", "tensor=2,pipe=2"] {
            assert_eq!(text(flags, mesh), one, "{flags} {mesh}");
        }
    }
    for (mesh, wanted) in [
        ("tensor=3", "layers.0.up.weight: its dimension mlp of 128 does not divide"),
        ("pipe=7", "at most 6 stages, not 7"),
        ("data=2", "would all write the same text"),
        ("replica=2,tensor=2", "would all write the same text"),
        ("pope=2", "no axis `pope`"),
    ] {
        let error = fail(&mut place.regatta(&["generate", "run", "--mesh", mesh]));
        assert!(error.contains(wanted), "{mesh}: {error}");
        // One sentence and not one a rank.
        assert!(!error.contains("rank 0"), "{mesh}: {error}");
    }
    let error = fail(&mut place.regatta(&["generate", "nowhere", "--mesh", "tensor=2"]));
    assert!(error.contains("checkpoint nowhere"), "{error}");
}

/// The number before the first `unit` in `text`.
fn number_before(text: &str, unit: &str) -> f64 {
    let before = text.split(unit).next().unwrap();
    before.split_whitespace().last().unwrap().trim_start_matches('(').parse().unwrap()
}

#[test]
fn a_plan_that_does_not_fit_is_refused_with_the_nearest_that_does() {
    let place = place(GPT);
    for (mesh, more) in [
        ("data=2", ""),
        ("data=2", "--zero 3"),
        ("tensor=2", ""),
        ("pipe=2", "--schedule gpipe"),
        ("data=1", ""),
    ] {
        let refused = |mib: f64| {
            let more = format!("--set model.embed=128 --set parallel.memory_mib={mib} {more}");
            let error = fail(&mut train(&place, "refused", (mesh, &more)));
            assert!(!place.path("refused").exists(), "{error}");
            error
        };
        let takes = number_before(&refused(1.0), " MiB on a rank of stage");
        let limit = 0.95 * takes;
        let error = refused(limit);
        assert!(error.contains(&format!("parallel.memory_mib states {limit:.2} MiB")), "{error}");
        let (bytes, flags) =
            error.split_once("the nearest plan that fits needs ").unwrap().1.split_once(": ").unwrap();
        assert!(number_before(bytes, " MiB") <= limit, "{error}");
        // The flags as they are said, over those that were given.
        let given: Vec<&str> = more.split_whitespace().collect();
        let kept = match given[..] {
            [flag, _] if flags.contains(flag) => "",
            _ => more,
        };
        let mesh = if flags.contains("--mesh") { None } else { Some(mesh) };
        let limit = format!("parallel.memory_mib={limit}");
        let mut command = place.regatta(&["train", "plan.toml", "--out", "fits", "--steps", "1"]);
        command.args(mesh.map(|mesh| ["--mesh", mesh]).into_iter().flatten());
        command.args(["--set", "model.embed=128", "--set", &limit]);
        command.args(kept.split_whitespace()).args(flags.split_whitespace());
        succeed(&mut command);
        fs::remove_dir_all(place.path("fits")).unwrap();
    }
    let more = "--set model.embed=128 --set parallel.memory_mib=1";
    let error = refused(&place, ("data=2", more));
    assert!(error.contains("no plan for this number of ranks fits, the smallest needs"), "{error}");
    // A rank that somebody else has started says the same.
    let mut command = train(&place, "refused", ("data=2", more));
    for (key, value) in
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")]
    {
        command.env(key, value);
    }
    assert_eq!(fail(&mut command), error);
}

#[test]
fn the_memory_foretold_is_the_memory_counted() {
    let place = place(GPT);
    for (mesh, more) in [
        ("data=1", ""),
        ("data=2", "--zero 1"),
        ("data=2", "--zero 2"),
        ("data=2", "--zero 3"),
        ("data=2,tensor=2", "--zero 2 --set optimizer.kind=sgd --set optimizer.momentum=0.9"),
        ("data=2,pipe=2", "--zero 3 --schedule zero-bubble"),
    ] {
        let more = format!("{more} --set model.embed=128 --steps 3");
        let error = fail(&mut train(&place, "out", (mesh, &format!("{more} --set parallel.memory_mib=1"))));
        let stage: usize =
            error.split("of stage ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let summary = run(&place, "out", (mesh, &more));
        fs::remove_dir_all(place.path("out")).unwrap();
        // Stages are the slowest axis of these meshes.
        let ranks = summary["world"].as_u64().unwrap() as usize;
        let stages = if mesh.contains("pipe") { 2 } else { 1 };
        let counted = |kind: &str| {
            let bytes = summary["memory"][stage * ranks / stages][kind].as_f64().unwrap();
            bytes / f64::from(1 << 20)
        };
        let foretold = |kind: &str| number_before(&error, &format!(" MiB of {kind}"));
        for (kind, name) in
            [("parameters", "parameters"), ("gradients", "gradients"), ("optimizer", "optimizer state")]
        {
            let (counted, foretold) = (counted(kind), foretold(name));
            assert!((counted - foretold).abs() < 0.02, "{mesh} {more} {kind}: {counted} {error}");
        }
        let (working, most) = (counted("working"), foretold("buffers for communication"));
        assert!(working <= most + 0.01, "{mesh} {more}: {working} MiB of {most}");
    }
}
