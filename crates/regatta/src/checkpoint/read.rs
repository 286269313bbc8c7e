//! Reading checkpoints, and refusing those that are truncated, foreign or of another model.

use super::{FORMAT, State, VERSION, folder};
use crate::error::{Error, Result};
use crate::parallel::ParamStore;
use crate::train::FlatOptimizer;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Which of a run's checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Last,
    /// The one with the lowest validation loss, or the newest where none was evaluated.
    Best,
}

/// A checkpoint found on disk, its state read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// Progress and configuration.
    pub state: State,
}

impl Checkpoint {
    /// Finds a checkpoint in the run folder `run`.
    ///
    /// # Errors
    /// None there, or one whose state cannot be read or is not ours.
    pub fn find(run: &Path, which: Which) -> Result<Self> {
        let checkpoints = folder(run);
        let named = |file: &str| fs::read_to_string(checkpoints.join(file)).ok();
        let name = match which {
            Which::Last => named("last"),
            Which::Best => named("best").or_else(|| named("last")),
        };
        let Some(name) = name else {
            return Err(Error::checkpoint(
                run,
                "there is none; train with --out pointing here first, or leave out --resume",
            ));
        };
        let name = name.trim();
        if !name.starts_with("step-") || name.contains(['/', '\\']) {
            let problem = format!("the file `last` or `best` names {name:?}, which is no checkpoint folder");
            return Err(Error::checkpoint(checkpoints, problem));
        }
        Self::open(checkpoints.join(name))
    }

    /// Reads the state of the checkpoint folder `path`.
    pub fn open(path: PathBuf) -> Result<Self> {
        let file = path.join("state.json");
        let text = fs::read_to_string(&file).map_err(Error::io("read the checkpoint's state", &file))?;
        let foreign = |problem: String| Error::checkpoint(&file, problem);
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|error| foreign(format!("is truncated or no JSON ({error}); use another checkpoint")))?;
        if value["format"] != FORMAT {
            return Err(foreign("was not written by Regatta".into()));
        }
        if value["version"] != VERSION {
            return Err(foreign(format!("has version {}, this Regatta reads {VERSION}", value["version"])));
        }
        let state = serde_json::from_value(value).map_err(|error| foreign(format!("is damaged: {error}")))?;
        Ok(Self { path, state })
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies the parameters into `store`.
    ///
    /// # Errors
    /// A truncated or foreign file, a parameter that is missing, too many or of another shape (the model of the
    /// configuration is not the checkpoint's), numbers that differ from what was saved. `store` is then
    /// unusable.
    pub fn load_parameters(&self, store: &mut ParamStore) -> Result<()> {
        let layout = store.layout().clone();
        let names: Vec<String> = layout.specs.iter().map(|spec| spec.path.clone()).collect();
        let file = self.path.join("model.safetensors");
        let shapes = |i: usize| layout.specs[i].shape.as_slice();
        read_tensors(&file, &names, shapes, |index, bytes| copy(bytes, store.param_mut(index)))?;
        let found = format!("{:016x}", store.hash());
        if found != self.state.parameter_hash {
            let problem = format!(
                "its parameters hash to {found}, but {} was saved: the file is damaged; use another checkpoint",
                self.state.parameter_hash
            );
            return Err(Error::checkpoint(file, problem));
        }
        Ok(())
    }

    /// Copies the optimizer's state into `optimizer`, which must be of the kind that was saved.
    ///
    /// # Errors
    /// As for [`load_parameters`](Self::load_parameters).
    pub fn load_optimizer(&self, store: &ParamStore, optimizer: &mut FlatOptimizer) -> Result<()> {
        let layout = store.layout();
        let wanted: Vec<(String, usize)> = optimizer.state().map(|(name, index, _)| (name, index)).collect();
        let names: Vec<String> = wanted.iter().map(|(name, _)| name.clone()).collect();
        let mut read: Vec<Vec<f32>> = vec![vec![]; names.len()];
        let file = self.path.join("optimizer.safetensors");
        let shapes = |i: usize| layout.specs[wanted[i].1].shape.as_slice();
        read_tensors(&file, &names, shapes, |i, bytes| {
            let mut values = vec![0.0; layout.specs[wanted[i].1].len];
            copy(bytes, &mut values);
            read[i] = values;
        })?;
        let mut read = read.into_iter();
        optimizer.load(self.state.updates, |_, _, target| {
            target.copy_from_slice(&read.next().unwrap_or_default());
            Ok::<(), Error>(())
        })
    }
}

fn copy(bytes: &[u8], target: &mut [f32]) {
    // The file's data may start at any byte.
    bytemuck::cast_slice_mut::<f32, u8>(target).copy_from_slice(bytes);
}

fn read_tensors<'a>(
    file: &Path,
    names: &[String],
    shape: impl Fn(usize) -> &'a [usize],
    mut take: impl FnMut(usize, &[u8]),
) -> Result<()> {
    let handle = File::open(file).map_err(Error::io("open", file))?;
    // SAFETY: a checkpoint is never changed in place; should another program truncate it now, we would be
    // ended by a signal, as with any map of a file.
    let map = unsafe { Mmap::map(&handle) }.map_err(Error::io("read", file))?;
    let tensors = SafeTensors::deserialize(&map).map_err(|error| {
        Error::checkpoint(
            file,
            format!("is truncated or no safetensors file ({error}); use another checkpoint"),
        )
    })?;
    let other = |problem: String| {
        Error::checkpoint(file, format!("{problem}: use the [model] and [optimizer] it was trained with"))
    };
    if let Some(extra) = tensors.names().into_iter().find(|name| !names.iter().any(|n| n.as_str() == *name)) {
        return Err(other(format!("has {extra}, which this configuration does not")));
    }
    for (index, name) in names.iter().enumerate() {
        let tensor = tensors
            .tensor(name)
            .map_err(|_| other(format!("has no {name}, which this configuration has")))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape(index) {
            return Err(other(format!(
                "has {name} as {:?} {:?}, but this configuration makes it F32 {:?}",
                tensor.dtype(),
                tensor.shape(),
                shape(index)
            )));
        }
        take(index, tensor.data());
    }
    Ok(())
}
