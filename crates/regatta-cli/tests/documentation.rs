//! The commands of README.md and of docs/*.md, run as a reader would, in a fresh folder for each file.
//!
//! What is run: every fenced block marked `sh`, in order, in one shell for each file, which stops at the first command that
//! fails. `text`, `console`, `toml` and blocks without a mark are not run. A comment at the end of a line says more:
//!
//! - `# fails` (with or without a reason): the command must fail.
//! - `# not run: REASON`: the line is left out, and the test says so.
//!
//! A line that names a program which the machine lacks ([`PROGRAMS`]), or an example that is not built (a whole `cargo test`
//! builds them), is left out, and the test says so.
//!
//! So that it takes minutes and not hours, some things are others than they seem ([`budget`], [`SHIM`], [`configs`]):
//!
//! - `cargo run --release -- ...` and `regatta ...` run the program under test; `cargo build` and `cargo test` do nothing.
//! - a run takes 3 steps where the command does not say, and 5 at most; configurations are narrow, and read little text.
//! - `regatta data mnist`, which needs the network, finds its files made up; timings are of few and small sizes.
//! - `FILE` and `tinyshakespeare.txt` are a made-up text, `FOLDER` the folder that a failed job left, `config.toml` a small
//!   configuration.

#![cfg(target_os = "linux")]

mod common;

use common::{Place, SMALL};
use regatta_comm::{Group, Options, ReduceOp};
use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Programs of others: a line that names one of these is run where the machine has it.
const PROGRAMS: [&str; 14] = [
    "mpirun",
    "mpiexec",
    "torchrun",
    "srun",
    "sbatch",
    "salloc",
    "scontrol",
    "kubectl",
    "docker",
    "ssh",
    "tmux",
    "openssl",
    "aws",
    "nvidia-smi",
];

/// Longer than all commands of a file take on a busy machine.
const LIMIT: Duration = Duration::from_secs(1200);

/// `regatta` as the documents' commands find it: the program under test with a small budget.
const SHIM: &str = r#"#!/bin/bash
words=() steps= after=
for word in "$@"; do
  case $after in
    --steps) steps=yes; [ "$word" -gt 5 ] 2>/dev/null && word=5 ;;
  esac
  after=$word
  words+=("$word")
done
case "$1 $2" in
  "data mnist") exit 0 ;;
  "bench collective") [[ " $* " == *" --sizes "* ]] || words+=(--sizes 4,1K) ;;
  "bench tune") words+=(--sizes 1K --workers 2 --rounds 1 --op all_reduce) ;;
  "bench step") [ -n "$steps" ] || words+=(--steps 3) ;;
  "train "*) [ -n "$steps" ] || [[ " $* " == *" --help "* ]] || words+=(--steps 3) ;;
esac
exec "$REGATTA_UNDER_TEST" "${words[@]}"
"#;

/// `cargo` as the documents' commands find it.
const CARGO: &str = r#"#!/bin/bash
[ "$1" = run ] || exit 0
while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
shift
exec regatta "$@"
"#;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Whether `word` is none of [`PROGRAMS`] and no example, or is there.
fn is_there(word: &str) -> bool {
    match word.strip_prefix("target/release/examples/") {
        Some(example) => examples().join(example).is_file(),
        None => !PROGRAMS.contains(&word) || installed(word),
    }
}

/// Where cargo puts examples.
fn examples() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_regatta")).with_file_name("examples")
}

fn installed(program: &str) -> bool {
    search_path().iter().any(|folder| folder.join(program).is_file())
}

/// The machine's, and where torchrun is, if anywhere.
fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let python = std::env::var_os("REGATTA_PYTHON").map(PathBuf::from);
    folders.extend(python.as_deref().and_then(Path::parent).map(Path::to_path_buf));
    folders
}

/// The commands of a document as one script, and what is left out with the reasons.
fn script(document: &str) -> (String, Vec<String>) {
    let mut script = String::from("set -eu -o pipefail\n");
    let mut left_out = vec![];
    for block in blocks(document) {
        for line in commands(&block) {
            let (command, comment) =
                line.rsplit_once(" # ").map_or((line.as_str(), ""), |(a, b)| (a, b.trim()));
            let mut words = command.split(|c: char| !c.is_alphanumeric() && !"-_./".contains(c));
            let missing = words.find(|word| !is_there(word));
            if let Some(reason) = comment.strip_prefix("not run") {
                left_out.push(format!("left out: `{command}`{reason}"));
            } else if let Some(missing) = missing.filter(|_| !line.trim_start().starts_with('#')) {
                left_out.push(format!("skipped: `{command}`: {missing} is not there"));
            } else if comment == "fails" || comment.starts_with("fails:") {
                let _ = writeln!(
                    script,
                    "if {}; then echo 'this should have failed' >&2; exit 1; fi",
                    budget(command)
                );
            } else {
                let _ = writeln!(script, "{}", budget(command));
            }
        }
    }
    (script, left_out)
}

