//! One training run on one rank: the loop.

mod finish;
mod outcome;
mod step;

use super::callback::Callback;
use super::evaluate::{Score, evaluate};
use super::folder::RunFolder;
use super::job::Job;
use super::link::LinkUse;
use super::losses::Losses;
use super::metrics::Metrics;
use super::profile::Profiler;
use super::requests::RequestedSaves;
use super::resume::resume;
use super::saving::{Saving, checkpoint_before};
use super::summary::Summary;
use super::trace::Trace;
use crate::checkpoint::State;
use crate::config::LastBatch;
use crate::data::prefetch::Prefetch;
use crate::data::sampler::{Position, Sampler};
use crate::datasets::{Datasets, HostBatch};
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::optim::{FlatOptimizer, LossScale};
use crate::parallel::{Carried, Engine};
use crate::setup::{agree, engine};
use outcome::{Requested, StepTimes};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Number of batches that are prepared ahead of the step that uses them.
const PREFETCH: usize = 4;

/// Trains as `job` describes. All ranks call it and return the same summary.
///
/// A process that does nothing else should call [`keep_freed_memory`](crate::autograd::keep_freed_memory) first, as
/// the `regatta` program does: it changes the process's allocator, which makes steps faster.
///
/// # Errors
/// Data or a checkpoint cannot be used, ranks differ in their configuration or data, a peer died or stalled, or the
/// loss is not finite. The last checkpoint is kept.
pub fn train(job: &Job, callback: &mut dyn Callback) -> Result<Summary> {
    train_on(job, Datasets::open(&job.config)?, callback)
}

/// As [`train`], with data that is already open.
pub(super) fn train_on(job: &Job, data: Datasets, callback: &mut dyn Callback) -> Result<Summary> {
    let data = for_model(job, data)?.checked(job.config.model.samples());
    data.check_sample(&job.config)?;
    agree(&job.group, &job.config, &[], &data)?;
    let ranks = (&job.group, job.servers.as_ref());
    let engine = engine(&job.config, &job.plan, ranks, data.vocab, job.config.train.seed)?;
    Run::new(job, &data, engine)?.train(callback)
}

/// The data of a job, with the tokens or classes of the model that the job goes on with.
pub(super) fn for_model(job: &Job, mut data: Datasets) -> Result<Datasets> {
    // Problems of the checkpoint are reported when it is read.
    if let Some(checkpoint) = checkpoint_before(job) {
        data = data.for_model_over(checkpoint.state().vocab);
    }
    if data.vocab == 0 {
        return Err(Error::Usage(
            "the data has no classes: give the number of tokens or classes, at least 1".into(),
        ));
    }
    Ok(data)
}

struct Run<'a> {
    job: &'a Job,
    data: &'a Datasets,
    engine: Engine,
    optimizer: FlatOptimizer,
    saving: Saving,
    folder: RunFolder,
    /// Digest of the data and the tokenizer.
    digest: String,
    /// Warnings that are reported before the first step.
    warnings: Vec<String>,
    /// Number of steps done.
    done: usize,
    position: Position,
    /// Number of steps done before this process.
    before: usize,
    /// The checkpoint from which the run was resumed.
    from: Option<PathBuf>,
    /// When the last save was begun, or else the run.
    saved: Instant,
    /// When the first step of this process was begun.
    begun: Instant,
    /// The last finite training loss.
    loss: Option<f64>,
    best: Option<(f64, usize)>,
    val_loss: Option<f64>,
    loss_scale: Option<LossScale>,
    score: Option<Score>,
    /// Times of the newest steps of this process.
    times: Vec<StepTimes>,
    time_to_first_step: Option<Duration>,
    trace: Trace,
    profiler: Profiler,
    /// Measured peak of floating-point operations per second of this rank's threads.
    peak_flops_per_s: f64,
    /// What the groups communicated in the last step.
    carried: Option<Carried>,
    requested_saves: RequestedSaves,
    /// Whether a callback of this rank has requested to stop.
    stop: bool,
}

