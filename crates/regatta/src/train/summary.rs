//! `summary.json`: the results of a run, written when it ends.

use super::link::LinkUse;
use super::profile::Profile;
use super::statistics::median;
use crate::autograd::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::parallel::{Carried, Engine, Purpose};
use regatta_comm::Group;
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The results of a run. The training loss of every step is in `losses.csv` in the same folder. In JSON, a number that
/// is not finite is a string: "NaN", "Infinity" or "-Infinity".
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// The version of Regatta.
    #[serde(default)]
    pub version: String,
    /// When the program was started, in UTC, in the format of RFC 3339.
    #[serde(default)]
    pub started: String,
    /// The host of each rank.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Number of optimizer steps done, including those before a resume.
    pub steps: usize,
    /// Whether a signal or a callback ended the run before its last step.
    pub interrupted: bool,
    /// The number of that signal: 2 for Ctrl-C, 15 for SIGTERM. None if a callback ended the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_by: Option<u32>,
    /// Loss of the last step whose loss was finite.
    #[serde(with = "crate::json::float")]
    pub train_loss: f64,
    /// Loss on held-out data at the last evaluation.
    #[serde(default, with = "crate::json::optional")]
    pub val_loss: Option<f64>,
    /// Lowest loss on held-out data.
    #[serde(default, with = "crate::json::optional")]
    pub best_val_loss: Option<f64>,
    /// Fraction of held-out samples that were classified correctly, for models that classify.
    #[serde(default, with = "crate::json::optional")]
    pub val_accuracy: Option<f64>,
    /// The model's own metrics on held-out data, each a mean over the samples.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", with = "crate::json::by_name")]
    pub val_metrics: BTreeMap<String, f64>,
    /// Median of tokens per second over the steps; for images a sample counts as a token. None, like all times, if no
    /// step was done since the program was started.
    #[serde(default, with = "crate::json::optional")]
    pub tokens_per_s: Option<f64>,
    /// Median duration of a step in milliseconds, from its first batch to its last update.
    #[serde(default, with = "crate::json::optional")]
    pub step_ms: Option<f64>,
    /// Floating-point operations of the model for a step's samples, forward and backward, over all ranks.
    #[serde(default, with = "crate::json::float")]
    pub model_flops: f64,
    /// Model FLOP utilisation (Chowdhery et al. 2022, "PaLM", appendix B): `model_flops` divided by the operations
    /// that the ranks' threads could do in the same time at their peak rate, which is measured at the beginning. None
    /// if ranks compute on other devices, whose peak rates are not measured.
    #[serde(default, with = "crate::json::optional")]
    pub mfu: Option<f64>,
    /// Median time in milliseconds during which a step's communication ran.
    #[serde(default, with = "crate::json::optional")]
    pub comm_ms: Option<f64>,
    /// Median time in milliseconds during which a step waited for communication.
    #[serde(default, with = "crate::json::optional")]
    pub comm_exposed_ms: Option<f64>,
    /// Seconds from the start of the program to the end of its first step.
    #[serde(default, with = "crate::json::optional")]
    pub time_to_first_step_s: Option<f64>,
    /// Peak resident memory of each rank's process in bytes.
    pub peak_rss_bytes: Vec<u64>,
    /// Memory of each rank's engine, by kind.
    pub memory: Vec<Memory>,
    /// Idle time of the pipeline's stages, if there are several.
    pub pipeline: Option<Pipeline>,
    /// What the groups of each rank communicated in the last training step, by their own counts; empty if the run did
    /// not reach that step.
    #[serde(default)]
    pub communication: Vec<Vec<Communication>>,
    /// What a rank sends to other workers, and which encodings would be faster over slow links; none if there is one worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkUse>,
    /// Median time in milliseconds that saving a checkpoint blocked training.
    #[serde(with = "crate::json::float")]
    pub checkpoint_blocked_ms: f64,
    /// Number of steps whose update was skipped because gradients were not finite, including those before a resume.
    #[serde(default)]
    pub skipped_steps: usize,
    /// The factor by which the loss was multiplied at the end, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "crate::json::optional")]
    pub loss_scale: Option<f64>,
    /// The device on which the ranks computed.
    #[serde(default)]
    pub device: DeviceChoice,
    /// The type of activations.
    #[serde(default)]
    pub precision: Precision,
    /// Number of ranks.
    pub world: usize,
    /// How the work was distributed over ranks.
    pub plan: Plan,
    /// The transport by which the ranks communicated.
    pub transport: String,
    /// Number of threads of each rank.
    pub threads: usize,
    /// Number of trainable parameters.
    pub parameters: usize,
    /// Hash of the final parameters (hexadecimal), equal on all ranks.
    pub parameter_hash: String,
    /// Text that was generated at the end, if `sample.prompt` was set.
    pub sample: Option<String>,
    /// The profile of each rank; empty unless `train.profile` was set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profile: Vec<Profile>,
}

/// Memory of a rank's engine in bytes, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Parameters.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Optimizer state.
    pub optimizer: usize,
    /// Peak of temporary memory: gathered parameters, and gradients during their exchange.
    pub working: usize,
    /// The copy of values from which checkpoints are written; 0 before the first save.
    pub saving: usize,
}

