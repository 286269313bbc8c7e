//! `metrics.jsonl`: the metrics of a run, which are appended while it trains.

use super::callback::{Callback, StepReport};
use super::evaluate::Score;
use super::job::Job;
use crate::data::sampler::Position;
use crate::error::Error;
use crate::files::append_after;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A line of the file. All lines have all keys; keys that a line does not report are `null`.
#[derive(Default, Serialize)]
struct Line {
    step: usize,
    /// Seconds since 1970.
    time: f64,
    /// Seconds since this process was started; a resumed run begins at 0 again.
    elapsed_s: f64,
    /// Training tokens (for images: samples) so far, including those before a resume.
    tokens: u64,
    /// Epochs so far.
    epochs: f64,
    /// Mean over the steps since the last such line, without steps whose loss is not finite.
    #[serde(with = "crate::json::optional")]
    loss: Option<f64>,
    #[serde(with = "crate::json::optional")]
    loss_max: Option<f64>,
    #[serde(with = "crate::json::optional")]
    lr: Option<f64>,
    #[serde(with = "crate::json::optional")]
    gradient_norm: Option<f64>,
    #[serde(with = "crate::json::optional")]
    gradient_norm_max: Option<f64>,
    /// Tokens per second since the last such line, including the time of saving and evaluating.
    #[serde(with = "crate::json::optional")]
    tokens_per_s: Option<f64>,
    #[serde(with = "crate::json::optional")]
    step_ms: Option<f64>,
    #[serde(with = "crate::json::optional")]
    step_ms_max: Option<f64>,
    #[serde(with = "crate::json::optional")]
    comm_ms: Option<f64>,
    #[serde(with = "crate::json::optional")]
    comm_exposed_ms: Option<f64>,
    #[serde(with = "crate::json::optional")]
    loss_scale: Option<f64>,
    /// Number of steps so far whose update was skipped.
    skipped_steps: usize,
    #[serde(with = "crate::json::optional")]
    val_loss: Option<f64>,
    #[serde(with = "crate::json::optional")]
    val_accuracy: Option<f64>,
    /// The model's own metrics; empty if it has none or the line is not of an evaluation.
    #[serde(with = "crate::json::by_name")]
    val_metrics: BTreeMap<String, f64>,
}

/// The mean and the maximum of values, of which those that are not finite are ignored.
#[derive(Default)]
struct Aggregate {
    sum: f64,
    count: usize,
    max: Option<f64>,
}

impl Aggregate {
    fn add(&mut self, value: f64) {
        if value.is_finite() {
            (self.sum, self.count) = (self.sum + value, self.count + 1);
            self.max = Some(self.max.map_or(value, |max| max.max(value)));
        }
    }

    /// The mean; NaN if no value was finite.
    fn mean(&self) -> Option<f64> {
        Some(self.sum / self.count as f64)
    }
}

/// The steps since the last line.
#[derive(Default)]
struct Window {
    steps: usize,
    loss: Aggregate,
    gradient_norm: Aggregate,
    step_ms: Aggregate,
    comm_ms: Aggregate,
    comm_exposed_ms: Aggregate,
}

/// Writes `metrics.jsonl`, a line per logged step. An error of writing, as a full disk, ends the file but not the run.
pub(super) struct Metrics {
    file: Option<File>,
    started: Instant,
    /// Tokens of a step over all workers.
    step_tokens: usize,
    /// Number of steps in an epoch.
    epoch_steps: usize,
    window: Window,
    logged: Instant,
}

impl Metrics {
    /// Begins the file, or continues it after the lines up to step `done`. A step has `step_tokens` tokens, and an
    /// epoch `epoch_steps` steps.
    pub(super) fn open(
        job: &Job,
        done: usize,
        step_tokens: usize,
        epoch_steps: usize,
        callback: &mut dyn Callback,
    ) -> Self {
        let path = job.out.join("metrics.jsonl");
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
        let keep = |line: &str| done > 0 && step(line).is_some_and(|step| step <= done as u64);
        let file = match append_after(&path, keep).map_err(Error::io("open", &path)) {
            Ok((file, _)) => Some(file),
            Err(error) => {
                callback.warning(&format!("no metrics.jsonl: {error}"));
                None
            }
        };
        let (started, logged, window) = (job.started, Instant::now(), Window::default());
        Self { file, started, step_tokens, epoch_steps: epoch_steps.max(1), window, logged }
    }

    /// Adds a step to the window.
    pub(super) fn add(&mut self, report: &StepReport) {
        let window = &mut self.window;
        window.steps += 1;
        window.loss.add(report.loss);
        window.gradient_norm.add(report.gradient_norm);
        window.step_ms.add(report.step_ms);
        window.comm_ms.add(report.comm_ms);
        window.comm_exposed_ms.add(report.comm_exposed_ms);
    }

    /// Writes a line about the steps since the last one; `report` is that of the newest step.
    pub(super) fn log(&mut self, report: &StepReport, position: Position, callback: &mut dyn Callback) {
        let (window, since) = (std::mem::take(&mut self.window), self.logged.elapsed().as_secs_f64());
        self.logged = Instant::now();
        let line = Line {
            loss: window.loss.mean(),
            loss_max: window.loss.max.or(Some(f64::NAN)),
            lr: Some(report.lr),
            gradient_norm: window.gradient_norm.mean(),
            gradient_norm_max: window.gradient_norm.max.or(Some(f64::NAN)),
            tokens_per_s: Some((window.steps * self.step_tokens) as f64 / since.max(1e-9)),
            step_ms: window.step_ms.mean(),
            step_ms_max: window.step_ms.max,
            comm_ms: window.comm_ms.mean(),
            comm_exposed_ms: window.comm_exposed_ms.mean(),
            loss_scale: report.loss_scale,
            ..self.at(report.step, position, report.skipped_steps)
        };
        self.write(&line, callback);
    }

    /// Writes a line about an evaluation.
    pub(super) fn log_score(
        &mut self,
        step: usize,
        position: Position,
        skipped: usize,
        score: &Score,
        callback: &mut dyn Callback,
    ) {
        let line = Line {
            val_loss: Some(score.loss),
            val_accuracy: score.accuracy,
            val_metrics: score.metrics.iter().cloned().collect(),
            ..self.at(step, position, skipped)
        };
        self.write(&line, callback);
    }

    fn at(&self, step: usize, position: Position, skipped_steps: usize) -> Line {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Line {
            step,
            time: now.as_millis() as f64 / 1e3,
            elapsed_s: self.started.elapsed().as_millis() as f64 / 1e3,
            tokens: step as u64 * self.step_tokens as u64,
            epochs: position.epoch as f64 + position.batch as f64 / self.epoch_steps as f64,
            skipped_steps,
            ..Line::default()
        }
    }

    fn write(&mut self, line: &Line, callback: &mut dyn Callback) {
        let Some(file) = &mut self.file else { return };
        let text = serde_json::to_string(line).map_err(std::io::Error::from);
        let written = text.and_then(|text| file.write_all(format!("{text}\n").as_bytes()));
        if let Err(error) = written {
            callback.warning(&format!("metrics.jsonl ends here: {error}"));
            self.file = None;
        }
    }
}
