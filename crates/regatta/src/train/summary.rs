//! What a run reports when it ends: `summary.json`.

use crate::checkpoint::write_atomically;
use crate::error::{Error, Result};
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The result of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// Optimizer steps done, those before a resume included.
    pub steps: usize,
    /// Whether Ctrl-C or SIGTERM ended the run before its last step.
    pub interrupted: bool,
    /// Loss of the last step.
    pub train_loss: f64,
    /// Loss on held-out data at the last evaluation.
    pub val_loss: Option<f64>,
    /// Lowest loss on held-out data.
    pub best_val_loss: Option<f64>,
    /// Part of held-out samples classified rightly, for models that classify.
    pub val_accuracy: Option<f64>,
    /// Median over the steps; for digits a sample counts as a token.
    pub tokens_per_s: f64,
    /// Median duration of a step in milliseconds, from its first batch to its last update.
    pub step_ms: f64,
    /// Median time in milliseconds that a step's all-reduces ran.
    pub comm_ms: f64,
    /// Median time in milliseconds that a step stood waiting for them.
    pub comm_exposed_ms: f64,
    /// From the start of the program to the end of the first step, in seconds.
    pub time_to_first_step_s: f64,
    /// Most resident memory of each rank's process in bytes.
    pub peak_rss_bytes: Vec<u64>,
    /// Counted bytes on each rank.
    pub memory: Memory,
    /// Training loss of every step.
    pub losses: Vec<f64>,
    /// Ranks.
    pub world: usize,
    /// How the run was spread.
    pub plan: Plan,
    /// How the ranks communicated.
    pub transport: String,
    /// Threads of each worker.
    pub threads: usize,
    /// Trainable parameters.
    pub parameters: usize,
    /// Hash of the final parameters, equal on all ranks (hexadecimal).
    pub parameter_hash: String,
    /// Text generated at the end, where asked for.
    pub sample: Option<String>,
}

/// Bytes that the engine holds on each rank, by kind.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Parameters.
    pub parameters: usize,
    /// Gradient buckets.
    pub gradients: usize,
    /// Moments.
    pub optimizer: usize,
}

impl Summary {
    /// Writes `summary.json` into `folder`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("summary.json");
        let json = serde_json::to_vec_pretty(self).map_err(|error| Error::Usage(error.to_string()))?;
        write_atomically(&path, &json)
    }
}

/// The middle of `values` (the upper one of two); 0 for none.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Most memory that this process has had resident, in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