/// The blocks marked `sh`.
fn blocks(document: &str) -> Vec<String> {
    let mut blocks = vec![];
    let mut inside: Option<(bool, String)> = None;
    for line in document.lines() {
        match (&mut inside, line.trim_start().strip_prefix("```")) {
            (None, Some(mark)) => inside = Some((mark.trim() == "sh", String::new())),
            (Some(_), Some(_)) => {
                blocks.extend(inside.take().filter(|(shell, _)| *shell).map(|(_, text)| text))
            }
            (Some((_, text)), None) => text.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    blocks
}

/// The lines of a block; one that ends with a backslash goes on in the next.
fn commands(block: &str) -> Vec<String> {
    block.replace("\\\n", " ").lines().map(String::from).collect()
}

/// The command with the names of files that there are.
fn budget(command: &str) -> String {
    let known = [("FILE", "text.txt"), ("FOLDER", "failed")];
    let mut words: Vec<String> = command.split(' ').map(String::from).collect();
    for word in &mut words {
        for (name, file) in known {
            match word.strip_suffix(name) {
                Some(before) if before.is_empty() || before.ends_with('=') => {
                    *word = format!("{before}{file}")
                }
                _ => {}
            }
        }
    }
    words.join(" ")
}

fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The configurations of `folder` in the repository, narrow and short.
fn configs(folder: &str, place: &Place) {
    let to = place.path(folder);
    fs::create_dir_all(&to).unwrap();
    let configurations = fs::read_dir(repository().join(folder)).unwrap().flatten();
    for entry in configurations.filter(|entry| entry.path().extension().is_some_and(|end| end == "toml")) {
        let text = fs::read_to_string(entry.path()).unwrap();
        let small = |line: &str| {
            let key = line.split('=').next().unwrap_or_default().trim();
            match key {
                "embed" => "embed = 64".into(),
                "channels" if !line.contains('[') => "channels = 8".into(),
                "batch" | "batch_per_worker" => format!("{key} = 8"),
                "steps" => "steps = 3".into(),
                "eval_batches" => "eval_batches = 1".into(),
                "vocab_size" => "vocab_size = 300".into(),
                "max_mib" => "max_mib = 1".into(),
                "samples" => "samples = 400".into(),
                "warmup" => "warmup = 1".into(),
                _ => line.to_string(),
            }
        };
        let lines: Vec<String> = text.lines().map(small).collect();
        fs::write(to.join(entry.file_name()), lines.join("\n")).unwrap();
    }
}

/// Digits as `regatta data mnist` prepares them.
fn digits(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for (name, count) in [("train", 400usize), ("t10k", 40)] {
        let file = |kind: &str, header: Vec<u8>, shape: &[u32], data: Vec<u8>| {
            let sides = shape.iter().flat_map(|side| side.to_be_bytes());
            let bytes: Vec<u8> = header.into_iter().chain(sides).chain(data).collect();
            fs::write(folder.join(format!("{name}-{kind}-ubyte")), bytes).unwrap();
        };
        let pixels = (0..count * 28 * 28).map(|i| (i * 7 % 251) as u8).collect();
        file("images-idx3", vec![0, 0, 8, 3], &[count as u32, 28, 28], pixels);
        file("labels-idx1", vec![0, 0, 8, 1], &[count as u32], (0..count).map(|i| (i % 10) as u8).collect());
    }
}

/// What a job leaves whose ranks disagree.
fn failed_job(folder: &Path) {
    let options = Options::default().trace(std::path::PathBuf::from(folder));
    let ranks = Group::threads_with(2, &options).unwrap().into_iter().map(|group| {
        std::thread::spawn(move || {
            let len = 7 + group.rank();
            group.all_reduce(&mut vec![0i32; len], ReduceOp::Max).unwrap_err();
        })
    });
    ranks.collect::<Vec<_>>().into_iter().for_each(|rank| rank.join().unwrap());
}

/// A folder with all that the documents speak of.
fn prepare(place: &Place) {
    let text: String = (0..20_000).map(|n| format!("line {} has {} words\n", n % 97, n * n % 31)).collect();
    for name in ["text.txt", "tinyshakespeare.txt"] {
        fs::write(place.path(name), &text).unwrap();
    }
    fs::write(
        place.path("config.toml"),
        SMALL.replace("kind = \"text\"", "kind = \"text\"\npath = \"text.txt\""),
    )
    .unwrap();
    configs("configs", place);
    configs("crates/regatta/examples", place);
    digits(&place.path("data/mnist"));
    failed_job(&place.path("failed"));
    fs::create_dir_all(place.path("bin")).unwrap();
    executable(&place.path("bin/regatta"), SHIM);
    executable(&place.path("bin/cargo"), CARGO);
    fs::create_dir_all(place.path("target/release")).unwrap();
    symlink(place.path("bin/regatta"), place.path("target/release/regatta")).unwrap();
    symlink(examples(), place.path("target/release/examples")).unwrap();
}

/// Runs the commands of `document`, or says why they failed.
fn run(document: &Path) -> Result<(), String> {
    let name = document.strip_prefix(repository()).unwrap_or(document).display().to_string();
    let (script, left_out) = script(&fs::read_to_string(document).unwrap());
    for line in left_out {
        eprintln!("{line} ({name})");
    }
    let place = Place::new();
    prepare(&place);
    let folders = [vec![place.path("bin")], search_path()].concat();
    // What is wanted here of the environment is the test's; a launcher's variables are removed.
    let clean = place.regatta(&[]);
    let mut shell = Command::new("bash");
    for (key, value) in clean.get_envs() {
        if value.is_none() {
            shell.env_remove(key);
        }
    }
    let log = File::create(place.path("log")).unwrap();
    shell
        .args(["-x", "-c", &script])
        .current_dir(clean.get_current_dir().unwrap())
        .env("PATH", std::env::join_paths(folders).unwrap())
        .env("REGATTA_UNDER_TEST", env!("CARGO_BIN_EXE_regatta"))
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .process_group(0);
    let mut shell = shell.spawn().unwrap();
    let begun = Instant::now();
    let status = loop {
        match shell.try_wait().unwrap() {
            Some(status) => break status,
            None if begun.elapsed() > LIMIT => {
                let group = format!("-{}", shell.id());
                let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
                break shell.wait().unwrap();
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let log = String::from_utf8_lossy(&fs::read(place.path("log")).unwrap()).into_owned();
    eprintln!("{name}: {} commands in {:.0} s", script.lines().count() - 1, begun.elapsed().as_secs_f64());
    if status.success() {
        return Ok(());
    }
    let end: Vec<&str> = log.lines().rev().take(40).collect();
    Err(format!("{name}: {status}\n{}", end.into_iter().rev().collect::<Vec<_>>().join("\n")))
}

#[test]
fn every_command_of_the_readme_works() {
    run(&repository().join("README.md")).unwrap_or_else(|problem| panic!("{problem}"));
}

#[test]
fn every_command_of_the_documents_works() {
    let documents = fs::read_dir(repository().join("docs")).unwrap().flatten().map(|entry| entry.path());
    let mut documents: Vec<_> =
        documents.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    documents.sort();
    let problems: Vec<String> = documents.iter().filter_map(|document| run(document).err()).collect();
    assert!(problems.is_empty(), "{}", problems.join("\n\n"));
}

#[test]
fn a_document_is_read_as_its_rules_say() {
    let document = "# Title\n\n```sh\nregatta train FILE \\\n  --set data.path=FILE # why\nfalse # fails: of course\n\
                    ssh-like x # not run: nobody is there\nnosuchprogram\n```\n\n```text\nnot this\n```\n```\nnor this\n```\n";
    let (script, left_out) = script(document);
    let lines: Vec<&str> = script.lines().collect();
    assert_eq!(
        lines,
        [
            "set -eu -o pipefail",
            "regatta train text.txt    --set data.path=text.txt",
            "if false; then echo 'this should have failed' >&2; exit 1; fi",
            "nosuchprogram",
        ]
    );
    assert_eq!(left_out, ["left out: `ssh-like x`: nobody is there"]);
}
