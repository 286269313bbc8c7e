//! One training run on one rank.

use super::config::{Config, LastBatch, ModelConfig};
use super::dataset::{Datasets, HostBatch};
use super::evaluate::{Score, evaluate};
use super::optimizer::FlatOptimizer;
use super::schedule::learning_rate;
use super::summary::{Memory, Summary, median, peak_rss_bytes};
use crate::autograd::{keep_freed_memory, train_device};
use crate::checkpoint::{self, Checkpoint, Snapshot, State, Which};
use crate::data::prefetch::Prefetch;
use crate::data::sampler::{Position, Sampler};
use crate::error::{Error, Result};
use crate::layers::Context;
use crate::models::{Cnn, Gpt, Mlp, Model};
use crate::parallel::{CommTime, GradientSync, Keep, ParamStore};
use crate::random::Stream;
use regatta_comm::{Group, ReduceOp};
use regatta_plan::Plan;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Set from outside (a signal) to save and stop at the end of the step.
    pub stop: Arc<AtomicBool>,
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
    match &job.config.model {
        ModelConfig::Gpt(config) => Run::new(job, &data, Gpt::new(config, data.vocab, seed))?.train(observer),
        ModelConfig::Mlp(config) => {
            Run::new(job, &data, Mlp::new(config, 28 * 28, data.vocab, seed))?.train(observer)
        }
        ModelConfig::Cnn(config) => {
            Run::new(job, &data, Cnn::new(config, 28, data.vocab, seed))?.train(observer)
        }
    }
}

struct Run<'a, M> {
    job: &'a Job,
    data: &'a Datasets,
    model: M,
    store: ParamStore,
    sync: GradientSync,
    optimizer: FlatOptimizer,
    done: usize,
    position: Position,
    losses: Vec<f64>,
    best: Option<(f64, usize)>,
    val_loss: Option<f64>,
    score: Option<Score>,
    /// Step, communication and exposed milliseconds of the steps of this process.
    times: Vec<[f64; 3]>,
    time_to_first_step: Option<Duration>,
}

