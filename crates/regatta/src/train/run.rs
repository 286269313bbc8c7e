//! One training run on one rank.

use super::config::{Config, LastBatch, ModelConfig};
use super::dataset::{Datasets, HostBatch};
use super::evaluate::{Score, evaluate};
use super::metrics::Metrics;
use super::optimizer::FlatOptimizer;
use super::profile::Profiler;
use super::rank::Rank;
use super::requests::{RequestedSaves, Requests};
use super::saving::Saving;
use super::scaling::LossScale;
use super::schedule::learning_rate;
use super::summary::{Communication, Memory, Pipeline, Summary, median, peak_rss_bytes};
use super::trace::Trace;
use crate::autograd::{Backend, Cost, Phase, Precision, keep_freed_memory, measured, recording};
use crate::checkpoint::{self, State, Which};
use crate::data::prefetch::Prefetch;
use crate::data::sampler::{Position, Sampler};
use crate::error::{Error, Result};
use crate::layers::Context;
use crate::models::{Batch, Cnn, EncoderDecoder, Gpt, Mlp, Model, Resnet};
use crate::parallel::{Carried, CommTime, Engine};
use crate::random::Stream;
use regatta_comm::{Group, ReduceOp};
use regatta_plan::Plan;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps left out of the medians while caches and allocators warm up, where a run has more.
const WARM_UP: usize = 5;
/// Batches prepared ahead of the step that uses them.
const PREFETCH: usize = 4;

/// What one rank is to do.
pub struct Job {
    /// What to train, on what, how long.
    pub config: Config,
    /// How the work is spread.
    pub plan: Plan,
    /// The ranks.
    pub group: Group,
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from the folder's last checkpoint.
    pub resume: bool,
    /// What is asked from outside (by signals), answered at the end of the step.
    pub requests: Arc<Requests>,
    /// When the program was started.
    pub started: Instant,
    /// Threads that this rank computes with.
    pub threads: usize,
}

/// One finished step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StepReport {
    /// Steps done.
    pub step: usize,
    /// Mean loss over the step's samples.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens (samples for digits) a second over all ranks.
    pub tokens_per_s: f64,
    /// Duration in milliseconds.
    pub step_ms: f64,
    /// Time that all-reduces ran, in milliseconds.
    pub comm_ms: f64,
    /// Time that the step stood waiting for them, in milliseconds.
    pub comm_exposed_ms: f64,
    /// What the loss was multiplied by before backward, where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Steps so far whose update was skipped, because their gradients were not finite.
    #[serde(skip_serializing_if = "none")]
    pub skipped_steps: usize,
}

fn none(count: &usize) -> bool {
    *count == 0
}

/// Sees a run as it happens; on rank 0 only.
pub trait Observer {
    /// Before the first step: steps already done, and the model's trainable parameters.
    fn started(&mut self, _job: &Job, _done: usize, _parameters: usize) {}
    /// After every step.
    fn step(&mut self, _report: &StepReport) {}
    /// After an evaluation.
    fn evaluated(&mut self, _step: usize, _score: Score) {}
    /// Something went wrong that does not end the run.
    fn warning(&mut self, _message: &str) {}
}

/// Sees nothing.
pub struct Silent;

impl Observer for Silent {}

/// Trains as `job` says. All ranks return the same summary.
///
/// # Errors
/// Data or a checkpoint that cannot be used, a peer that died or stalled, a loss that is not finite. The last
/// checkpoint stays.
pub fn train(job: &Job, observer: &mut dyn Observer) -> Result<Summary> {
    keep_freed_memory();
    let data = Datasets::open(&job.config)?;
    let seed = job.config.train.seed;
    let rank = Rank::new(&job.config, &job.plan, &job.group, data.vocab)?;
    let init = &rank.init(seed);
    match &job.config.model {
        ModelConfig::Gpt(config) => {
            Run::new(job, &data, rank.engine(Gpt::new(config, data.vocab, init), init)?)?.train(observer)
        }
        ModelConfig::Mlp(config) => {
            Run::new(job, &data, rank.engine(Mlp::new(config, 28 * 28, data.vocab, init), init)?)?
                .train(observer)
        }
        ModelConfig::Cnn(config) => {
            Run::new(job, &data, rank.engine(Cnn::new(config, 28, data.vocab, init), init)?)?.train(observer)
        }
        ModelConfig::Resnet(config) => {
            Run::new(job, &data, rank.engine(Resnet::new(config, data.vocab, init), init)?)?.train(observer)
        }
        ModelConfig::EncoderDecoder(config) => {
            Run::new(job, &data, rank.engine(EncoderDecoder::new(config, data.vocab, init), init)?)?
                .train(observer)
        }
    }
}

