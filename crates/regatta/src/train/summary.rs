//! What a run reports when it ends: `summary.json`.

use super::profile::Profile;
use crate::autograd::{DeviceChoice, Precision};
use crate::checkpoint::write_atomically;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::parallel::{Carried, Engine, Purpose};
use regatta_comm::Group;
use regatta_plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The result of a run. The training loss of every step is in `losses.csv` beside it. A number that is not finite is a
/// string: "NaN", "Infinity" or "-Infinity".
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// The version of Regatta.
    #[serde(default)]
    pub version: String,
    /// When the program was started, as RFC 3339 says it, in UTC.
    #[serde(default)]
    pub started: String,
    /// The host of each rank.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Optimizer steps done, those before a resume included.
    pub steps: usize,
    /// Whether a signal ended the run before its last step.
    pub interrupted: bool,
    /// The signal that did, as in 2 for Ctrl-C and 15 for SIGTERM.
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
    /// Part of held-out samples classified rightly, for models that classify.
    #[serde(default, with = "crate::json::optional")]
    pub val_accuracy: Option<f64>,
    /// Median over the steps; for digits a sample counts as a token. None, as for all times, where no step was done since
    /// the program was started.
    #[serde(default, with = "crate::json::optional")]
    pub tokens_per_s: Option<f64>,
    /// Median duration of a step in milliseconds, from its first batch to its last update.
    #[serde(default, with = "crate::json::optional")]
    pub step_ms: Option<f64>,
    /// Floating-point operations that the model takes for a step's samples, forward and backward, over all ranks.
    #[serde(default, with = "crate::json::float")]
    pub model_flops: f64,
    /// Model FLOP utilisation (Chowdhery et al. 2022, "PaLM", appendix B): these operations, over what the ranks' threads
    /// could have done in the time, as measured at the beginning. None where ranks compute on other devices, whose rates are
    /// not measured.
    #[serde(default, with = "crate::json::optional")]
    pub mfu: Option<f64>,
    /// Median time in milliseconds that a step's all-reduces ran.
    #[serde(default, with = "crate::json::optional")]
    pub comm_ms: Option<f64>,
    /// Median time in milliseconds that a step stood waiting for them.
    #[serde(default, with = "crate::json::optional")]
    pub comm_exposed_ms: Option<f64>,
    /// From the start of the program to the end of the first step, in seconds.
    #[serde(default, with = "crate::json::optional")]
    pub time_to_first_step_s: Option<f64>,
    /// Most resident memory of each rank's process in bytes.
    pub peak_rss_bytes: Vec<u64>,
    /// Counted bytes of each rank, by kind.
    pub memory: Vec<Memory>,
    /// How the stages of the pipeline fared, where there are several.
    pub pipeline: Option<Pipeline>,
    /// What the groups of each rank carried in the last training step, as they counted it; empty where the run did not
    /// reach that step.
    #[serde(default)]
    pub communication: Vec<Vec<Communication>>,
    /// Median time in milliseconds that saving a checkpoint kept training waiting.
    #[serde(with = "crate::json::float")]
    pub checkpoint_blocked_ms: f64,
    /// Steps whose update was skipped, because their gradients were not finite; those before a resume included.
    #[serde(default)]
    pub skipped_steps: usize,
    /// What the loss was multiplied by at the end, where it was.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "crate::json::optional")]
    pub loss_scale: Option<f64>,
    /// What the ranks computed on.
    #[serde(default)]
    pub device: DeviceChoice,
    /// With which numbers.
    #[serde(default)]
    pub precision: Precision,
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
    /// Of each rank, where its time went; empty unless asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profile: Vec<Profile>,
}

/// Bytes that the engine holds on a rank, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Parameters.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Moments.
    pub optimizer: usize,
    /// Most bytes that gathered parameters and gradients on their way took for a while.
    pub working: usize,
    /// The copy that checkpoints are written from, once one has been.
    pub saving: usize,
}

