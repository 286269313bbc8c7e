//! Checkpoints: `DIR/checkpoints/step-N/` with a file a rank and `manifest.json`, and the small files `last` and `best`,
//! which name such folders; in a local folder or in an object store.
//!
//! Every rank writes what it owns, in the background. The manifest is written when all have, and makes the checkpoint one
//! that can be read, by ranks of any other plan: each reads the pieces that it needs. Only when it has been read back do
//! `last` and `best` name it, so whatever happens there is a whole one to go on from.

mod atomic;
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

pub use atomic::write_atomically;
pub use commit::{abandon, commit};
pub use manifest::{FileEntry, Manifest, PartEntry};
pub use names::fresh_folder;
pub use report::{Report, Summary, inspect, verify};
pub use restore::Checkpoint;
pub(crate) use restore::{Candidate, Candidates, candidates, none_at};
pub use shards::{Part, ShardWriter};
pub use storage::Location;

use crate::train::{Config, LossScale};
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Which of a run's checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Last,
    /// The one with the lowest validation loss, or the newest where none was evaluated.
    Best,
    /// The one after this many steps; of several attempts, the newest.
    Step(usize),
}

impl FromStr for Which {
    type Err = String;

    /// Reads `last`, `best`, or `step-N`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let step = |text: &str| names::parse(text).filter(|(_, attempt)| *attempt == 0).map(|(step, _)| step);
        match text {
            "last" => Ok(Self::Last),
            "best" => Ok(Self::Best),
            _ => step(text).map(Self::Step).ok_or_else(|| {
                format!("{text:?} is no checkpoint of a run: use last, best or step-N, as in step-500")
            }),
        }
    }
}

/// What a checkpoint holds beside tensors, in its manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
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
    /// The last training loss that was finite. Those of all steps are in the run's `losses.csv`.
    #[serde(default, with = "crate::json::optional")]
    pub loss: Option<f64>,
    /// The lowest validation loss so far, and its step.
    #[serde(default, with = "crate::json::at_step")]
    pub best: Option<(f64, usize)>,
    /// The last validation loss.
    #[serde(default, with = "crate::json::optional")]
    pub val_loss: Option<f64>,
    /// What the data and the tokenizer hold, as one number; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// The factor on the loss, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
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

/// The step that a checkpoint's folder of this name is of.
pub(crate) fn step_of(name: &str) -> Option<usize> {
    names::parse(name).map(|(step, _)| step)
}

/// The folder of checkpoints in a run's folder.
pub fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}