impl Memory {
    /// The memory of all ranks. All ranks call it.
    ///
    /// # Errors
    /// Communication fails.
    pub(super) fn of_all(self, group: &Group) -> Result<Vec<Self>> {
        let own = [self.parameters, self.gradients, self.optimizer, self.working, self.saving]
            .map(|bytes| bytes as i64);
        let mut all = vec![0i64; own.len() * group.size()];
        group.all_gather(&own, &mut all)?;
        let of = |bytes: &[i64]| Self {
            parameters: bytes[0] as usize,
            gradients: bytes[1] as usize,
            optimizer: bytes[2] as usize,
            working: bytes[3] as usize,
            saving: bytes[4] as usize,
        };
        Ok(all.chunks_exact(own.len()).map(of).collect())
    }
}

/// Operations of one rank in one training step, of one kind and for one purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Communication {
    /// Their purpose.
    pub purpose: Purpose,
    /// Name of the operation, as in `all_reduce`; a message counts as `send/recv` on both sides.
    pub kind: String,
    /// Number of operations.
    pub operations: u64,
    /// Bytes of their data; of input and output, the larger one counts.
    pub bytes: u64,
    /// Bytes that the rank sent to others ([`Volume::sent`](regatta_comm::Volume::sent)).
    pub sent: u64,
}

impl Communication {
    /// The communication of all ranks, from the counts of each. All ranks call it, either all with counts or all
    /// without.
    ///
    /// # Errors
    /// Communication fails.
    pub(super) fn of_all(counted: Option<Carried>, group: &Group) -> Result<Vec<Vec<Self>>> {
        let Some(counted) = counted else { return Ok(vec![]) };
        let own = counted.to_numbers();
        let mut all = vec![0i64; own.len() * group.size()];
        group.all_gather(&own, &mut all)?;
        Ok(all.chunks_exact(own.len()).map(|numbers| Self::of(&Carried::from_numbers(numbers))).collect())
    }

    /// The counts of one rank by purpose and kind, in their order.
    pub fn of(carried: &Carried) -> Vec<Self> {
        let one = |(purpose, kind, volume): (Purpose, regatta_comm::Kind, regatta_comm::Volume)| Self {
            purpose,
            kind: kind.name().into(),
            operations: volume.operations,
            bytes: volume.bytes,
            sent: volume.sent,
        };
        carried.volumes().map(one).collect()
    }
}

/// Idle time and memory of a pipeline's stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pipeline {
    /// Fraction of the time from the first task to the last during which stages were idle: the median over the steps.
    #[serde(with = "crate::json::float")]
    pub idle_share: f64,
    /// The same fraction in theory, if all stages took the same time and messages took none.
    #[serde(with = "crate::json::float")]
    pub bubble: f64,
    /// Most micro-batches whose activations each rank held at once; each counts once per chunk.
    pub peak_in_flight: Vec<usize>,
}

impl Pipeline {
    /// The pipeline of all ranks, from the times of their steps (tasks, end of the last task); none if there is one
    /// stage. All ranks call it.
    ///
    /// # Errors
    /// Communication fails.
    pub(super) fn of_all(engine: &Engine, times: &[(f64, f64)]) -> Result<Option<Self>> {
        let (world, schedule) = (engine.groups().world(), engine.schedule());
        if schedule.stages == 1 {
            return Ok(None);
        }
        let own: Vec<f64> = times.iter().flat_map(|(tasks, last)| [*tasks, *last]).collect();
        let mut all = vec![0.0; own.len() * world.size()];
        world.all_gather(&own, &mut all)?;
        // All ranks begin a step at the same time, because each has waited for the others at the end of the last one.
        let share = |step: usize| {
            let rows = (0..world.size()).map(|rank| &all[rank * own.len() + 2 * step..][..2]);
            let busy: f64 = rows.clone().map(|row| row[0]).sum();
            let span = rows.map(|row| row[1]).fold(0.0, f64::max);
            1.0 - busy / (span * world.size() as f64)
        };
        let mut shares: Vec<f64> = (0..times.len()).map(share).collect();
        let mut peaks = vec![0i64; world.size()];
        world.all_gather(&[engine.peak_in_flight() as i64], &mut peaks)?;
        Ok(Some(Self {
            idle_share: median(&mut shares),
            bubble: schedule.bubble(),
            peak_in_flight: peaks.into_iter().map(|peak| peak as usize).collect(),
        }))
    }
}

impl Summary {
    /// Reads `summary.json` in `folder`; none if it does not exist or cannot be read.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join("summary.json")).ok()?).ok()
    }

    /// Writes `summary.json` into `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("summary.json");
        let json = serde_json::to_vec_pretty(self).map_err(|error| Error::Usage(error.to_string()))?;
        write_atomically(&path, &json)
    }
}

/// The host names of all ranks. All ranks call it.
///
/// # Errors
/// Communication fails.
pub(super) fn hosts(group: &Group) -> Result<Vec<String>> {
    let own = regatta_comm::hostname();
    let all = group.all_gather_vec(own.as_bytes())?;
    Ok(all.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// Peak resident memory of this process in bytes; 0 if the system does not report it.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