/// What was asked from outside during a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    /// To save and go on.
    Save,
    /// To save and stop.
    Stop,
}

fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

struct Run<'a, M> {
    job: &'a Job,
    data: &'a Datasets,
    engine: Engine<M>,
    optimizer: FlatOptimizer,
    saving: Saving,
    done: usize,
    position: Position,
    losses: Vec<f64>,
    best: Option<(f64, usize)>,
    val_loss: Option<f64>,
    loss_scale: Option<LossScale>,
    score: Option<Score>,
    /// Of each step of this process, in milliseconds: all of it, communication, that part that was waited for, tasks of the
    /// schedule, and the end of the last of them.
    times: Vec<[f64; 5]>,
    time_to_first_step: Option<Duration>,
    trace: Trace,
    profiler: Profiler,
    /// Floating-point operations a second that this rank's threads could reach.
    peak_flops_per_s: f64,
    /// What the groups carried in the last step.
    carried: Option<Carried>,
    requested_saves: RequestedSaves,
}

impl<'a, M: Model> Run<'a, M> {
    fn new(job: &'a Job, data: &'a Datasets, engine: Engine<M>) -> Result<Self> {
        let rank = job.group.rank();
        let offload = job.plan.offload.then(|| job.out.join("offload").join(format!("rank-{rank:05}")));
        let (units, shard) = (engine.units().clone(), engine.shard());
        let mut run = Self {
            job,
            data,
            optimizer: FlatOptimizer::new(&job.config.optimizer, units, shard, offload.as_deref())?,
            engine,
            saving: Saving::new(job)?,
            done: 0,
            position: Position::default(),
            losses: vec![],
            best: None,
            val_loss: None,
            loss_scale: LossScale::new(&job.config.train),
            score: None,
            times: vec![],
            time_to_first_step: None,
            trace: Trace::default(),
            profiler: Profiler::default(),
            peak_flops_per_s: regatta_kernel::peak::flops_per_s(),
            carried: None,
            requested_saves: RequestedSaves::default(),
        };
        if job.resume {
            let state = run.saving.resume(job, data.vocab, &mut run.engine, &mut run.optimizer)?;
            run.done = state.step;
            run.position = state.position;
            run.losses = state.losses;
            run.best = state.best;
            run.val_loss = state.val_loss;
            // A run that goes on with other numbers begins with a scale of its own.
            let same = state.config.train.precision == job.config.train.precision;
            run.loss_scale = state.loss_scale.filter(|_| same).or(run.loss_scale);
        }
        Ok(run)
    }

