//! Writing checkpoints.

use super::atomic::{sync_folder, write_atomically};
use super::{State, folder};
use crate::error::{Error, Result};
use crate::parallel::ParamStore;
use crate::train::FlatOptimizer;
use safetensors::tensor::{Dtype, SafeTensorError, TensorView, serialize_to_file};
use std::fs::{self, File};
use std::path::Path;

/// What goes into a checkpoint.
pub struct Snapshot<'a> {
    /// Progress and configuration.
    pub state: State,
    /// The parameters.
    pub store: &'a ParamStore,
    /// The optimizer's state.
    pub optimizer: &'a FlatOptimizer,
    /// Whether this is the best model so far.
    pub best: bool,
}

/// Writes a checkpoint into the run folder `run`, names it `last` (and `best`), and removes those that neither
/// name any longer.
///
/// # Errors
/// When writing fails, a full disk included: what was there before stays, and no partial file is left.
pub fn save(run: &Path, snapshot: Snapshot<'_>) -> Result<()> {
    let checkpoints = folder(run);
    fs::create_dir_all(&checkpoints).map_err(Error::io("create", &checkpoints))?;
    let name = format!("step-{:08}", snapshot.state.step);
    let target = checkpoints.join(&name);
    let temporary = checkpoints.join(format!("{name}.tmp"));
    let written = write_folder(&temporary, &snapshot).and_then(|()| replace(&temporary, &target));
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync_folder(&checkpoints)?;
    write_atomically(&checkpoints.join("last"), name.as_bytes())?;
    if snapshot.best {
        write_atomically(&checkpoints.join("best"), name.as_bytes())?;
    }
    prune(&checkpoints);
    Ok(())
}

fn write_folder(temporary: &Path, snapshot: &Snapshot<'_>) -> Result<()> {
    if temporary.exists() {
        fs::remove_dir_all(temporary).map_err(Error::io("remove the unfinished", temporary))?;
    }
    fs::create_dir(temporary).map_err(Error::io("create", temporary))?;
    let (store, optimizer) = (snapshot.store, snapshot.optimizer);
    let specs = &store.layout().specs;
    let parameters = specs.iter().enumerate().map(|(i, spec)| (spec.path.clone(), i, store.param(i)));
    write_tensors(&temporary.join("model.safetensors"), store, parameters)?;
    write_tensors(&temporary.join("optimizer.safetensors"), store, optimizer.state())?;
    let mut state = snapshot.state.clone();
    state.updates = optimizer.updates();
    state.parameter_hash = format!("{:016x}", store.hash());
    let json = serde_json::to_vec_pretty(&state).map_err(|e| Error::checkpoint(temporary, e.to_string()))?;
    write_atomically(&temporary.join("state.json"), &json)
}

fn write_tensors<'a>(
    path: &Path,
    store: &ParamStore,
    tensors: impl Iterator<Item = (String, usize, &'a [f32])>,
) -> Result<()> {
    let specs = &store.layout().specs;
    let views = tensors.map(|(name, index, values)| {
        Ok((name, TensorView::new(Dtype::F32, specs[index].shape.clone(), bytemuck::cast_slice(values))?))
    });
    let views: Vec<_> = views.collect::<Result<_, SafeTensorError>>().map_err(|e| failed(path, e))?;
    let metadata = [("format".to_string(), "regatta".to_string())].into();
    serialize_to_file(views, Some(metadata), path).map_err(|e| failed(path, e))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("sync", path))
}

fn failed(path: &Path, error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::IoError(source) => Error::io("write", path)(source),
        other => Error::checkpoint(path, other.to_string()),
    }
}

/// Renames `temporary` to `target`, which may be there from an earlier run that got as far.
fn replace(temporary: &Path, target: &Path) -> Result<()> {
    if !target.exists() {
        return fs::rename(temporary, target).map_err(Error::io("rename a checkpoint to", target));
    }
    let old = target.with_extension("old.tmp");
    if old.exists() {
        fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
    }
    fs::rename(target, &old).map_err(Error::io("move away", target))?;
    fs::rename(temporary, target).map_err(|error| {
        // Put the old one back: `last` still names it.
        let _ = fs::rename(&old, target);
        Error::io("rename a checkpoint to", target)(error)
    })?;
    fs::remove_dir_all(&old).map_err(Error::io("remove", &old))
}

/// Removes folders that neither `last` nor `best` names, and what an interrupted save left.
fn prune(checkpoints: &Path) {
    let named: Vec<String> =
        ["last", "best"].iter().filter_map(|file| fs::read_to_string(checkpoints.join(file)).ok()).collect();
    for entry in fs::read_dir(checkpoints).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("step-") && !named.contains(&name) {
            // A folder that stays is only wasted space; the next save tries again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
