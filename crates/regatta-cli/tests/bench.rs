//! Whole programs that measure, tune and explain failures.

#![cfg(target_os = "linux")]

mod common;

use common::{Place, fail, pid_of, said, signal, succeed, until};
use regatta_comm::rendezvous::World;
use regatta_comm::{Group, Options, ReduceOp};
use serde_json::Value;
use std::fs;
use std::process::{Output, Stdio};

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

#[test]
fn every_operation_by_every_algorithm_over_every_transport_is_right() {
    let place = Place::new();
    let arguments = "bench collective --op all --algorithm all --workers 3 --transport thread,shm,tcp \
                     --sizes 4,1K,100K --rounds 1 --json --plot all.svg";
    let output = succeed(&mut place.regatta(&arguments.split_whitespace().collect::<Vec<_>>()));
    let lines = lines(&output);
    for transport in ["thread", "shm", "tcp"] {
        let of = |op: &str, algorithm: &str| {
            let wanted = |line: &&Value| {
                (&line["transport"], &line["op"], &line["algorithm"])
                    == (&transport.into(), &op.into(), &algorithm.into())
            };
            lines.iter().filter(wanted).count()
        };
        let direct = if transport == "tcp" { 0 } else { 3 };
        for op in ["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast"] {
            assert_eq!((of(op, "ring"), of(op, "direct")), (3, direct), "{transport} {op}");
        }
        for (op, algorithm) in [
            ("all_reduce", "tree"),
            ("all_reduce", "doubling"),
            ("all_reduce", "halving_doubling"),
            ("gather", "linear"),
            ("scatter", "linear"),
            ("all_to_all", "pairwise"),
            ("all_to_all", "bruck"),
            ("send_recv", "-"),
        ] {
            assert_eq!(of(op, algorithm), 3, "{transport} {op} {algorithm}");
        }
        assert_eq!(of("barrier", "dissemination"), 1, "{transport}");
    }
    for line in &lines {
        assert_eq!((line["errors"].as_u64(), line["world"].as_u64()), (Some(0), Some(3)), "{line}");
        assert!(line["median_us"].as_f64().unwrap() >= line["min_us"].as_f64().unwrap(), "{line}");
    }
    let svg = fs::read_to_string(place.path("all.svg")).unwrap();
    assert!(svg.contains("bruck, tcp, 3 ranks"));
}