impl<'a> Run<'a> {
    fn new(job: &'a Job, data: &'a Datasets, engine: Engine) -> Result<Self> {
        let rank = job.group.rank();
        let saving = Saving::new(job)?;
        let mut folder = RunFolder::enter(job, saving.location())?;
        let warnings = std::mem::take(&mut folder.warnings);
        let offload = job.plan.offload.then(|| job.out.join("offload").join(format!("rank-{rank:05}")));
        let (units, shard) = (engine.units().clone(), engine.shard());
        let mut optimizer = match job.servers {
            Some(_) => FlatOptimizer::elsewhere(&job.config.optimizer, units),
            None => FlatOptimizer::new(&job.config.optimizer, units, shard, offload.as_deref())?,
        };
        if let Some(updates) = job.plan.learns_scale_for() {
            optimizer.learn_scale_for(updates);
        }
        let mut run = Self {
            job,
            data,
            optimizer,
            engine,
            saving,
            folder,
            digest: data.digest()?,
            warnings,
            done: 0,
            position: Position::default(),
            before: 0,
            from: None,
            saved: Instant::now(),
            begun: Instant::now(),
            loss: None,
            best: None,
            val_loss: None,
            loss_scale: LossScale::new(&job.config.train),
            score: None,
            times: vec![],
            time_to_first_step: None,
            trace: Trace::new(job.group.size()),
            profiler: Profiler::default(),
            peak_flops_per_s: regatta_kernel::peak::flops_per_s(),
            carried: None,
            requested_saves: RequestedSaves::default(),
            stop: false,
        };
        let known = (data.vocab, run.digest.as_str());
        let resumed = match job.resume {
            Some(how) => resume(job, how, run.saving.location(), known, &mut run.engine, &mut run.optimizer)?,
            None => None,
        };
        if let Some(resumed) = resumed {
            let state = resumed.state;
            run.warnings.extend(resumed.warnings);
            run.from = Some(resumed.path);
            run.done = state.step;
            run.before = state.step;
            run.position = state.position;
            run.loss = state.loss;
            run.best = state.best.filter(|(loss, _)| loss.is_finite());
            run.val_loss = state.val_loss;
            // With another precision the scale begins at its initial value.
            let same = state.config.train.precision == job.config.train.precision;
            run.loss_scale = state.loss_scale.filter(|_| same).or(run.loss_scale);
        }
        Ok(run)
    }

    fn train(mut self, callback: &mut dyn Callback) -> Result<Summary> {
        let (job, config) = (self.job, &self.job.config.train);
        let lead = job.leads();
        let mut batches = self.batches()?;
        if lead {
            self.prepare(callback)?;
        }
        let (mut metrics, mut losses) = if lead { self.logs(callback) } else { (None, None) };
        let parameters = self.trainable()?;
        callback.started(job, self.done, parameters);
        if lead && job.plan.mesh.workers() > 1 {
            let link = LinkUse::of(&job.config, &job.plan, self.data.vocab, None)?;
            callback.announced(&link.to_string());
        }
        self.engine.ready(self.optimizer.updates())?;
        self.folder.begin();
        self.saved = Instant::now();
        self.begun = Instant::now();
        let mut interrupted = false;
        while self.done < config.steps && !interrupted {
            let (report, requested);
            let before_step = self.done;
            let last = self.done + 1 == config.steps;
            let before = if last { Some(self.engine.carried()?) } else { None };
            (report, requested) = self.step(&mut batches, callback)?;
            interrupted = requested == Requested::Stop;
            let advanced = report.step > before_step;
            if let Some(before) = before {
                self.carried = Some(self.engine.carried()?.since(&before));
            }
            if advanced {
                self.apply(callback.step(&report));
            }
            let passed = |every: usize| advanced && passed(before_step, self.done, every);
            let logged = passed(config.log_every) || self.done == config.steps || self.done == 1;
            if let (Some(metrics), Some(losses), true) = (&mut metrics, &mut losses, advanced) {
                metrics.add(&report);
                warn(losses.add(self.done, report.loss), callback);
                if logged {
                    metrics.log(&report, self.position, callback);
                    warn(losses.flush(), callback);
                }
            }
            if passed(config.check_every) {
                self.engine.check_identical()?;
            }
            // Where workers train each at its own speed, the first one does the rest alone.
            if job.is_free() && !lead {
                continue;
            }
            let mut best = false;
            let (evaluates, saves) = (passed(config.eval_every), passed(config.checkpoint_every));
            if !interrupted && (evaluates || self.done == config.steps) {
                best = self.evaluate(callback)?;
                if let (Some(metrics), Some(score)) = (&mut metrics, self.score.clone()) {
                    metrics.log_score(self.done, self.position, self.skipped_steps(), &score, callback);
                }
            }
            let last = interrupted || self.done == config.steps;
            if best || last || requested == Requested::Save || saves {
                if let Some(losses) = &mut losses {
                    // So that a run that resumes from this checkpoint finds the losses.
                    warn(losses.flush(), callback);
                }
                let failed = self.save(best)?;
                self.warn_unsaved(failed, callback);
            }
        }
        drop(batches);
        self.end(interrupted, callback)
    }

    /// Rank 0's preparation of the first step: reports the announcement and warnings, and saves the tokenizer.
    fn prepare(&mut self, callback: &mut dyn Callback) -> Result<()> {
        let job = self.job;
        callback.announced(&self.announcement());
        for warning in self.warnings.drain(..) {
            callback.warning(&warning);
        }
        if let Some(tokenizer) = &self.data.tokenizer {
            // So that the folder has all that generating text needs. A resumed run already has the file.
            let path = job.out.join("tokenizer.json");
            let json = tokenizer.to_json()?;
            if fs::read_to_string(&path).ok().as_deref() != Some(&json) {
                write_atomically(&path, json.as_bytes())?;
            }
        }
        Ok(())
    }

