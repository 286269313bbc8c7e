//! One training run on one rank.

use super::agreement::agree;
use super::config::{Config, LastBatch, ModelConfig};
use super::dataset::{Datasets, HostBatch};
use super::evaluate::{Score, evaluate};
use super::folder::RunFolder;
use super::losses::Losses;
use super::metrics::Metrics;
use super::optimizer::FlatOptimizer;
use super::profile::Profiler;
use super::rank::Rank;
use super::requests::{RequestedSaves, Requests};
use super::resume::{Resume, resume};
use super::saving::Saving;
use super::scaling::LossScale;
use super::schedule::learning_rate;
use super::summary::{Communication, Memory, Pipeline, Summary, hosts, median, peak_rss_bytes};
use super::trace::Trace;
use crate::autograd::{Backend, Cost, Phase, Precision, measured, recording};
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
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Steps left out of the medians while caches and allocators warm up, where a run has more.
const WARM_UP: usize = 5;
/// Steps whose times are kept at least, the newest ones: medians and memory do not depend on how long a run is.
const TIMED: usize = 20_000;
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
    /// Go on from one of its checkpoints; none: begin, in a folder without an earlier run.
    pub resume: Option<Resume>,
    /// What is asked from outside (by signals), answered at the end of the step.
    pub requests: Arc<Requests>,
    /// When the program was started.
    pub started: Instant,
    /// Threads that this rank computes with.
    pub threads: usize,
}

/// One finished step.
#[derive(Debug, Clone, Copy)]
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
    pub loss_scale: Option<f64>,
    /// Steps so far whose update was skipped, because their gradients were not finite.
    pub skipped_steps: usize,
}

/// Sees a run as it happens; on rank 0 only.
pub trait Observer {
    /// Before anything else: where the run's folder is, and when and where checkpoints are written.
    fn announced(&mut self, _message: &str) {}
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
/// A process that does nothing else should call [`keep_freed_memory`](crate::autograd::keep_freed_memory) first, as the
/// `regatta` program does: it changes the process's allocator, which makes steps faster.
///
/// # Errors
/// Data or a checkpoint that cannot be used, ranks that differ in their configuration or data, a peer that died or stalled, a loss that is not finite. The last
/// checkpoint stays.
pub fn train(job: &Job, observer: &mut dyn Observer) -> Result<Summary> {
    let mut data = Datasets::open(&job.config)?;
    // What is wrong with the checkpoint is said when it is read.
    if let Some(checkpoint) = Saving::checkpoint_before(job) {
        data = data.for_model_of(&checkpoint);
    }
    job.config.check_sample(&data)?;
    agree(&job.group, &job.config, &[], &data)?;
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
    folder: RunFolder,
    /// Of the content of the data and the tokenizer.
    digest: String,
    /// What to say before the first step.
    warnings: Vec<String>,
    done: usize,
    position: Position,
    /// Steps done before this process.
    before: usize,
    /// Which checkpoint it went on from.
    from: Option<PathBuf>,
    /// When the last checkpoint was begun, or else the run.
    saved: Instant,
    /// The last training loss that was finite.
    loss: Option<f64>,
    best: Option<(f64, usize)>,
    val_loss: Option<f64>,
    loss_scale: Option<LossScale>,
    score: Option<Score>,
    /// Of the newest steps of this process, in milliseconds: all of it, communication, that part that was waited for, tasks of the
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
        let saving = Saving::new(job)?;
        let mut folder = RunFolder::enter(job, saving.location())?;
        let warnings = std::mem::take(&mut folder.warnings);
        let offload = job.plan.offload.then(|| job.out.join("offload").join(format!("rank-{rank:05}")));
        let (units, shard) = (engine.units().clone(), engine.shard());
        let mut run = Self {
            job,
            data,
            optimizer: FlatOptimizer::new(&job.config.optimizer, units, shard, offload.as_deref())?,
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
            // A run that goes on with other numbers begins with a scale of its own.
            let same = state.config.train.precision == job.config.train.precision;
            run.loss_scale = state.loss_scale.filter(|_| same).or(run.loss_scale);
        }
        Ok(run)
    }

