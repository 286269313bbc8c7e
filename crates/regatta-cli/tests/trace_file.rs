//! `--trace`: where it cannot be written, and what is in the file of a run of many steps.

mod common;

use common::{Place, fail, said, succeed};
use serde_json::Value;
use std::fs;

#[test]
fn a_trace_has_the_steps_of_all_ranks() {
    let place = Place::new();
    let more = [
        "--workers",
        "2",
        "--steps",
        "300",
        "--trace",
        "trace.json",
        "--set",
        "sample.prompt=line",
        "--set",
        "sample.tokens=20",
    ];
    succeed(&mut place.train("run", &more));
    let trace: Value = serde_json::from_slice(&fs::read(place.path("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        for step in 1..=300 {
            let cat = format!("step {step}");
            let optimizer = |event: &&Value| {
                event["tid"] == rank && event["cat"] == cat.as_str() && event["name"] == "optimizer"
            };
            assert_eq!(events.iter().filter(optimizer).count(), 1, "{cat} of rank {rank}");
        }
    }
    assert!(events.iter().filter(|event| event["ph"] == "X").all(|event| event["ts"].as_f64() > Some(0.0)));
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_the_first_step() {
    let place = Place::new();
    for workers in ["1", "2"] {
        let out = format!("run-{workers}");
        let error = fail(&mut place.train(&out, &["--workers", workers, "--trace", "nowhere/trace.json"]));
        assert!(error.contains("cannot write the trace nowhere/trace.json"), "{error}");
        assert!(!place.path(&out).join("metrics.jsonl").exists(), "it has trained");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_disk_that_is_full_at_the_end_costs_the_trace_alone() {
    let place = Place::new();
    let output = succeed(&mut place.train("run", &["--workers", "1", "--trace", "/dev/full"]));
    assert!(said(&output).contains("no trace: cannot write the trace /dev/full"), "{}", said(&output));
    assert_eq!(place.summary("run")["steps"], 12);
}
