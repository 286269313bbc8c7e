//! Callbacks: they observe a run and may change its learning rate or stop it.

use super::evaluate::Score;
use super::job::Job;
use crate::config::Config;
use crate::error::{Error, Result};

/// One finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Number of steps done.
    pub step: usize,
    /// Mean loss over the step's targets.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens (for images: samples) per second over all ranks.
    pub tokens_per_s: f64,
    /// Duration in milliseconds.
    pub step_ms: f64,
    /// Time during which communication ran, in milliseconds.
    pub comm_ms: f64,
    /// Time during which the step waited for communication, in milliseconds.
    pub comm_exposed_ms: f64,
    /// The factor by which the loss was multiplied before backward, if it was.
    pub loss_scale: Option<f64>,
    /// Number of steps so far whose update was skipped because gradients were not finite.
    pub skipped_steps: usize,
}

/// Whether a run continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flow {
    /// It continues.
    #[default]
    Continue,
    /// It saves and ends after the next step, on all ranks, even if the callback of only one rank returns this.
    Stop,
}

/// Observes a run, and may change its learning rate or stop it. Every rank calls its own callback at the same points
/// of the run.
///
/// ```
/// use regatta::train::{Callback, Flow, StepReport};
///
/// /// Stops the run when the loss is low enough.
/// struct StopAt(f64);
///
/// impl Callback for StopAt {
///     fn step(&mut self, report: &StepReport) -> Flow {
///         if report.loss < self.0 { Flow::Stop } else { Flow::Continue }
///     }
/// }
/// # let _: Box<dyn Callback> = Box::new(StopAt(0.1));
/// ```
pub trait Callback {
    /// Called before the job is joined: whether the callback can do its work in a run of this configuration.
    ///
    /// # Errors
    /// It cannot, for example because it waits for evaluations and there are none.
    fn check(&self, _config: &Config) -> Result<()> {
        Ok(())
    }

    /// Called on rank 0 before the other methods. The message says where the run's folder is, and when and where
    /// checkpoints are written.
    fn announced(&mut self, _message: &str) {}

    /// Called before the first step with the number of steps already done and the number of trainable parameters.
    fn started(&mut self, _job: &Job, _done: usize, _parameters: usize) {}

    /// The learning rate of step `step` (from 0); `scheduled` is the configured one. It must be the same on all ranks,
    /// so use only the arguments and values that are the same on all ranks.
    fn learning_rate(&mut self, _step: usize, scheduled: f64) -> f64 {
        scheduled
    }

    /// Called after every step. Loss and norm in the report are the same on all ranks; times are this rank's own.
    fn step(&mut self, _report: &StepReport) -> Flow {
        Flow::Continue
    }

    /// Called after an evaluation, whose score is the same on all ranks.
    fn evaluated(&mut self, _step: usize, _score: &Score) -> Flow {
        Flow::Continue
    }

    /// Called on rank 0 for a problem that does not end the run.
    fn warning(&mut self, _message: &str) {}
}

/// A callback that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Callback for Silent {}

/// Several callbacks, which are called in their order.
#[derive(Default)]
pub(super) struct Callbacks(pub(super) Vec<Box<dyn Callback>>);

impl Callbacks {
    fn any_stops(&mut self, each: impl FnMut(&mut Box<dyn Callback>) -> Flow) -> Flow {
        let flows: Vec<Flow> = self.0.iter_mut().map(each).collect();
        if flows.contains(&Flow::Stop) { Flow::Stop } else { Flow::Continue }
    }
}

impl Callback for Callbacks {
    fn announced(&mut self, message: &str) {
        self.0.iter_mut().for_each(|callback| callback.announced(message));
    }

    fn started(&mut self, job: &Job, done: usize, parameters: usize) {
        self.0.iter_mut().for_each(|callback| callback.started(job, done, parameters));
    }

    fn learning_rate(&mut self, step: usize, scheduled: f64) -> f64 {
        self.0.iter_mut().fold(scheduled, |lr, callback| callback.learning_rate(step, lr))
    }

    fn step(&mut self, report: &StepReport) -> Flow {
        self.any_stops(|callback| callback.step(report))
    }

    fn evaluated(&mut self, step: usize, score: &Score) -> Flow {
        self.any_stops(|callback| callback.evaluated(step, score))
    }

    fn warning(&mut self, message: &str) {
        self.0.iter_mut().for_each(|callback| callback.warning(message));
    }
}

/// Ends a run when the validation loss has not improved for some evaluations, so `train.eval_every` must be set. A run that
/// is resumed counts them anew.
#[derive(Debug, Clone)]
pub struct EarlyStopping {
    patience: usize,
    least: f64,
    best: f64,
    /// Number of evaluations since the best one.
    since: usize,
}

impl EarlyStopping {
    /// Ends the run after `patience` evaluations in a row whose loss is not more than `least` below the best so far.
    pub fn new(patience: usize, least: f64) -> Self {
        Self { patience: patience.max(1), least, best: f64::INFINITY, since: 0 }
    }
}

impl Callback for EarlyStopping {
    fn check(&self, config: &Config) -> Result<()> {
        if config.train.eval_every == 0 {
            return Err(Error::Usage(
                "EarlyStopping needs evaluations: set train.eval_every, as with settings(|train| train.eval_every = 100)".into(),
            ));
        }
        Ok(())
    }

    fn evaluated(&mut self, _step: usize, score: &Score) -> Flow {
        if score.loss < self.best - self.least {
            (self.best, self.since) = (score.loss, 0);
        } else {
            self.since += 1;
        }
        if self.since >= self.patience { Flow::Stop } else { Flow::Continue }
    }
}

/// Your own learning rate: a function of the step (from 0) and of the configured rate.
///
/// ```
/// use regatta::train::{Callback, LearningRate};
/// let mut halved = LearningRate(|_step: usize, scheduled: f64| scheduled / 2.0);
/// assert_eq!(halved.learning_rate(0, 0.1), 0.05);
/// ```
pub struct LearningRate<F>(pub F);

impl<F: FnMut(usize, f64) -> f64> Callback for LearningRate<F> {
    fn learning_rate(&mut self, step: usize, scheduled: f64) -> f64 {
        (self.0)(step, scheduled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_when_its_loss_has_not_improved_for_a_while() {
        let score = |loss| Score { loss, accuracy: None, metrics: vec![] };
        let mut stopping = EarlyStopping::new(2, 0.1);
        let mut flow = |loss| stopping.evaluated(0, &score(loss));
        assert_eq!([3.0, 2.95, 2.5, 2.45].map(&mut flow), [Flow::Continue; 4]);
        assert_eq!(flow(f64::NAN), Flow::Stop);
    }

    #[test]
    fn callbacks_are_called_in_order_and_any_may_stop() {
        let mut all = Callbacks(vec![
            Box::new(LearningRate(|step, lr| lr * step as f64)),
            Box::new(LearningRate(|_, lr| lr + 1.0)),
            Box::new(EarlyStopping::new(1, 0.0)),
        ]);
        assert_eq!(all.learning_rate(3, 2.0), 7.0);
        let score = Score { loss: f64::INFINITY, accuracy: None, metrics: vec![] };
        assert_eq!(all.evaluated(1, &score), Flow::Stop);
    }
}
