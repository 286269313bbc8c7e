//! `metrics.jsonl`, which grows while a run goes on.

use super::evaluate::Score;
use super::run::{Job, Observer, StepReport};
use crate::data::sampler::Position;
use crate::error::Error;
use crate::files::append_after;
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A line. All lines have all keys; what a line has nothing to say on is `null`.
#[derive(Default, Serialize)]
struct Line {
    step: usize,
    /// Seconds since 1970.
    time: f64,
    /// Seconds since this process was started; a run that goes on begins at 0 again.
    elapsed_s: f64,
    /// Tokens (samples of pictures) learnt from so far, those before a resume included.
    tokens: u64,
    /// Epochs so far.
    epochs: f64,
    /// Mean over the steps since the last such line; steps whose loss is not finite do not count.
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
    /// Over all time since the last such line, that of saving and evaluating included.
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
    /// Steps so far whose update was skipped.
    skipped_steps: usize,
    #[serde(with = "crate::json::optional")]
    val_loss: Option<f64>,
    #[serde(with = "crate::json::optional")]
    val_accuracy: Option<f64>,
}

/// The mean and the largest of some numbers.
#[derive(Default)]
struct Spread {
    sum: f64,
    count: usize,
    max: Option<f64>,
}

impl Spread {
    fn add(&mut self, value: f64) {
        if value.is_finite() {
            (self.sum, self.count) = (self.sum + value, self.count + 1);
            self.max = Some(self.max.map_or(value, |max| max.max(value)));
        }
    }

    /// NaN where none was finite.
    fn mean(&self) -> Option<f64> {
        Some(self.sum / self.count as f64)
    }
}

/// The steps since the last line.
#[derive(Default)]
struct Window {
    steps: usize,
    loss: Spread,
    gradient_norm: Spread,
    step_ms: Spread,
    comm_ms: Spread,
    comm_exposed_ms: Spread,
}

/// `metrics.jsonl`: a line a logged step. A disk that is full costs lines, not the run.
pub(super) struct Metrics {
    file: Option<File>,
    started: Instant,
    /// Tokens of a step over all workers.
    step_tokens: usize,
    /// Batches of an epoch.
    epoch: usize,
    window: Window,
    logged: Instant,
}

impl Metrics {
    /// Begins the file anew, or goes on after the lines up to step `done`. A step takes `step_tokens` tokens, and an epoch
    /// `epoch` steps.
    pub(super) fn open(
        job: &Job,
        done: usize,
        step_tokens: usize,
        epoch: usize,
        observer: &mut dyn Observer,
    ) -> Self {
        let path = job.out.join("metrics.jsonl");
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
        let keep = |line: &str| done > 0 && step(line).is_some_and(|step| step <= done as u64);
        let file = match append_after(&path, keep).map_err(Error::io("open", &path)) {
            Ok((file, _)) => Some(file),
            Err(error) => {
                observer.warning(&format!("no metrics.jsonl: {error}"));
                None
            }
        };
        let (started, logged, window) = (job.started, Instant::now(), Window::default());
        Self { file, started, step_tokens, epoch: epoch.max(1), window, logged }
    }

    /// Takes a step into account.
    pub(super) fn add(&mut self, report: &StepReport) {
        let window = &mut self.window;
        window.steps += 1;
        window.loss.add(report.loss);
        window.gradient_norm.add(report.gradient_norm);
        window.step_ms.add(report.step_ms);
        window.comm_ms.add(report.comm_ms);
        window.comm_exposed_ms.add(report.comm_exposed_ms);
    }

    /// Writes a line on the steps since the last one, of which `report` is on the newest.
    pub(super) fn log(&mut self, report: &StepReport, position: Position, observer: &mut dyn Observer) {
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
        self.write(&line, observer);
    }

    /// Writes a line on an evaluation.
    pub(super) fn log_score(
        &mut self,
        step: usize,
        position: Position,
        skipped: usize,
        score: Score,
        observer: &mut dyn Observer,
    ) {
        let line = Line {
            val_loss: Some(score.loss),
            val_accuracy: score.accuracy,
            ..self.at(step, position, skipped)
        };
        self.write(&line, observer);
    }

    fn at(&self, step: usize, position: Position, skipped_steps: usize) -> Line {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Line {
            step,
            time: now.as_millis() as f64 / 1e3,
            elapsed_s: self.started.elapsed().as_millis() as f64 / 1e3,
            tokens: step as u64 * self.step_tokens as u64,
            epochs: position.epoch as f64 + position.batch as f64 / self.epoch as f64,
            skipped_steps,
            ..Line::default()
        }
    }

    fn write(&mut self, line: &Line, observer: &mut dyn Observer) {
        let Some(file) = &mut self.file else { return };
        let text = serde_json::to_string(line).map_err(std::io::Error::from);
        let written = text.and_then(|text| file.write_all(format!("{text}\n").as_bytes()));
        if let Err(error) = written {
            observer.warning(&format!("metrics.jsonl ends here: {error}"));
            self.file = None;
        }
    }
}