    fn train(mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let (job, config) = (self.job, &self.job.config.train);
        let lead = job.group.rank() == 0;
        if lead {
            fs::create_dir_all(&job.out).map_err(Error::io("create the run's folder", &job.out))?;
            if let Some(tokenizer) = &self.data.tokenizer {
                // So that the folder is all that generating text takes. A resumed run has it already.
                let path = job.out.join("tokenizer.json");
                let json = tokenizer.to_json()?;
                if fs::read_to_string(&path).ok().as_deref() != Some(&json) {
                    checkpoint::write_atomically(&path, json.as_bytes())?;
                }
            }
        }
        let mut metrics = if lead { Some(Metrics::open(job, self.done, observer)?) } else { None };
        if lead {
            let parameters = job.config.model.describe(self.data.vocab, crate::layers::Placement::whole());
            observer.started(job, self.done, trainable(&parameters));
        }
        let mut batches = self.batches()?;
        let mut interrupted = false;
        while self.done < config.steps && !interrupted {
            let (report, asked);
            let last = self.done + 1 == config.steps;
            let before = if last { Some(self.engine.carried()?) } else { None };
            (report, asked) = self.step(&mut batches, observer)?;
            interrupted = asked == Asked::Stop;
            if let Some(before) = before {
                self.carried = Some(self.engine.carried()?.since(&before));
            }
            if lead {
                observer.step(&report);
            }
            if let Some(metrics) = &mut metrics
                && (self.done.is_multiple_of(config.log_every) || self.done == config.steps || self.done == 1)
            {
                metrics.log(&report, observer);
            }
            if due(self.done, config.check_every) {
                self.engine.check_identical()?;
            }
            let mut best = false;
            if !interrupted && (due(self.done, config.eval_every) || self.done == config.steps) {
                best = self.evaluate(observer)?;
                if let (Some(metrics), Some(score)) = (&mut metrics, self.score) {
                    metrics.log_score(self.done, score, observer);
                }
            }
            let last = interrupted || self.done == config.steps;
            let due = due(self.done, config.checkpoint_every) || asked == Asked::Save;
            if best || last || due {
                let failed = self.save(best)?;
                self.warn(failed, observer);
            }
        }
        drop(batches);
        if let Some(reason) = self.saving.finish(job, true)? {
            return Err(Error::checkpoint(&job.out, format!("could not be written: {reason}")));
        }
        let hash = self.engine.check_identical()?;
        let mut rss = vec![0i64; job.group.size()];
        job.group.all_gather(&[peak_rss_bytes() as i64], &mut rss)?;
        let mut summary = self.summary(interrupted, hash, rss)?;
        if config.profile {
            let skip = if self.times.len() > 2 * WARM_UP { WARM_UP } else { 0 };
            let profile = std::mem::take(&mut self.profiler).finish(skip, self.peak_flops_per_s);
            summary.profile = profile.of_all(&job.group)?;
        }
        if let Some(path) = &config.trace {
            self.trace.write(path, &job.group)?;
        }
        let sample = self.sample(interrupted)?;
        let stopped_by = self.stopped_by(interrupted)?;
        let summary = Summary { sample, stopped_by, ..summary };
        if lead {
            summary.write(&job.out)?;
        }
        Ok(summary)
    }

    /// This rank's batches from the current position on.
    fn batches(&self) -> Result<Prefetch<(HostBatch, Position)>> {
        let (job, config) = (self.job, &self.job.config.train);
        let last = match config.last_batch {
            LastBatch::Drop => crate::data::sampler::LastBatch::Drop,
            LastBatch::Pad => crate::data::sampler::LastBatch::Pad,
        };
        let train = self.data.train.clone();
        let rows = job.plan.batch_per_worker;
        let (worker, workers) = (self.engine.axes().worker(), job.plan.mesh.workers());
        let mut sampler = Sampler::new(train.len(), workers, worker, config.seed, true, last, rows)?;
        sampler.seek(self.position);
        Ok(Prefetch::new(PREFETCH, move || {
            let batch = sampler.next_batch();
            Ok(Some((train.batch(batch.epoch, &batch.indices)?, sampler.position())))
        }))
    }

    fn step(
        &mut self,
        batches: &mut Prefetch<(HostBatch, Position)>,
        observer: &mut dyn Observer,
    ) -> Result<(StepReport, Asked)> {
        let config = &self.job.config.train;
        if !config.profile && config.trace.is_none() {
            return self.one_step(batches, observer);
        }
        let begun = Instant::now();
        let (result, operations) = recording(|| self.one_step(batches, observer));
        if config.profile {
            self.profiler.add(begun.elapsed(), &operations);
        }
        if config.trace.is_some() {
            let since = begun.duration_since(self.job.started);
            self.trace.add(self.done, since, begun, &self.engine.timeline, &operations);
        }
        result
    }

