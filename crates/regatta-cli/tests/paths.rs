//! Paths are bytes: folders and files whose names are no text.

#![cfg(unix)]

mod common;

use common::{Place, fail, said, succeed};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A name that is no UTF-8.
fn name(text: &str) -> OsString {
    let mut name = OsString::from(text);
    name.push(OsStr::from_bytes(b"-\xff"));
    name
}

#[test]
fn names_that_are_no_text_are_names() {
    let place = Place::new();
    let text = place.path("").join(name("text"));
    fs::copy(place.path("text.txt"), &text).unwrap();
    let config = place.path("").join(name("config"));
    fs::copy(place.path("small.toml"), &config).unwrap();
    let folder = |text: &str| place.path("").join(name(text));
    for workers in ["1", "2"] {
        let run = name(&format!("run{workers}"));
        let trace = name("trace");
        let mut out = OsString::from("--out=");
        out.push(&run);
        let train = |more: &[&str]| {
            let mut command = place.regatta(&["train"]);
            command.arg(&config).args(["--set", "data.path=text.txt", "--workers", workers]).arg(&out);
            command.arg("--trace").arg(&trace).args(more);
            succeed(&mut command)
        };
        train(&[]);
        train(&["--resume", "--steps", "15"]);
        assert!(folder("trace").exists());
        assert!(place.path("").join(&run).join("summary.json").exists());
        let generated = succeed(place.regatta(&["generate"]).arg(&run).args(["--tokens", "5"]));
        assert!(!said(&generated).is_empty());
        for command in ["inspect", "verify"] {
            succeed(place.regatta(&["checkpoint", command]).arg(&run));
        }
        let exported = name(&format!("exported{workers}"));
        succeed(place.regatta(&["checkpoint", "export"]).arg(&run).arg("--out").arg(&exported));
        let imported = name(&format!("imported{workers}"));
        succeed(place.regatta(&["checkpoint", "import"]).arg(&exported).arg("--out").arg(&imported));
    }
    succeed(place.regatta(&["generate"]).arg(name("run2")).args(["--tokens", "5", "--mesh", "tensor=2"]));
    let mut command = place.regatta(&["data", "text"]);
    command.arg(&text).arg("--cache").arg(name("cache")).args(["--tokenizer", "bytes"]);
    succeed(&mut command);
    assert!(folder("cache").exists());
    succeed(place.regatta(&["launch", "-n", "2", "--", "ls"]).arg(&text));
    let plot = name("plot");
    let bench = ["bench", "collective", "--workers", "2", "--sizes", "4", "--plot"];
    succeed(place.regatta(&bench).arg(&plot));
    assert!(Path::new(&folder("plot")).exists());
}

#[test]
fn what_cannot_be_a_name_is_an_error() {
    let place = Place::new();
    // A value of the configuration is text.
    let mut set = OsString::from("data.path=");
    set.push(name("text"));
    let error = fail(place.regatta(&["train", "small.toml", "--set"]).arg(&set));
    assert!(error.contains("UTF-8"), "{error}");
    let error = fail(place.regatta(&["train"]).arg(name("nothing")));
    assert!(error.contains("nothing-"), "{error}");
}