impl<'a, M: Model> Run<'a, M> {
    fn new(job: &'a Job, data: &'a Datasets, model: M) -> Result<Self> {
        let (model, mut store) = ParamStore::adopt(model, job.plan.bucket_bytes)?;
        let mut optimizer = FlatOptimizer::new(&job.config.optimizer, store.layout().clone());
        let mut progress = Progress::default();
        if job.resume {
            progress = resume(job, data, &mut store, &mut optimizer)?;
        }
        store.broadcast(&job.group, 0)?;
        let sync = GradientSync::new(job.group.clone(), store.layout().clone(), Keep::Bucket)?;
        sync.set_passes(job.plan.accumulate);
        let model = sync.attach(model);
        Ok(Self {
            job,
            data,
            model,
            store,
            sync,
            optimizer,
            done: progress.step,
            position: progress.position,
            losses: progress.losses,
            best: progress.best,
            val_loss: progress.val_loss,
            score: None,
            times: vec![],
            time_to_first_step: None,
        })
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
            observer.started(job, self.done, self.store.layout().num_params());
        }
        let mut batches = self.batches()?;
        let mut interrupted = false;
        let mut saved = self.done;
        while self.done < config.steps && !interrupted {
            let report;
            (report, interrupted) = self.step(&mut batches)?;
            if lead {
                observer.step(&report);
            }
            if let Some(metrics) = &mut metrics
                && (self.done.is_multiple_of(config.log_every) || self.done == config.steps || self.done == 1)
            {
                metrics.log(&report, observer);
            }
            if due(self.done, config.check_every) {
                self.store.check_identical(&job.group)?;
            }
            let mut best = false;
            if !interrupted && (due(self.done, config.eval_every) || self.done == config.steps) {
                best = self.evaluate(observer)?;
                if let (Some(metrics), Some(score)) = (&mut metrics, self.score) {
                    metrics.log_score(self.done, score, observer);
                }
            }
            let last = interrupted || self.done == config.steps;
            if best || last || due(self.done, config.checkpoint_every) {
                match self.save(best) {
                    Ok(()) => saved = self.done,
                    Err(error) if !last => observer.warning(&format!(
                        "no checkpoint at step {}: {error}; training goes on, the checkpoint of step {saved} stays",
                        self.done
                    )),
                    Err(error) => return Err(error),
                }
            }
        }
        drop(batches);
        let hash = self.store.check_identical(&job.group)?;
        let mut rss = vec![0i64; job.group.size()];
        job.group.all_gather(&[peak_rss_bytes() as i64], &mut rss)?;
        let sample = self.sample(interrupted)?;
        let summary = self.summary(interrupted, hash, rss, sample);
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
        let (rank, world) = (job.group.rank(), job.group.size());
        let mut sampler = Sampler::new(train.len(), world, rank, config.seed, true, last, rows)?;
        sampler.seek(self.position);
        Ok(Prefetch::new(PREFETCH, move || {
            let batch = sampler.next_batch();
            Ok(Some((train.batch(batch.epoch, &batch.indices)?, sampler.position())))
        }))
    }

    fn step(&mut self, batches: &mut Prefetch<(HostBatch, Position)>) -> Result<(StepReport, bool)> {
        let (job, plan) = (self.job, &self.job.plan);
        let begun = Instant::now();
        let (host, position) = batches.next()?;
        let tokens = host.tokens() * job.group.size();
        let noise = Stream::new(job.config.train.seed).named("dropout").at(self.done as u64);
        let mut loss_sum = 0.0;
        for (micro, part) in host.split(plan.accumulate).into_iter().enumerate() {
            let place = (job.group.rank() * plan.accumulate + micro) as u64;
            let batch = part.into_batch(&train_device());
            let output = self.model.forward(&batch, &Context::train(noise.at(place)));
            let loss = self.model.loss(output, &batch);
            loss_sum += f64::from(loss.clone().into_scalar::<f32>());
            let loss = if plan.accumulate > 1 { loss.div_scalar(plan.accumulate as f64) } else { loss };
            drop(loss.backward());
        }
        let mut comm = self.sync.finish()?;
        let norm = FlatOptimizer::gradient_norm(&self.sync);
        let clip = job.config.optimizer.clip;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let lr = learning_rate(&job.config.optimizer, self.done, job.config.train.steps);
        let (loss, stop) = self.agree(loss_sum / plan.accumulate as f64, &mut comm)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Err(Error::Numeric(format!(
                "the loss is {loss} and the gradient's norm {norm} at step {}: lower optimizer.lr or set \
                 optimizer.clip; the last checkpoint in {} is from before",
                self.done + 1,
                job.out.display()
            )));
        }
        self.optimizer.step(&mut self.store, &self.sync, lr, scale);
        self.sync.reset();
        self.done += 1;
        self.position = position;
        self.losses.push(loss);
        let took = begun.elapsed();
        self.time_to_first_step.get_or_insert_with(|| job.started.elapsed());
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        self.times.push([ms(took), ms(comm.busy), ms(comm.exposed)]);
        let report = StepReport {
            step: self.done,
            loss,
            lr,
            gradient_norm: norm,
            tokens_per_s: tokens as f64 / took.as_secs_f64(),
            step_ms: ms(took),
            comm_ms: ms(comm.busy),
            comm_exposed_ms: ms(comm.exposed),
        };
        Ok((report, stop))
    }

    /// The mean loss over the ranks, and whether any rank was told to stop: all stop at the same step.
    fn agree(&self, loss: f64, comm: &mut CommTime) -> Result<(f64, bool)> {
        let stop = self.job.stop.load(Ordering::Relaxed);
        let mut values = [loss, f64::from(u8::from(stop))];
        if self.job.group.size() > 1 {
            let begun = Instant::now();
            self.job.group.all_reduce(&mut values, ReduceOp::Mean)?;
            comm.busy += begun.elapsed();
            comm.exposed += begun.elapsed();
        }
        Ok((values[0], values[1] > 0.0))
    }

    /// Evaluates; whether the model is the best so far.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let (job, plan) = (self.job, &self.job.plan);
        let samples = job.config.train.eval_batches * plan.global_batch();
        // Rows without a graph take little memory; larger batches are faster.
        let rows = plan.micro_batch().max(8);
        self.score = evaluate(&self.model.valid(), &*self.data.val, samples, rows, &job.group)?;
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

    fn save(&self, best: bool) -> Result<()> {
        let job = self.job;
        if job.group.rank() != 0 {
            return Ok(());
        }
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
        checkpoint::save(&job.out, Snapshot { state, store: &self.store, optimizer: &self.optimizer, best })
    }

    /// The configured sample of text, on rank 0; the other ranks wait for it.
    fn sample(&self, interrupted: bool) -> Result<Option<String>> {
        let job = self.job;
        let sample = &job.config.sample;
        let mut text = None;
        if let (Some(prompt), ModelConfig::Gpt(_), false, 0) =
            (&sample.prompt, &job.config.model, interrupted, job.group.rank())
        {
            let generator = crate::generate::Generator::load(&job.out, Which::Last)?;
            text = Some(generator.text(prompt, sample, job.config.train.seed)?);
        }
        Ok(text)
    }

    fn summary(&self, interrupted: bool, hash: u64, rss: Vec<i64>, sample: Option<String>) -> Summary {
        let job = self.job;
        let skip = if self.times.len() > 2 * WARM_UP { WARM_UP } else { 0 };
        let column =
            |i: usize| median(&mut self.times.iter().skip(skip).map(|row| row[i]).collect::<Vec<_>>());
        let step_ms = column(0);
        let tokens = job.plan.global_batch() * self.data.train.tokens_per_sample();
        let layout = self.store.layout();
        let elements: usize = layout.bucket_lens.iter().sum();
        let state_bytes: usize = self.optimizer.state().map(|(_, _, values)| size_of_val(values)).sum();
        Summary {
            steps: self.done,
            interrupted,
            train_loss: self.losses.last().copied().unwrap_or(f64::NAN),
            val_loss: self.val_loss,
            best_val_loss: self.best.map(|(loss, _)| loss),
            val_accuracy: self.score.and_then(|score| score.accuracy),
            tokens_per_s: if step_ms > 0.0 { tokens as f64 / step_ms * 1e3 } else { 0.0 },
            step_ms,
            comm_ms: column(1),
            comm_exposed_ms: column(2),
            time_to_first_step_s: self.time_to_first_step.map_or(0.0, |time| time.as_secs_f64()),
            peak_rss_bytes: rss.into_iter().map(|bytes| bytes as u64).collect(),
            memory: Memory { parameters: 4 * elements, gradients: 4 * elements, optimizer: state_bytes },
            losses: self.losses.clone(),
            world: job.group.size(),
            plan: job.plan.clone(),
            transport: job.group.transport().to_string(),
            threads: job.threads,
            parameters: layout.num_params(),
            parameter_hash: format!("{hash:016x}"),
            sample,
        }
    }
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Where a resumed run goes on.
#[derive(Default)]
struct Progress {
    step: usize,
    position: Position,
    losses: Vec<f64>,
    best: Option<(f64, usize)>,
    val_loss: Option<f64>,
}