    fn train(mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let (job, config) = (self.job, &self.job.config.train);
        let lead = job.group.rank() == 0;
        let mut batches = self.batches()?;
        if lead {
            self.prepare(observer)?;
        }
        let (mut metrics, mut losses) = if lead { self.logs(observer) } else { (None, None) };
        if lead {
            let parameters = job.config.model.describe(self.data.vocab, crate::layers::Placement::whole());
            observer.started(job, self.done, trainable(&parameters));
        }
        self.folder.begin();
        self.saved = Instant::now();
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
            let logged =
                self.done.is_multiple_of(config.log_every) || self.done == config.steps || self.done == 1;
            if let (Some(metrics), Some(losses)) = (&mut metrics, &mut losses) {
                metrics.add(&report);
                tell(losses.add(self.done, report.loss), observer);
                if logged {
                    metrics.log(&report, self.position, observer);
                    tell(losses.flush(), observer);
                }
            }
            if due(self.done, config.check_every) {
                self.engine.check_identical()?;
            }
            let mut best = false;
            if !interrupted && (due(self.done, config.eval_every) || self.done == config.steps) {
                best = self.evaluate(observer)?;
                if let (Some(metrics), Some(score)) = (&mut metrics, self.score) {
                    metrics.log_score(self.done, self.position, self.skipped_steps(), score, observer);
                }
            }
            let last = interrupted || self.done == config.steps;
            if best || last || asked == Asked::Save || due(self.done, config.checkpoint_every) {
                if let Some(losses) = &mut losses {
                    // A run that goes on from this checkpoint has them.
                    tell(losses.flush(), observer);
                }
                let failed = self.save(best)?;
                self.warn(failed, observer);
            }
        }
        drop(batches);
        self.end(interrupted, observer)
    }

    /// Rank 0's last part before the first step: what the user is told, and what the folder holds beside checkpoints.
    fn prepare(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let job = self.job;
        observer.announced(&self.announcement());
        for warning in self.warnings.drain(..) {
            observer.warning(&warning);
        }
        if let Some(tokenizer) = &self.data.tokenizer {
            // So that the folder is all that generating text takes. A resumed run has it already.
            let path = job.out.join("tokenizer.json");
            let json = tokenizer.to_json()?;
            if fs::read_to_string(&path).ok().as_deref() != Some(&json) {
                checkpoint::write_atomically(&path, json.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Where the run's folder is, and when and where checkpoints are written.
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
            self.from.as_ref().map_or(String::new(), |from| format!("; going on from {}", from.display()));
        let place = self.saving.location().show("");
        format!(
            "run folder {}: checkpoints {} and at the end, in {}{from}",
            out.display(),
            when.join(", "),
            place.display().to_string().trim_end_matches('/')
        )
    }

    /// Rank 0's files of lines.
    fn logs(&self, observer: &mut dyn Observer) -> (Option<Metrics>, Option<Losses>) {
        let (job, config) = (self.job, &self.job.config.train);
        let (batch, samples) = (job.plan.global_batch(), self.data.train.len());
        let epoch = match config.last_batch {
            LastBatch::Drop => samples / batch.max(1),
            LastBatch::Pad => samples.div_ceil(batch.max(1)),
        };
        let tokens = batch * self.data.train.tokens_per_sample();
        let metrics = Metrics::open(job, self.done, tokens, epoch, observer);
        let (losses, problem) = Losses::open(&job.out, self.done);
        tell(problem, observer);
        (Some(metrics), Some(losses))
    }

    /// After the last step. The summary is written first with what this rank knows by itself, so that nothing that fails now
    /// costs it.
    fn end(mut self, interrupted: bool, observer: &mut dyn Observer) -> Result<Summary> {
        let (job, config) = (self.job, &self.job.config.train);
        let mut summary = self.summary(interrupted);
        // The summary of a run that had ended before tells of its steps; this process did none.
        let ended = |there: Summary| there.steps == self.done && !there.interrupted;
        let keep = self.done == self.before && Summary::read(&job.out).is_some_and(ended);
        let writes = job.group.rank() == 0 && !keep;
        // It is written again below as more is known. What the last attempt says is told when all else is done.
        let write = |summary: &Summary| if writes { summary.write(&job.out) } else { Ok(()) };
        let _ = write(&summary);
        let unsaved = self.saving.finish(job, true)?;
        summary.parameter_hash = format!("{:016x}", self.engine.check_identical()?);
        self.gather(&mut summary)?;
        summary.stopped_by = self.stopped_by(interrupted)?;
        if config.profile {
            let skip = self.warm_up();
            let profile = std::mem::take(&mut self.profiler).finish(skip, self.peak_flops_per_s);
            summary.profile = profile.of_all(&job.group)?;
        }
        let mut written = write(&summary);
        let sample = self.sample(interrupted);
        if let Some(sample) = harmless(sample, "no sample", observer)?.flatten() {
            summary.sample = Some(sample);
            written = write(&summary);
        }
        // Last, so that no rank waits for the file.
        if let Some(path) = &config.trace {
            harmless(self.trace.write(path, &job.group), "no trace", observer)?;
        }
        match unsaved {
            Some(reason) => {
                let summary = if written.is_ok() { "; the summary is there" } else { "" };
                let problem = format!("could not be written: {reason}{summary}");
                Err(Error::checkpoint(self.saving.location().show(""), problem))
            }
            None => written.map(|()| summary),
        }
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
                 optimizer.clip; {} has the last checkpoint for --resume, and --from step-N goes back to an older one",
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
        self.loss = if loss.is_finite() { Some(loss) } else { self.loss };
        let took = begun.elapsed();
        self.time_to_first_step.get_or_insert_with(|| job.started.elapsed());
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let tasks = &self.engine.timeline;
        let last = tasks.tasks.last().map_or(Duration::ZERO, |(_, _, end)| *end);
        if self.times.len() >= 2 * TIMED {
            self.times.drain(..TIMED);
        }
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
            skipped_steps: self.skipped_steps(),
        };
        Ok((report, asked))
    }

    fn skipped_steps(&self) -> usize {
        self.loss_scale.as_ref().map_or(0, |scaling| scaling.skipped)
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
    fn agree(&mut self, loss: f64, comm: &mut CommTime, observer: &mut dyn Observer) -> Result<(f64, Asked)> {
        let job = self.job;
        let stop = job.requests.stopped_by().is_some();
        let save = self.requested_saves.wanted(&job.requests);
        // One rank of each worker speaks for it.
        let speaks = self.engine.is_last() && self.engine.axes().coordinate("tensor") == 0;
        let loss = if speaks { loss / job.plan.mesh.workers() as f64 } else { 0.0 };
        let written = self.saving.written();
        // Rank 0's clock says for all when a checkpoint is due.
        let minutes = job.config.train.checkpoint_minutes;
        let due =
            job.group.rank() == 0 && minutes > 0.0 && self.saved.elapsed().as_secs_f64() >= 60.0 * minutes;
        let mut values = [loss, flag(stop), flag(written), flag(save || due)];
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
        let samples = job.config.train.eval_batches.saturating_mul(plan.global_batch());
        // As many rows as training takes at once: what was chosen to fit holds here too.
        self.score = evaluate(&mut self.engine, &*self.data.val, samples, plan.micro_batch())?;
        let Some(score) = self.score else { return Ok(false) };
        if job.group.rank() == 0 {
            observer.evaluated(self.done, score);
        }
        self.val_loss = Some(score.loss);
        if !score.loss.is_finite() && job.group.rank() == 0 {
            observer.warning(&format!(
                "the validation loss after step {} is {}: it makes no best checkpoint, and no older one is removed while \
                 it is so; --resume --from step-N goes back to one",
                self.done, score.loss
            ));
        }
        let best = score.loss.is_finite() && self.best.is_none_or(|(loss, _)| score.loss < loss);
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
            self.loss,
            self.best,
            self.val_loss,
        );
        let data = Some(self.digest.clone());
        let state = State { loss_scale: self.loss_scale.clone(), data, ..state };
        let begun = self.saving.begin(job, state, best, &self.engine, &self.optimizer);
        self.saved = Instant::now();
        begun
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

    /// Steps that medians leave out.
    fn warm_up(&self) -> usize {
        if self.times.len() > 2 * WARM_UP { WARM_UP } else { 0 }
    }

    /// What this rank knows by itself. Times are none where no step was done.
    fn summary(&self, interrupted: bool) -> Summary {
        let job = self.job;
        let column = |i: usize| {
            let mut column: Vec<f64> = self.times.iter().skip(self.warm_up()).map(|row| row[i]).collect();
            (!column.is_empty()).then(|| median(&mut column))
        };
        let step_ms = column(0);
        let tokens = job.plan.global_batch() * self.data.train.tokens_per_sample();
        let whole = job.config.model.describe(self.data.vocab, crate::layers::Placement::whole());
        let costs = job.config.model.costs(self.data.vocab);
        // Backward takes twice what forward does; work done again does not count.
        let flops = 3.0 * costs.iter().map(|cost| cost.flops).sum::<f64>() * job.plan.global_batch() as f64;
        let started = SystemTime::now().checked_sub(job.started.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH);
        Summary {
            version: env!("CARGO_PKG_VERSION").into(),
            started: humantime::format_rfc3339_millis(started).to_string(),
            hosts: vec![],
            steps: self.done,
            interrupted,
            stopped_by: self.job.requests.stopped_by().filter(|_| interrupted),
            train_loss: self.loss.unwrap_or(f64::NAN),
            val_loss: self.val_loss,
            best_val_loss: self.best.map(|(loss, _)| loss),
            val_accuracy: self.score.and_then(|score| score.accuracy),
            tokens_per_s: step_ms.filter(|ms| *ms > 0.0).map(|ms| tokens as f64 / ms * 1e3),
            step_ms,
            model_flops: flops,
            mfu: None,
            comm_ms: column(1),
            comm_exposed_ms: column(2),
            time_to_first_step_s: self.time_to_first_step.map(|time| time.as_secs_f64()),
            peak_rss_bytes: vec![peak_rss_bytes()],
            memory: vec![],
            pipeline: None,
            communication: vec![],
            checkpoint_blocked_ms: self.saving.blocked_ms(),
            skipped_steps: self.skipped_steps(),
            loss_scale: self.loss_scale.as_ref().map(|scaling| scaling.scale),
            device: job.config.train.device,
            precision: job.config.train.precision,
            world: job.group.size(),
            plan: job.plan.clone(),
            transport: job.group.transport().to_string(),
            threads: job.threads,
            parameters: trainable(&whole),
            parameter_hash: String::new(),
            sample: None,
            profile: vec![],
        }
    }

    /// Adds to the summary what only all ranks know together. All call it.
    fn gather(&self, summary: &mut Summary) -> Result<()> {
        let job = self.job;
        let mut rss = vec![0i64; job.group.size()];
        job.group.all_gather(&[peak_rss_bytes() as i64], &mut rss)?;
        summary.peak_rss_bytes = rss.into_iter().map(|bytes| bytes as u64).collect();
        let mut peaks = vec![0.0f64; job.group.size()];
        job.group.all_gather(&[self.peak_flops_per_s], &mut peaks)?;
        let on_cores = job.config.train.device.backend == Backend::Cpu;
        let peak = peaks.iter().sum::<f64>();
        summary.mfu =
            summary.step_ms.filter(|_| on_cores).map(|ms| summary.model_flops / (ms * 1e-3 * peak).max(1.0));
        let (parameters, gathered) = self.engine.parameters.bytes();
        let (gradients, reduced) = self.engine.gradients.bytes();
        let own = Memory {
            parameters,
            gradients,
            optimizer: self.optimizer.bytes(),
            working: gathered + reduced,
            saving: self.saving.copied(),
        };
        summary.memory = own.of_all(&job.group)?;
        summary.pipeline = Pipeline::of_all(&self.engine, &self.times[self.warm_up()..])?;
        summary.communication = Communication::of_all(self.carried, &job.group)?;
        summary.checkpoint_blocked_ms = self.saving.blocked_ms();
        summary.hosts = hosts(&job.group)?;
        Ok(())
    }
}

/// Elements of all parameters but running statistics.
fn trainable(made: &[crate::layers::Made]) -> usize {
    made.iter().filter(|made| !made.statistic).map(|made| made.spec.len()).sum()
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Says what is wrong, if something is.
fn tell(problem: Option<String>, observer: &mut dyn Observer) {
    if let Some(problem) = problem {
        observer.warning(&problem);
    }
}

/// What the outcome of a part is that a trained run can do without: its failure is said, unless the ranks cannot go on
/// together.
fn harmless<T>(outcome: Result<T>, what: &str, observer: &mut dyn Observer) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(Error::Comm(error)) => Err(error.into()),
        Err(error) => {
            observer.warning(&format!("{what}: {error}"));
            Ok(None)
        }
    }
}
