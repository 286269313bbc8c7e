//! Checkpoints: `DIR/checkpoints/step-N/` with `model.safetensors`, `optimizer.safetensors` and `state.json`,
//! and the small files `last` and `best`, which name such folders.
//!
//! A checkpoint is written under a temporary name, synced and renamed, and only then named by `last` or
//! `best`, so whatever happens there is a whole one to go on from.

mod atomic;
mod read;
mod write;

pub use atomic::write_atomically;
pub use read::{Checkpoint, Which};
pub use write::{Snapshot, save};

use crate::train::Config;
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Says that a `state.json` is ours.
const FORMAT: &str = "regatta checkpoint";
/// Grows when the layout changes.
const VERSION: u32 = 1;

/// What a checkpoint holds beside tensors: `state.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    format: String,
    version: u32,
    /// Optimizer steps done.
    pub step: usize,
    /// Updates that the optimizer's state has seen.
    pub updates: u64,
    /// The run's configuration.
    pub config: Config,
    /// How the run was spread.
    pub plan: Plan,
    /// Tokens of the vocabulary (text) or classes (digits).
    pub vocab: usize,
    /// Samples that a rank has consumed: where the sampler goes on.
    pub position: crate::data::sampler::Position,
    /// Training loss of every step so far.
    pub losses: Vec<f64>,
    /// The lowest validation loss so far, and its step.
    pub best: Option<(f64, usize)>,
    /// The last validation loss.
    pub val_loss: Option<f64>,
    /// Hash of the parameters (hexadecimal), checked when loading.
    pub parameter_hash: String,
}

impl State {
    /// A state of this version of the format.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        step: usize,
        config: Config,
        plan: Plan,
        vocab: usize,
        position: crate::data::sampler::Position,
        losses: Vec<f64>,
        best: Option<(f64, usize)>,
        val_loss: Option<f64>,
    ) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            step,
            updates: 0,
            config,
            plan,
            vocab,
            position,
            losses,
            best,
            val_loss,
            parameter_hash: String::new(),
        }
    }
}

/// The folder of checkpoints in a run's folder.
pub fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}