#[test]
fn a_table_has_medians_of_rounds_types_and_memories() {
    let place = Place::new();
    let run = |text: &str| place.regatta(&text.split_whitespace().collect::<Vec<_>>());
    let collective = "bench collective --op all_reduce,all_gather --sizes 1K,1M";
    let all =
        format!("{collective} --workers 1,2 --rounds 2 --transport shm --memory registered --dtype bf16");
    let text = said(&succeed(&mut run(&all)));
    let rows: Vec<&str> = text.lines().filter(|line| line.contains(" bf16 ")).collect();
    // The group of one is made of threads; both have a heading.
    assert_eq!((rows.len(), text.matches("median us").count()), (8, 2), "{text}");
    assert!(text.contains("# shm, 2 ranks, registered memory") && text.contains("round 2 of 2"), "{text}");
    let bounded: Vec<&&str> = rows.iter().filter(|row| row.contains('%')).collect();
    assert!(bounded.len() == 1 && bounded[0].contains("1048576"), "{text}");
    for (text, part) in [
        ("bench collective --transport tcp --algorithm direct", "use ring"),
        ("bench collective --op all --transport tcp --algorithm native", "carries out no operation over tcp"),
        ("bench collective --op send_recv --algorithm ring", "leave --algorithm out"),
        ("bench collective --sizes 5", "multiple of 4"),
        ("bench collective --sizes 4,4k", "write 4096, 16K or 4M"),
        ("bench collective --op fly", "all_reduce"),
        ("bench collective --dtype u8", "f32, f16, bf16, f64, i32"),
        ("bench collective --workers 0", "at least 1 worker"),
        ("bench collective --sizes 4 --plot no/such/folder.svg", "cannot write no/such/folder.svg"),
        ("bench tune --transport thread", "the tuning table has no rows for thread"),
        ("bench tune --workers 1", "2 or more"),
        ("launch -n 2 --deadline soon -- true", "not a number of seconds"),
    ] {
        let error = fail(&mut run(text));
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_tuned_table_is_used_by_the_next_run() {
    let place = Place::new();
    let tune = "bench tune --workers 2,3 --transport shm,tcp --sizes 1K,64K --rounds 1";
    let tune: Vec<&str> = tune.split_whitespace().collect();
    // The file that the variable names need not be there yet.
    let text = said(&succeed(place.regatta(&tune).env("REGATTA_TUNING", "mine.txt")));
    assert!(text.contains("REGATTA_TUNING=mine.txt"), "{text}");
    let table = fs::read_to_string(place.path("mine.txt")).unwrap();
    assert!(table.starts_with("# Measured by"), "{table}");
    for start in ["all_reduce shm 2 ", "all_reduce tcp 3 ", "barrier shm 3 - ", "all_to_all tcp 2 "] {
        assert!(table.lines().any(|line| line.starts_with(start)), "{start} in {table}");
    }
    // The algorithm of the last row for three ranks over TCP.
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split(' ').collect()).collect();
    let expected = rows.iter().find(|row| row[..] == ["all_reduce", "tcp", "3", "-", row[row.len() - 1]]);
    let arguments = "bench collective --workers 3 --transport tcp --sizes 4M --json";
    let mut run = place.regatta(&arguments.split_whitespace().collect::<Vec<_>>());
    let lines = lines(&succeed(run.env("REGATTA_TUNING", "mine.txt")));
    assert_eq!(lines[0]["algorithm"], *expected.unwrap().last().unwrap());
    fs::write(place.path("mine.txt"), "all_reduce tcp 3 - magic").unwrap();
    assert!(fail(run.env("REGATTA_TUNING", "mine.txt")).contains("line 1 of the tuning table"));
}

/// No test by itself: a rank of the jobs below.
#[test]
fn a_rank_that_misbehaves() {
    let Some(world) = World::from_env().unwrap() else { return };
    let options = Options::from_env().unwrap();
    assert_eq!((options.deadline.as_secs(), options.algorithm), (7, Some(regatta_comm::Algorithm::Ring)));
    let group = Group::connect(&world, &options).unwrap();
    group.barrier().unwrap();
    let outcome = match group.rank() {
        1 => group.all_gather(&[1.0f64; 512], &mut [0.0; 1024]),
        _ => group.all_reduce(&mut [1.0f32; 1024], ReduceOp::Sum),
    };
    outcome.unwrap();
}

#[test]
fn a_trace_names_both_sides_of_a_mismatch() {
    let place = Place::new();
    let program = std::env::current_exe().unwrap().display().to_string();
    let launch =
        "launch -n 2 --deadline 7 --algorithm ring -- PROGRAM --exact a_rank_that_misbehaves --nocapture";
    for transport in ["shm", "tcp"] {
        let launch = launch.replace("-n 2", &format!("-n 2 --transport {transport}"));
        let arguments: Vec<&str> =
            launch.split(' ').map(|word| if word == "PROGRAM" { &program } else { word }).collect();
        // The ranks are tests: they fail by a panic, and the launcher hands their code on.
        let output = place.regatta(&arguments).env("REGATTA_TRACE", "trace").output().unwrap();
        let error = said(&output);
        assert_eq!(output.status.code(), Some(101), "{error}");
        assert!(error.contains("regatta trace trace"), "{error}");
        // The parent of the jobs' folders: the newest counts.
        let text = said(&succeed(&mut place.regatta(&["trace", "trace"])));
        let sentence =
            "group 0: rank 1 called all_gather #2 f64[512], but rank 0 called all_reduce #2 f32[1024] sum";
        assert!(text.trim_end().ends_with(sentence), "{text}");
        for part in ["a job of 2 ranks", "rank 0 (", "rank 1 (", "DIFFERENT CALL", "--> all_reduce #2"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let rows = lines(&succeed(&mut place.regatta(&["trace", "trace", "--json", "--last", "1"])));
        assert_eq!((rows.len(), &rows[0]["first_broken"]), (1, &true.into()));
        assert_eq!(rows[0]["ranks"][1]["call"], "all_gather #2 f64[512]");
    }
    let newest = |place: &Place| {
        let folders = fs::read_dir(place.path("trace")).unwrap().flatten().map(|entry| entry.path());
        folders.max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap()).unwrap()
    };
    fs::write(newest(&place).join("rank-1-group-0.jsonl"), "{\"rank\":1,").unwrap();
    let text = said(&succeed(&mut place.regatta(&["trace", "trace"])));
    assert!(text.contains("rank-1-group-0.jsonl is skipped"), "{text}");
    assert!(fail(&mut place.regatta(&["trace", "."])).contains("no rank-R-group-G.jsonl"));
}

#[test]
fn a_training_run_leaves_its_trace_in_its_folder() {
    let place = Place::new();
    let more = ["--workers", "2", "--steps", "4000", "--algorithm", "ring", "--transport", "tcp"];
    let mut train = place.train("run", &[&more[..], &["--set", "parallel.deadline_s=1"]].concat());
    let child = train.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    until("some steps", || place.path("run/metrics.jsonl").exists());
    signal("-KILL", pid_of(&child, 1));
    assert!(!child.wait_with_output().unwrap().status.success());
    let text = said(&succeed(&mut place.regatta(&["trace", "run/trace"])));
    assert!(text.contains("rank 1 wrote nothing") && text.contains("rank 0 ("), "{text}");
}

#[test]
fn a_step_is_taken_apart() {
    let place = Place::new();
    let told = |more: &[&str]| {
        let text = ["--set", "data.path=text.txt", "--steps", "3", "--trace", "trace.json"];
        let output = succeed(place.regatta(&["bench", "step", "small.toml"]).args(text).args(more));
        String::from_utf8(output.stdout).unwrap()
    };
    let table = told(&["--workers", "1"]);
    for wanted in
        ["operation", "GFLOP/s", "linear", "attention", "cross entropy", "optimizer", "% of the cores' peak"]
    {
        assert!(table.contains(wanted), "{wanted} is not in {table}");
    }
    // Of both ranks, with what they wait for; the rows are all of the step.
    let profiles: Vec<Value> = serde_json::from_str(&told(&["--workers", "2", "--json"])).unwrap();
    assert_eq!(profiles.len(), 2);
    for profile in &profiles {
        let rows = profile["rows"].as_array().unwrap();
        let of = |name: &str, phase: &str| {
            let found = rows.iter().find(|row| row["name"] == name && row["phase"] == phase);
            found.unwrap_or_else(|| panic!("{name} {phase} is not in {rows:?}"))
        };
        of("wait for gradients", "update");
        let (forward, backward) = (of("linear", "forward"), of("linear", "backward"));
        // Two layers of four products, and the output.
        assert_eq!((forward["calls"].as_f64(), backward["calls"].as_f64()), (Some(9.0), Some(9.0)));
        assert_eq!(backward["flops"].as_f64(), forward["flops"].as_f64().map(|flops| 2.0 * flops));
        assert!(profile["peak_flops_per_s"].as_f64().unwrap() > 0.0);
    }
    let trace: Value = serde_json::from_str(&fs::read_to_string(place.path("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        for name in ["F0", "linear", "optimizer"] {
            let there = |event: &Value| {
                event["tid"] == rank && event["name"].as_str().is_some_and(|n| n.starts_with(name))
            };
            assert!(events.iter().any(there), "rank {rank} has no {name}");
        }
    }
}
