//! Reports for users: what a checkpoint contains, and whether it is undamaged.

use super::manifest::Manifest;
use super::names::{MANIFEST, parse};
use super::restore::{Checkpoint, complete_folders, resolve};
use super::{State, Which};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The checkpoints that were read.
    pub checkpoints: Vec<PathBuf>,
    /// Number of their files.
    pub files: usize,
    /// Size of these files in bytes.
    pub bytes: u64,
    /// Problems, one sentence each; empty if there is no damage.
    pub problems: Vec<String>,
    /// Notes that are not about damage.
    pub notes: Vec<String>,
}

/// Reads every byte of the checkpoint that `target` names (a folder or a URL), or of all complete checkpoints if it
/// names a run. Lists the problems: files that are missing, truncated or changed, and tensors that are incomplete.
///
/// # Errors
/// There is no checkpoint, or the location cannot be listed. Damage is not an error; it is in the report.
pub fn verify(target: &(impl AsRef<Path> + ?Sized)) -> Result<Report> {
    let (location, folder) = resolve(target.as_ref())?;
    let mut report = Report { checkpoints: vec![], files: 0, bytes: 0, problems: vec![], notes: vec![] };
    let folders = match folder {
        Some(folder) => vec![folder],
        None => {
            // Reports wrong contents of `last` and `best`, or that there is no checkpoint.
            for which in [Which::Last, Which::Best] {
                for warning in Checkpoint::find(&location, which)?.warnings() {
                    if !report.problems.contains(warning) {
                        report.problems.push(warning.clone());
                    }
                }
            }
            let complete = complete_folders(&location)?;
            let all = location.folders().map_err(Error::io("list the checkpoints in", location.show("")))?;
            for name in all.iter().filter(|name| parse(name).is_some() && !complete.contains(name)) {
                report.notes.push(format!(
                    "{} has no {MANIFEST}: it is being written or was interrupted, and the next save removes it",
                    location.show(name).display()
                ));
            }
            complete
        }
    };
    for folder in folders {
        report.checkpoints.push(location.show(&folder));
        match Checkpoint::open(&location, &folder) {
            Ok(checkpoint) => {
                report.files += checkpoint.manifest().files.len();
                report.bytes += checkpoint.manifest().files.iter().map(|file| file.bytes).sum::<u64>();
                report.problems.extend(checkpoint.verify());
            }
            Err(error) => report.problems.push(error.to_string()),
        }
    }
    Ok(report)
}

/// What a checkpoint contains; it displays as text.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Path of its folder.
    pub path: PathBuf,
    /// Progress and configuration.
    pub state: State,
    /// Every tensor's shape.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// Number of elements of the model's parameters.
    pub parameters: usize,
    /// Bytes of values by kind: `parameters`, and the part before the slash in the names of other tensors.
    pub kinds: BTreeMap<String, u64>,
    /// Names of the files, and their sizes in bytes.
    pub files: Vec<(String, u64)>,
    /// Warnings about how it was found.
    pub warnings: Vec<String>,
}

/// Summarises the checkpoint that `target` names: a run's folder, a checkpoint's folder, or a URL of either.
///
/// # Errors
/// As for [`Checkpoint::locate`].
pub fn inspect(target: &(impl AsRef<Path> + ?Sized), which: Which) -> Result<Summary> {
    let checkpoint = Checkpoint::locate(target, which)?;
    let Manifest { state, tensors, files } = checkpoint.manifest().clone();
    let mut kinds = BTreeMap::new();
    for (name, shape) in &tensors {
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        *kinds.entry(name.split_once('/').map_or("parameters", |(kind, _)| kind).to_string()).or_default() +=
            bytes;
    }
    Ok(Summary {
        path: checkpoint.path(),
        parameters: kinds.get("parameters").map_or(0, |bytes: &u64| (bytes / 4) as usize),
        state,
        tensors,
        kinds,
        files: files.into_iter().map(|file| (file.file, file.bytes)).collect(),
        warnings: checkpoint.warnings().to_vec(),
    })
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = &self.state;
        writeln!(f, "checkpoint {}", self.path.display())?;
        writeln!(f, "  step        {}", state.step)?;
        writeln!(f, "  plan        {}", state.plan)?;
        let model = serde_json::to_string(&state.config.model).map_err(|_| fmt::Error)?;
        writeln!(
            f,
            "  model       {}",
            model.replace(['{', '}', '"'], "").replace(',', ", ").replace(':', " ")
        )?;
        writeln!(f, "  vocabulary  {}", state.vocab)?;
        if let Some(loss) = state.loss {
            writeln!(f, "  loss        {loss:.4}")?;
        }
        if let Some((loss, step)) = state.best {
            writeln!(f, "  best        {loss:.4} (validation) after step {step}")?;
        }
        writeln!(f, "  parameters  {}", self.parameters)?;
        let kinds: Vec<_> =
            self.kinds.iter().map(|(kind, bytes)| format!("{kind} {}", size(*bytes))).collect();
        writeln!(f, "  values      {}", kinds.join(", "))?;
        writeln!(f, "  files       {}", self.files.len())?;
        for (name, bytes) in &self.files {
            writeln!(f, "    {name}  {}", size(*bytes))?;
        }
        writeln!(f, "  tensors     {}", self.tensors.len())?;
        for (name, shape) in &self.tensors {
            writeln!(f, "    {name} {shape:?}")?;
        }
        Ok(())
    }
}

/// Bytes as text with a unit.
fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}