    /// A message: where the run's folder is, and when and where checkpoints are written.
    fn announcement(&self) -> String {
        let (out, config) = (&self.job.out, &self.job.config.train);
        let mut when = vec![];
        if config.checkpoint_minutes > 0.0 {
            when.push(format!("every {} minutes", config.checkpoint_minutes));
        }
        if config.checkpoint_every > 0 {
            when.push(format!("every {} steps", config.checkpoint_every));
        }
        when.push("at the best validation loss".into());
        let from =
            self.from.as_ref().map_or(String::new(), |from| format!("; resuming from {}", from.display()));
        let place = self.saving.location().show("");
        format!(
            "run folder {}: checkpoints {} and at the end, in {}{from}",
            out.display(),
            when.join(", "),
            place.display().to_string().trim_end_matches('/')
        )
    }

    /// Opens rank 0's metrics and losses.
    fn logs(&self, callback: &mut dyn Callback) -> (Option<Metrics>, Option<Losses>) {
        let (job, config) = (self.job, &self.job.config.train);
        let (batch, samples) = (job.plan.global_batch(), self.data.train.len());
        let epoch_steps = match config.last_batch {
            LastBatch::Drop => samples / batch.max(1),
            LastBatch::Pad => samples.div_ceil(batch.max(1)),
        };
        let tokens = batch * self.data.train.tokens_per_sample();
        let metrics = Metrics::open(job, self.done, tokens, epoch_steps, callback);
        let (losses, problem) = Losses::open(&job.out, self.done);
        warn(problem, callback);
        (Some(metrics), Some(losses))
    }

    /// This rank's batches from the current position on.
    fn batches(&self) -> Result<Prefetch<(HostBatch, Position)>> {
        let (job, config) = (self.job, &self.job.config.train);
        let train = self.data.train.clone();
        let rows = job.plan.batch_per_worker;
        let (worker, workers) = (self.worker(), job.plan.mesh.workers());
        let mut sampler =
            Sampler::new(train.len(), workers, worker, config.seed, true, config.last_batch, rows)?;
        sampler.seek(self.position);
        Ok(Prefetch::new(PREFETCH, move || {
            let batch = sampler.next_batch();
            Ok(Some((train.batch(batch.epoch, &batch.indices)?, sampler.position())))
        }))
    }

    /// The worker that this rank belongs to.
    fn worker(&self) -> usize {
        match &self.job.servers {
            Some(link) => link.worker(),
            None => self.engine.groups().worker(),
        }
    }

    /// On rank 0, warns that a checkpoint could not be written.
    fn warn_unsaved(&self, failed: Option<String>, callback: &mut dyn Callback) {
        if let (Some(reason), true) = (failed, self.job.leads()) {
            callback.warning(&format!(
                "no checkpoint: {reason}; training continues, and the last checkpoint is kept"
            ));
        }
    }

    /// Evaluates. Returns whether the validation loss is the lowest so far.
    fn evaluate(&mut self, callback: &mut dyn Callback) -> Result<bool> {
        let (job, plan) = (self.job, &self.job.plan);
        let samples = job.config.train.eval_batches.saturating_mul(plan.global_batch());
        // The rows of a micro-batch, so that evaluation needs no more memory than training.
        self.score = evaluate(&mut self.engine, &*self.data.val, samples, plan.micro_batch())?;
        let Some(score) = self.score.clone() else { return Ok(false) };
        self.apply(callback.evaluated(self.done, &score));
        self.val_loss = Some(score.loss);
        if !score.loss.is_finite() && job.leads() {
            callback.warning(&format!(
                "the validation loss after step {} is {}: no best checkpoint is written, and no older one is removed until \
                 the loss is finite; --resume --from step-N returns to an older one",
                self.done, score.loss
            ));
        }
        let best = score.loss.is_finite() && self.best.is_none_or(|(loss, _)| score.loss < loss);
        if best {
            self.best = Some((score.loss, self.done));
        }
        Ok(best)
    }

    /// Begins to write a checkpoint, while training continues. Returns why the one before failed, if it did.
    fn save(&mut self, best: bool) -> Result<Option<String>> {
        let job = self.job;
        let state = State::new(
            self.done,
            job.config.clone(),
            job.plan.clone(),
            self.data.vocab,
            self.position,
            self.loss,
            self.best,
            self.val_loss,
        );
        let data = Some(self.digest.clone());
        let state = State { loss_scale: self.loss_scale.clone(), data, ..state };
        let begun = self.saving.begin(job, state, best, &mut self.engine, &self.optimizer);
        self.saved = Instant::now();
        begun
    }
}

/// Whether a multiple of `every` was reached by the steps after `before` up to `now`.
fn passed(before: usize, now: usize, every: usize) -> bool {
    every > 0 && now / every > before / every
}

/// Reports a problem, if there is one.
fn warn(problem: Option<String>, callback: &mut dyn Callback) {
    if let Some(problem) = problem {
        callback.warning(&problem);
    }
}