    fn one_step(
        &mut self,
        batches: &mut Prefetch<(HostBatch, Position)>,
        observer: &mut dyn Observer,
    ) -> Result<(StepReport, Asked)> {
        let (job, plan) = (self.job, &self.job.plan);
        let begun = Instant::now();
        let wait = Cost::default();
        let (host, position) = measured("wait for data", Phase::Update, wait, || batches.next())?;
        let tokens = host.tokens() * plan.mesh.workers();
        let noise = Stream::new(job.config.train.seed).named("dropout").at(self.done as u64);
        let worker = self.engine.axes().worker();
        let context = |micro: usize| Context::train(noise.at((worker * plan.accumulate + micro) as u64));
        let contexts: Vec<Context> = (0..plan.accumulate).map(context).collect();
        let parts = host.split(plan.accumulate).into_iter();
        let compute = self.engine.compute();
        let (device, dtype) = (compute.train_device(), compute.dtype());
        let micros: Vec<Batch> = parts.map(|part| part.into_batch(&device).cast(dtype)).collect();
        let loss_scale = self.loss_scale.as_ref().map(|scaling| scaling.scale);
        let unscale = 1.0 / loss_scale.unwrap_or(1.0);
        self.engine.loss_scale = loss_scale.unwrap_or(1.0);
        let result = self.engine.step(&micros, &contexts)?;
        let mut comm = result.comm;
        let owned = self.engine.units().owned();
        let cost = |flops: f64, bytes: f64| Cost { flops: flops * owned as f64, bytes: bytes * owned as f64 };
        let norm = measured("gradient norm", Phase::Update, cost(2.0, 4.0), || self.engine.gradient_norm())?;
        let norm = norm * unscale;
        let clip = job.config.optimizer.clip;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let lr = learning_rate(&job.config.optimizer, self.done, job.config.train.steps);
        let (loss, asked) = {
            let loss = result.loss_sum / plan.accumulate as f64;
            measured("agree on the loss", Phase::Update, wait, || self.agree(loss, &mut comm, observer))?
        };
        // All ranks see the same loss and norm, and so decide alike.
        let finite = loss.is_finite() && norm.is_finite();
        // In f32 a loss that is not finite has no cure in its scale.
        let lost = !loss.is_finite() && job.config.train.precision == Precision::F32;
        let goes_on = match &mut self.loss_scale {
            Some(scaling) if !lost => scaling.stepped(finite),
            _ => finite,
        };
        if !goes_on {
            return Err(Error::Numeric(format!(
                "the loss is {loss} and the gradient's norm {norm} at step {}: lower optimizer.lr or set \
                 optimizer.clip; the last checkpoint in {} is from before",
                self.done + 1,
                job.out.display()
            )));
        }
        if finite {
            // Gradients are read, parameters and moments read and written.
            let bytes = 12.0 + 8.0 * self.optimizer.moments() as f64;
            let cost = cost(4.0 + 5.0 * self.optimizer.moments() as f64, bytes);
            measured("optimizer", Phase::Update, cost, || {
                self.engine.update(&mut self.optimizer, lr, scale * unscale)
            })?;
        } else {
            self.skipped(observer);
        }
        self.done += 1;
        self.position = position;
        self.losses.push(loss);
        let took = begun.elapsed();
        self.time_to_first_step.get_or_insert_with(|| job.started.elapsed());
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let tasks = &self.engine.timeline;
        let last = tasks.tasks.last().map_or(Duration::ZERO, |(_, _, end)| *end);
        self.times.push([ms(took), ms(comm.busy), ms(comm.exposed), ms(tasks.busy()), ms(last)]);
        let report = StepReport {
            step: self.done,
            loss,
            lr,
            gradient_norm: norm,
            tokens_per_s: tokens as f64 / took.as_secs_f64(),
            step_ms: ms(took),
            comm_ms: ms(comm.busy),
            comm_exposed_ms: ms(comm.exposed),
            loss_scale,
            skipped_steps: self.loss_scale.as_ref().map_or(0, |scaling| scaling.skipped),
        };
        Ok((report, asked))
    }

