//! Messages that cannot be written: a reader that goes away, a full disk, a terminal that was closed.

#![cfg(target_os = "linux")]

mod common;

use common::{Place, said};
use std::fs::File;
use std::process::{Command, Stdio};

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader is gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

type Way = (&'static str, fn() -> Stdio);
const WAYS: [Way; 2] = [("full", full), ("closed", closed)];

#[test]
fn a_trained_run_is_a_success_whatever_happens_to_its_messages() {
    let place = Place::new();
    for workers in ["1", "2"] {
        for (name, way) in WAYS {
            for (stdout, stderr) in [(true, false), (false, true), (true, true)] {
                let out = format!("{workers}-{name}-{stdout}-{stderr}");
                let more =
                    ["--workers", workers, "--set", "sample.prompt=\"line\"", "--set", "sample.tokens=5"];
                let mut command = place.train(&out, &more);
                command.stdout(if stdout { way() } else { Stdio::piped() });
                command.stderr(if stderr { way() } else { Stdio::piped() });
                let output = command.output().unwrap();
                assert_eq!(output.status.code(), Some(0), "{out}: {}", said(&output));
                assert_eq!(place.summary(&out)["steps"], 12);
            }
        }
    }
}

#[test]
fn commands_whose_text_is_the_result_tell_a_full_disk_from_a_reader_that_has_seen_enough() {
    let place = Place::new();
    common::succeed(&mut place.train("run", &["--workers", "1"]));
    let bench = ["bench", "collective", "--workers", "2", "--sizes", "4,1K,4K"];
    let threads = [&bench[..], &["--transport", "thread"]].concat();
    let commands: [&[&str]; 6] = [
        &["generate", "run", "--tokens", "20"],
        &["plan", "show", "small.toml", "--set", "data.path=text.txt", "--workers", "2"],
        &["checkpoint", "inspect", "run"],
        &["checkpoint", "verify", "run"],
        &bench,
        &threads,
    ];
    for arguments in commands {
        let output = place.regatta(arguments).stdout(closed()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", said(&output));
        assert_eq!(said(&output), "", "{arguments:?}");
        let output = place.regatta(arguments).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains("No space left"), "{arguments:?}: {}", said(&output));
        // Nothing is left to say it to.
        let output = place.regatta(arguments).stdout(full()).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn what_was_done_counts_not_what_was_said_of_it() {
    let place = Place::new();
    for (_, way) in WAYS {
        let data = ["data", "text", "text.txt", "--tokenizer", "bytes"];
        let output = place.regatta(&data).stdout(way()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        // Errors that cannot be told are still errors.
        let output = place.regatta(&["data", "text", "nowhere"]).stderr(way()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    }
}

#[test]
fn pipelines_of_a_shell_end_quietly() {
    let place = Place::new();
    common::succeed(&mut place.train("run", &["--workers", "1"]));
    let regatta = common::in_shell();
    let bench = "bench collective --workers 2 --sizes 4,1K";
    let data = "data text text.txt --tokenizer bytes";
    for (left, right) in [
        ("generate run --tokens 100", "head -c 3"),
        (bench, "head -1"),
        (data, "true"),
        ("train small.toml --set data.path=text.txt --workers 2 --out o1 2>&1", "head -1"),
        ("train small.toml --set data.path=text.txt --workers 1 --out o2 2>&1", "true"),
        ("checkpoint inspect run", "true"),
        ("--help", "true"),
    ] {
        let script = format!("{regatta} {left} | {right}; exit ${{PIPESTATUS[0]}}");
        let clean = place.regatta(&[]);
        let mut command = Command::new("bash");
        command.args(["-c", &script]).current_dir(place.path(""));
        for (key, _) in clean.get_envs() {
            command.env_remove(key);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{left} | {right}: {}", said(&output));
        assert!(!said(&output).contains("panicked"), "{left} | {right}: {}", said(&output));
    }
}
