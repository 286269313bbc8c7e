//! Gradients that travel in fewer bytes: whole runs of every encoding.

mod common;

use common::{Place, difference, fail, losses, said, succeed};

/// Every encoding, with keys under which so small a model still learns, and how far its last losses may be from those without.
const KINDS: [(&str, &[&str], f64); 9] = [
    ("bf16", &[], 0.02),
    ("f16", &[], 0.02),
    ("int8", &[], 0.05),
    ("int4", &[], 0.15),
    ("onebit", &["compress.warmup=10"], 0.5),
    ("topk", &["compress.ratio=0.1"], 0.5),
    ("randomk", &["compress.ratio=0.2"], 0.7),
    ("dgc", &["compress.ratio=0.1", "compress.warmup=10"], 0.7),
    ("powersgd", &["compress.rank=2"], 0.6),
];

fn sets(kind: &str, more: &[&str]) -> Vec<String> {
    let kind = format!("compress.kind={kind}");
    std::iter::once(kind.as_str())
        .chain(more.iter().copied())
        .flat_map(|set| ["--set".into(), set.into()])
        .collect()
}

fn train(place: &Place, out: &str, sets: &[String], more: &[&str]) -> std::process::Command {
    let arguments: Vec<&str> = more.iter().copied().chain(sets.iter().map(String::as_str)).collect();
    place.train(out, &arguments)
}

fn last(summary: &serde_json::Value) -> f64 {
    let losses = losses(summary);
    losses[losses.len() - 5..].iter().sum::<f64>() / 5.0
}

#[test]
fn every_encoding_learns_and_resumes_bit_for_bit() {
    let place = Place::new();
    let common = ["--workers", "2", "--steps", "40"];
    succeed(&mut place.train("plain", &common));
    let plain = place.summary("plain");
    let first = losses(&plain)[0];
    for (kind, more, bound) in KINDS {
        let sets = sets(kind, more);
        succeed(&mut train(&place, kind, &sets, &common));
        let summary = place.summary(kind);
        let (own, without) = (last(&summary), last(&plain));
        assert!(own < 0.8 * first, "{kind} does not learn: from {first} to {own}");
        assert!(own < without + bound, "{kind}: {own} instead of {without}");
        let half = format!("{kind}-half");
        // The learning rate does not depend on the number of steps.
        succeed(&mut train(&place, &half, &sets, &["--workers", "2", "--steps", "20"]));
        let output = said(&succeed(&mut train(
            &place,
            &half,
            &sets,
            &["--workers", "2", "--steps", "40", "--resume"],
        )));
        assert!(!output.contains("differs"), "{output}");
        assert_eq!(difference(&losses(&place.summary(&half)), &losses(&summary)), 0.0, "{kind}");
        assert_eq!(place.summary(&half)["parameter_hash"], summary["parameter_hash"], "{kind}");
    }
}

#[test]
fn another_number_of_workers_goes_on_with_what_was_not_sent() {
    let place = Place::new();
    for (kind, more, _) in KINDS {
        let sets = sets(kind, more);
        succeed(&mut train(&place, kind, &sets, &["--workers", "4", "--steps", "20"]));
        let before = last(&place.summary(kind));
        for workers in ["2", "1"] {
            let steps = if workers == "2" { "30" } else { "35" };
            succeed(&mut train(&place, kind, &sets, &["--workers", workers, "--steps", steps, "--resume"]));
        }
        let after = last(&place.summary(kind));
        assert!(after < before + 0.05, "{kind}: from {before} to {after}");
    }
}

#[test]
fn plans_of_all_kinds_have_encodings() {
    let place = Place::new();
    for mesh in ["data=2,tensor=2", "replica=2,data=2", "data=2,pipe=2"] {
        for (kind, more) in [
            ("int8", None),
            ("onebit", Some("compress.warmup=1")),
            ("topk", Some("compress.ratio=0.1")),
            ("powersgd", None),
        ] {
            let mesh_set = format!("parallel.mesh={mesh}");
            let more: Vec<&str> = more.into_iter().chain([mesh_set.as_str()]).collect();
            let sets = sets(kind, &more);
            let out = format!("{kind}-{}", mesh.replace([',', '='], "-"));
            succeed(&mut train(&place, &out, &sets, &["--steps", "4", "--set", "train.check_every=1"]));
        }
    }
}

#[test]
fn activations_travel_in_fewer_bytes() {
    let place = Place::new();
    for schedule in ["1f1b", "zero-bubble", "interleaved"] {
        for mesh in ["pipe=2", "pipe=2,tensor=2"] {
            let (schedule_set, mesh_set) =
                (format!("parallel.schedule={schedule}"), format!("parallel.mesh={mesh}"));
            let run = |kind: &str, bound: f64, before: Option<&[f64]>| {
                let kind_set = format!("compress.pipeline={kind}");
                let common = [schedule_set.as_str(), &mesh_set, "train.accumulate=4", "train.check_every=1"];
                let sets: Vec<String> = common
                    .iter()
                    .copied()
                    .chain((kind != "none").then_some(kind_set.as_str()))
                    .flat_map(|set| ["--set".to_string(), set.to_string()])
                    .collect();
                let out = format!("{kind}-{schedule}-{}", mesh.replace([',', '='], "-"));
                succeed(&mut train(&place, &out, &sets, &["--steps", "12"]));
                let own = losses(&place.summary(&out));
                if let Some(before) = before {
                    let far = difference(&own, before);
                    assert!(far > 0.0 && far < bound, "{out}: {far}");
                }
                own
            };
            let plain = run("none", 0.0, None);
            run("bf16", 0.02, Some(&plain));
            run("int8", 0.1, Some(&plain));
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let place = Place::new();
    let refused = |more: &[&str]| {
        let sets: Vec<String> = more.iter().flat_map(|set| ["--set".into(), set.to_string()]).collect();
        fail(&mut train(&place, "run", &sets, &["--workers", "2"]))
    };
    for (sets, reason) in [
        (&["compress.kind=gzip"][..], "bf16"),
        (&["compress.pipeline=topk", "parallel.mesh=pipe=2"], "activations do not travel as \"topk\""),
        (&["compress.kind=topk", "compress.ratio=0"], "compress.ratio"),
        (&["compress.kind=topk", "compress.ratio=1.5"], "compress.ratio"),
        (&["compress.kind=powersgd", "compress.rank=0"], "compress.rank"),
        (&["compress.kind=int8", "compress.ratio=0.5"], "it is for \"topk\", \"randomk\" and \"dgc\""),
        (&["compress.kind=topk", "parallel.zero=1"], "parallel.zero = 1"),
        (&["compress.kind=topk", "train.precision=f16"], "train.precision = \"bf16\""),
        (
            &["compress.kind=dgc", "optimizer.kind=sgd", "optimizer.momentum=0.9"],
            "use optimizer.momentum = 0 and compress.momentum",
        ),
    ] {
        let said = refused(sets);
        assert!(said.contains(reason), "{sets:?}: {said}");
    }
    // One worker sends nothing: a warning.
    let alone = sets("topk", &["compress.ratio=0.1"]);
    let output = said(&succeed(&mut train(&place, "alone", &alone, &["--workers", "1", "--steps", "2"])));
    assert!(output.contains("compress.kind has no effect"), "{output}");
}