    /// Says that this step's update is skipped.
    fn skipped(&self, observer: &mut dyn Observer) {
        if let (Some(scaling), 0) = (&self.loss_scale, self.job.group.rank()) {
            observer.warning(&format!(
                "step {} is skipped: its gradients are not finite ({} skipped so far); the loss is scaled by {} from now on",
                self.done + 1,
                scaling.skipped,
                scaling.scale
            ));
        }
    }

    /// The mean loss over the workers, and what any rank was asked from outside: all do it at the same step. A checkpoint
    /// that all ranks have written becomes complete here.
    fn agree(
        &mut self,
        loss: f64,
        comm: &mut CommTime,
        observer: &mut dyn Observer,
    ) -> Result<(f64, Asked)> {
        let job = self.job;
        let stop = job.requests.stopped_by().is_some();
        let save = self.requested_saves.wanted(&job.requests);
        // One rank of each worker speaks for it.
        let speaks = self.engine.is_last() && self.engine.axes().coordinate("tensor") == 0;
        let loss = if speaks { loss / job.plan.mesh.workers() as f64 } else { 0.0 };
        let written = self.saving.written();
        let mut values = [loss, flag(stop), flag(written), flag(save)];
        if job.group.size() > 1 {
            let begun = Instant::now();
            self.engine.axes().control.all_reduce(&mut values, ReduceOp::Sum)?;
            comm.busy += begun.elapsed();
            comm.exposed += begun.elapsed();
        }
        if values[2] == job.group.size() as f64 {
            let failed = self.saving.finish(job, false)?;
            self.warn(failed, observer);
        }
        if values[3] > 0.0 {
            self.requested_saves.granted(&job.requests);
        }
        let asked = match (values[1] > 0.0, values[3] > 0.0) {
            (true, _) => Asked::Stop,
            (false, true) => Asked::Save,
            (false, false) => Asked::Nothing,
        };
        Ok((values[0], asked))
    }

    /// The signal that stopped the run: that of the highest number, where ranks got several. All ranks call it.
    fn stopped_by(&self, interrupted: bool) -> Result<Option<u32>> {
        if !interrupted {
            return Ok(None);
        }
        let mut signal = [i64::from(self.job.requests.stopped_by().unwrap_or(0))];
        if self.job.group.size() > 1 {
            self.job.group.all_reduce(&mut signal, ReduceOp::Max)?;
        }
        Ok(u32::try_from(signal[0]).ok())
    }

    fn warn(&self, failed: Option<String>, observer: &mut dyn Observer) {
        if let (Some(reason), 0) = (failed, self.job.group.rank()) {
            observer.warning(&format!("no checkpoint: {reason}; training goes on, the one before stays"));
        }
    }