impl Memory {
    /// Those of all ranks. All call it.
    ///
    /// # Errors
    /// A failure of communication.
    pub(super) fn of_all(self, group: &Group) -> Result<Vec<Self>> {
        let mine = [self.parameters, self.gradients, self.optimizer, self.working, self.saving]
            .map(|bytes| bytes as i64);
        let mut all = vec![0i64; mine.len() * group.size()];
        group.all_gather(&mine, &mut all)?;
        let of = |bytes: &[i64]| Self {
            parameters: bytes[0] as usize,
            gradients: bytes[1] as usize,
            optimizer: bytes[2] as usize,
            working: bytes[3] as usize,
            saving: bytes[4] as usize,
        };
        Ok(all.chunks_exact(mine.len()).map(of).collect())
    }
}

/// Operations of one rank in one training step, of one kind and for one purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Communication {
    /// What for.
    pub purpose: Purpose,
    /// Which operation, as in `all_reduce`; a message counts as `send/recv` on both sides.
    pub kind: String,
    /// How many.
    pub operations: u64,
    /// Bytes of their data, of the larger side.
    pub bytes: u64,
    /// Bytes that the rank gave to others ([`Volume::sent`](regatta_comm::Volume::sent)).
    pub sent: u64,
}

impl Communication {
    /// That of all ranks, from what each has counted. All call it, with something or all with nothing.
    ///
    /// # Errors
    /// A failure of communication.
    pub(super) fn of_all(counted: Option<Carried>, group: &Group) -> Result<Vec<Vec<Self>>> {
        let Some(counted) = counted else { return Ok(vec![]) };
        let mine = counted.to_numbers();
        let mut all = vec![0i64; mine.len() * group.size()];
        group.all_gather(&mine, &mut all)?;
        Ok(all.chunks_exact(mine.len()).map(|numbers| Self::of(&Carried::from_numbers(numbers))).collect())
    }

    /// By purpose and kind, in their order.
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

/// How the stages of a pipeline fared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pipeline {
    /// Share of the time from the first task to the last that the stages stood idle: the median over the steps.
    #[serde(with = "crate::json::float")]
    pub idle_share: f64,
    /// What it would be with stages all alike and messages that take no time.
    #[serde(with = "crate::json::float")]
    pub bubble: f64,
    /// Most micro-batches whose activations each rank held at once, each counted once a chunk.
    pub peak_in_flight: Vec<usize>,
}

impl Pipeline {
    /// That of all ranks, from each step's tasks and their end (the last two columns of `times`); none where there is one
    /// stage. All ranks call it.
    ///
    /// # Errors
    /// A failure of communication.
    pub(super) fn of_all<M: Model>(engine: &Engine<M>, times: &[[f64; 5]]) -> Result<Option<Self>> {
        let (world, schedule) = (&engine.axes().world, engine.schedule());
        if schedule.stages == 1 {
            return Ok(None);
        }
        let mine: Vec<f64> = times.iter().flat_map(|row| [row[3], row[4]]).collect();
        let mut all = vec![0.0; mine.len() * world.size()];
        world.all_gather(&mine, &mut all)?;
        // Ranks begin a step together: each has waited for all others at the end of the one before.
        let share = |step: usize| {
            let rows = (0..world.size()).map(|rank| &all[rank * mine.len() + 2 * step..][..2]);
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
    /// Reads the `summary.json` in `folder`; none where there is none that can be read.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join("summary.json")).ok()?).ok()
    }

    /// Writes `summary.json` into `folder`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("summary.json");
        let json = serde_json::to_vec_pretty(self).map_err(|error| Error::Usage(error.to_string()))?;
        write_atomically(&path, &json)
    }
}

/// The middle of `values` (the upper one of two); 0 for none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The hosts of all ranks. All call it.
///
/// # Errors
/// A failure of communication.
pub(super) fn hosts(group: &Group) -> Result<Vec<String>> {
    let mine = regatta_comm::rendezvous::hostname();
    let all = group.all_gather_vec(mine.as_bytes())?;
    Ok(all.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// Most memory that this process has had resident, in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
