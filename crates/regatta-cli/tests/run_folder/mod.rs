//! Looking into the folder of a run.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The steps of the checkpoints in a run's folder.
pub fn steps(run: &Path) -> Vec<usize> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap().flatten();
    let mut steps: Vec<usize> = entries
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("step-")?.split('-').next()?.parse().ok()
        })
        .collect();
    steps.sort();
    steps
}

/// Starts a process whose output is kept.
pub fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}
