//! Running the real program on small jobs.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A small language model over a text of its own.
pub const SMALL: &str = r#"
[model]
kind = "gpt"
layers = 2
heads = 2
embed = 32
block = 16

[data]
kind = "text"
tokenizer = "chars"

[train]
steps = 12
batch = 8
eval_batches = 2
log_every = 1

[optimizer]
lr = 1e-2
constant = true
"#;

/// A folder for a test, with a text and a configuration in it.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        heed_signals();
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..4000).map(|n| format!("line {} has {} words\n", n % 97, n * n % 31)).collect();
        std::fs::write(folder.path().join("text.txt"), text).unwrap();
        std::fs::write(folder.path().join("small.toml"), SMALL).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program in this folder, free of any launcher's variables.
    pub fn regatta(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_regatta"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        for (key, _) in std::env::vars() {
            let of_launcher =
                ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
            let prefixes = ["OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_", "REGATTA_"];
            if of_launcher.contains(&key.as_str()) || prefixes.iter().any(|prefix| key.starts_with(prefix)) {
                command.env_remove(key);
            }
        }
        command
    }

    /// `regatta train small.toml` with the text, into `out`.
    #[allow(dead_code)]
    pub fn train(&self, out: &str, more: &[&str]) -> Command {
        let mut arguments = vec!["train", "small.toml", "--set", "data.path=text.txt", "--out", out];
        arguments.extend(more);
        self.regatta(&arguments)
    }

    /// The summary of a run, with the losses that lie beside it as `losses`.
    #[allow(dead_code)]
    pub fn summary(&self, out: &str) -> Value {
        let path = self.path(out).join("summary.json");
        let mut summary: Value = serde_json::from_slice(
            &std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
        .unwrap();
        summary["losses"] = regatta::train::read_losses(&self.path(out)).unwrap().into();
        summary
    }
}

/// Programs that tests start do what signals ask, also where these tests run under `nohup` or in a script's background: what
/// this process ignored, they would ignore, too. A signal that has a handler here has its ordinary effect there.
fn heed_signals() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT};
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for signal in [SIGHUP, SIGINT, SIGQUIT] {
            let always = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
            signal_hook::flag::register_conditional_default(signal, always).unwrap();
        }
    });
}

/// The program as a word of a shell: its path may have spaces.
#[allow(dead_code)]
pub fn in_shell() -> String {
    format!("'{}'", env!("CARGO_BIN_EXE_regatta").replace('\'', r"'\''"))
}

/// Runs to a good end.
#[allow(dead_code)]
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", said(&output));
    output
}

/// Runs to a failure and returns what it said.
#[allow(dead_code)]
pub fn fail(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} succeeded\n{}", said(&output));
    assert!(output.status.code().is_some_and(|code| code != 101), "{command:?} panicked\n{}", said(&output));
    said(&output)
}

pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[allow(dead_code)]
pub fn losses(summary: &Value) -> Vec<f64> {
    summary["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect()
}

/// Largest relative difference; not a number where one of them is not.
#[allow(dead_code)]
pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| ((a - b) / a).abs()).max_by(f64::total_cmp).unwrap_or(0.0)
}

/// The process of rank `rank` among the children of `launcher`.
#[cfg(target_os = "linux")]
#[allow(dead_code)]
pub fn pid_of(launcher: &std::process::Child, rank: usize) -> u32 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", launcher.id())).unwrap().flatten();
    let children: String =
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect();
    let wanted = format!("RANK={rank}");
    let is_rank = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    children.split_whitespace().map(|pid| pid.parse().unwrap()).find(is_rank).unwrap()
}

/// Waits until `ready`, for at most a minute.
#[allow(dead_code)]
pub fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !ready() {
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "waited too long for {what}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[allow(dead_code)]
pub fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

/// Whether a program is there; says that a test skips where it is not.
#[allow(dead_code)]
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| is_file(&folder.join(program))));
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}