    /// Evaluates; whether the model is the best so far.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let (job, plan) = (self.job, &self.job.plan);
        let samples = job.config.train.eval_batches * plan.global_batch();
        // Rows without a graph take little memory; larger batches are faster.
        let rows = plan.micro_batch().max(8);
        self.score = evaluate(&mut self.engine, &*self.data.val, samples, rows)?;
        let Some(score) = self.score else { return Ok(false) };
        if job.group.rank() == 0 {
            observer.evaluated(self.done, score);
        }
        self.val_loss = Some(score.loss);
        let best = self.best.is_none_or(|(loss, _)| score.loss < loss);
        if best {
            self.best = Some((score.loss, self.done));
        }
        Ok(best)
    }

    /// Begins to write a checkpoint, while training goes on.
    fn save(&mut self, best: bool) -> Result<Option<String>> {
        let job = self.job;
        let state = State::new(
            self.done,
            job.config.clone(),
            job.plan.clone(),
            self.data.vocab,
            self.position,
            self.losses.clone(),
            self.best,
            self.val_loss,
        );
        let state = State { loss_scale: self.loss_scale.clone(), ..state };
        self.saving.begin(job, state, best, &self.engine, &self.optimizer)
    }

    /// The configured sample of text, from all ranks together.
    fn sample(&mut self, interrupted: bool) -> Result<Option<String>> {
        let job = self.job;
        let sample = &job.config.sample;
        let (Some(prompt), Some(tokenizer), ModelConfig::Gpt(config), false) =
            (&sample.prompt, &self.data.tokenizer, &job.config.model, interrupted)
        else {
            return Ok(None);
        };
        let mut text = prompt.clone();
        let mut emit = |piece: &str| {
            text.push_str(piece);
            true
        };
        let seed = job.config.train.seed;
        if job.plan.sequence {
            // New tokens come one by one, which cannot be split by time: the model is loaded without that.
            let mesh = job.plan.mesh.clone();
            let mut generator = crate::Generator::load_on(&job.out, Which::Last, &job.group, mesh)?;
            generator.stream(prompt, sample, seed, emit)?;
        } else {
            let engine = &mut self.engine;
            crate::generate::stream(engine, tokenizer, config.block, prompt, sample, seed, &mut emit)?;
        }
        Ok(Some(text))
    }

    fn summary(&self, interrupted: bool, hash: u64, rss: Vec<i64>) -> Result<Summary> {
        let job = self.job;
        let skip = if self.times.len() > 2 * WARM_UP { WARM_UP } else { 0 };
        let column =
            |i: usize| median(&mut self.times.iter().skip(skip).map(|row| row[i]).collect::<Vec<_>>());
        let step_ms = column(0);
        let tokens = job.plan.global_batch() * self.data.train.tokens_per_sample();
        let whole = job.config.model.describe(self.data.vocab, crate::layers::Placement::whole());
        let (parameters, gathered) = self.engine.parameters.bytes();
        let (gradients, reduced) = self.engine.gradients.bytes();
        let costs = job.config.model.costs(self.data.vocab);
        // Backward takes twice what forward does; work done again does not count.
        let flops = 3.0 * costs.iter().map(|cost| cost.flops).sum::<f64>() * job.plan.global_batch() as f64;
        let mut peaks = vec![0.0f64; job.group.size()];
        job.group.all_gather(&[self.peak_flops_per_s], &mut peaks)?;
        let on_cores = job.config.train.device.backend == Backend::Cpu;
        let own = Memory {
            parameters,
            gradients,
            optimizer: self.optimizer.bytes(),
            working: gathered + reduced,
            saving: self.saving.copied(),
        };
        Ok(Summary {
            steps: self.done,
            interrupted,
            stopped_by: None,
            train_loss: self.losses.iter().copied().rfind(|loss| loss.is_finite()).unwrap_or(f64::NAN),
            val_loss: self.val_loss,
            best_val_loss: self.best.map(|(loss, _)| loss),
            val_accuracy: self.score.and_then(|score| score.accuracy),
            tokens_per_s: if step_ms > 0.0 { tokens as f64 / step_ms * 1e3 } else { 0.0 },
            step_ms,
            model_flops: flops,
            mfu: on_cores.then(|| flops / (step_ms * 1e-3 * peaks.iter().sum::<f64>()).max(1.0)),
            comm_ms: column(1),
            comm_exposed_ms: column(2),
            time_to_first_step_s: self.time_to_first_step.map_or(0.0, |time| time.as_secs_f64()),
            peak_rss_bytes: rss.into_iter().map(|bytes| bytes as u64).collect(),
            memory: own.of_all(&job.group)?,
            pipeline: Pipeline::of_all(&self.engine, &self.times[skip..])?,
            communication: Communication::of_all(self.carried, &job.group)?,
            checkpoint_blocked_ms: self.saving.blocked_ms(),
            losses: self.losses.clone(),
            skipped_steps: self.loss_scale.as_ref().map_or(0, |scaling| scaling.skipped),
            loss_scale: self.loss_scale.as_ref().map(|scaling| scaling.scale),
            device: job.config.train.device,
            precision: job.config.train.precision,
            world: job.group.size(),
            plan: job.plan.clone(),
            transport: job.group.transport().to_string(),
            threads: job.threads,
            parameters: trainable(&whole),
            parameter_hash: format!("{hash:016x}"),
            sample: None,
            profile: vec![],
        })
    }
}

/// Elements of all parameters but running statistics.
fn trainable(made: &[crate::layers::Made]) -> usize {
    made.iter().filter(|made| !made.statistic).map(|made| made.spec.len()).sum()
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}