/// Rank 0 reads the checkpoint, so only it needs the folder; the others get state and numbers from it.
fn resume(
    job: &Job,
    data: &Datasets,
    store: &mut ParamStore,
    optimizer: &mut FlatOptimizer,
) -> Result<Progress> {
    let group = &job.group;
    let mut json = vec![];
    if group.rank() == 0 {
        let checkpoint = Checkpoint::find(&job.out, Which::Last)?;
        let state = &checkpoint.state;
        let refuse = |problem: String| Err(Error::checkpoint(checkpoint.path(), problem));
        if state.vocab != data.vocab {
            return refuse(format!(
                "was trained on {} tokens or classes, the data now has {}: resume on the same data",
                state.vocab, data.vocab
            ));
        }
        if state.plan.global_batch() != job.plan.global_batch() {
            return refuse(format!(
                "was trained with a batch of {} over all workers, this run has {}: its place in the data would be \
                 lost; use the same train.batch",
                state.plan.global_batch(),
                job.plan.global_batch()
            ));
        }
        checkpoint.load_parameters(store)?;
        checkpoint.load_optimizer(store, optimizer)?;
        json = serde_json::to_vec(state).map_err(|error| Error::checkpoint(&job.out, error.to_string()))?;
    }
    let mut len = [json.len() as i64];
    group.broadcast(&mut len, 0)?;
    json.resize(len[0] as usize, 0);
    group.broadcast(&mut json, 0)?;
    let state: State =
        serde_json::from_slice(&json).map_err(|error| Error::checkpoint(&job.out, error.to_string()))?;
    for bucket in optimizer.buckets_mut() {
        group.broadcast(bucket, 0)?;
    }
    optimizer.set_updates(state.updates);
    Ok(Progress {
        step: state.step,
        position: state.position,
        losses: state.losses,
        best: state.best,
        val_loss: state.val_loss,
    })
}

/// `metrics.jsonl`: a line a logged step. A disk that is full costs lines, not the run.
struct Metrics {
    file: Option<File>,
}

impl Metrics {
    /// Begins the file anew, or keeps the lines up to step `done` of a run that is resumed.
    fn open(job: &Job, done: usize, observer: &mut dyn Observer) -> Result<Self> {
        let path = job.out.join("metrics.jsonl");
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
        let kept: Vec<String> = match File::open(&path) {
            Ok(file) if done > 0 => BufReader::new(file)
                .lines()
                .map_while(std::io::Result::ok)
                .filter(|line| step(line).is_some_and(|step| step <= done as u64))
                .collect(),
            _ => vec![],
        };
        let mut text = kept.join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        let opened = checkpoint::write_atomically(&path, text.as_bytes())
            .and_then(|()| OpenOptions::new().append(true).open(&path).map_err(Error::io("open", &path)));
        match opened {
            Ok(file) => Ok(Self { file: Some(file) }),
            Err(error) => {
                observer.warning(&format!("no metrics.jsonl: {error}"));
                Ok(Self { file: None })
            }
        }
    }

    fn log(&mut self, report: &StepReport, observer: &mut dyn Observer) {
        self.line(serde_json::to_string(report), observer);
    }

    fn log_score(&mut self, step: usize, score: Score, observer: &mut dyn Observer) {
        let mut line = serde_json::json!({ "step": step, "val_loss": score.loss });
        if let Some(accuracy) = score.accuracy {
            line["val_accuracy"] = accuracy.into();
        }
        self.line(Ok(line.to_string()), observer);
    }

    fn line(&mut self, line: serde_json::Result<String>, observer: &mut dyn Observer) {
        let Some(file) = &mut self.file else { return };
        let written = line.map_err(std::io::Error::from).and_then(|line| writeln!(file, "{line}"));
        if let Err(error) = written {
            observer.warning(&format!("metrics.jsonl ends here: {error}"));
            self.file = None;
        }
    }
}
