//! Checkpoints: folders `DIR/checkpoints/step-N/` with a file per rank and `manifest.json`, and the small files `last`
//! and `best`, which name such folders. They are in a local folder or in an object store.
//!
//! Every rank writes what it owns, in the background. When all have written, rank 0 writes the manifest, which makes
//! the checkpoint complete. Ranks of any other plan can read it: each reads the pieces that it needs. `last` and
//! `best` name it only after the manifest has been read back, so there is always a complete checkpoint to resume from.

mod commit;
mod coverage;
mod header;
pub mod huggingface;
mod manifest;
mod names;
mod object;
mod plausible;
mod report;
mod restore;
mod shards;
mod storage;

pub use commit::{abandon, commit};
pub use manifest::{FileEntry, Manifest, PartEntry};
pub use names::fresh_folder;
pub use report::{Report, Summary, inspect, verify};
pub use restore::Checkpoint;
pub(crate) use restore::{Candidate, Candidates, candidates, none_at};
pub use shards::{Part, ShardWriter};
pub use storage::Location;

pub use crate::data::sampler::Position;
pub use crate::optim::LossScale;

use crate::config::Config;
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Selects one of a run's checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Last,
    /// The one with the lowest validation loss, or the newest where none was evaluated.
    Best,
    /// The one after this many steps; the newest if there were several attempts.
    Step(usize),
}

impl FromStr for Which {
    type Err = String;

    /// Parses `last`, `best`, or `step-N`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let step = |text: &str| names::parse(text).filter(|(_, attempt)| *attempt == 0).map(|(step, _)| step);
        match text {
            "last" => Ok(Self::Last),
            "best" => Ok(Self::Best),
            _ => step(text).map(Self::Step).ok_or_else(|| {
                format!("{text:?} does not name a checkpoint: use last, best or step-N, as in step-500")
            }),
        }
    }
}

/// What a checkpoint's manifest holds besides tensors and files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// Updates in the optimizer's state; fewer than `step` where updates were skipped.
    pub updates: u64,
    /// The run's configuration.
    pub config: Config,
    /// The plan of the run.
    pub plan: Plan,
    /// Tokens of the vocabulary (text) or classes (images).
    pub vocab: usize,
    /// Position in the data at which the sampler continues.
    pub position: Position,
    /// The last finite training loss. The losses of all steps are in the run's `losses.csv`.
    #[serde(default, with = "crate::json::optional")]
    pub loss: Option<f64>,
    /// The lowest validation loss so far, and its step.
    #[serde(default, with = "crate::json::at_step")]
    pub best: Option<(f64, usize)>,
    /// The last validation loss.
    #[serde(default, with = "crate::json::optional")]
    pub val_loss: Option<f64>,
    /// Digest of the content of the data and the tokenizer; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// The factor by which the loss is scaled, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl State {
    /// A state without updates, data digest and loss scale.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        step: usize,
        config: Config,
        plan: Plan,
        vocab: usize,
        position: Position,
        loss: Option<f64>,
        best: Option<(f64, usize)>,
        val_loss: Option<f64>,
    ) -> Self {
        Self {
            step,
            updates: 0,
            config,
            plan,
            vocab,
            position,
            loss,
            best,
            val_loss,
            data: None,
            loss_scale: None,
        }
    }
}

/// The step in the name of a checkpoint's folder; none for other names.
pub(crate) fn step_of(name: &str) -> Option<usize> {
    names::parse(name).map(|(step, _)| step)
}

/// The folder of checkpoints in the run folder `run`.
pub fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}
