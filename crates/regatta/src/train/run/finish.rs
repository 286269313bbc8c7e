//! The end of a run: writes its summary, and again whenever more is known.

use super::Run;
use super::outcome::StepTimes;
use crate::autograd::Backend;
use crate::checkpoint::Which;
use crate::error::{Error, Result};
use crate::train::callback::Callback;
use crate::train::link::LinkUse;
use crate::train::statistics::median;
use crate::train::summary::{Communication, Memory, Pipeline, Summary, hosts, peak_rss_bytes};
use regatta_comm::ReduceOp;
use std::time::{Duration, SystemTime};

/// First steps that are left out of medians, because caches and allocators warm up, if a run has more than twice as
/// many.
const WARM_UP: usize = 5;

impl Run<'_> {
    /// Called after the last step. First writes the summary with the values that this rank knows alone, so that a
    /// later failure does not lose them.
    pub(super) fn end(mut self, interrupted: bool, callback: &mut dyn Callback) -> Result<Summary> {
        let (job, config) = (self.job, &self.job.config.train);
        let mut summary = self.summary(interrupted)?;
        // If the run had ended before, this process did no step, and the existing summary has the values of its steps.
        let ended = |existing: Summary| existing.steps == self.done && !existing.interrupted;
        let keep = self.done == self.before && Summary::read(&job.out).is_some_and(ended);
        let writes = job.leads() && !keep;
        // It is written again below when more is known. The error of the last attempt is returned at the end.
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
        let sample = if job.is_free() && !job.leads() { Ok(None) } else { self.sample(interrupted) };
        if let Some(sample) = optional(sample, "no sample", callback)?.flatten() {
            summary.sample = Some(sample);
            written = write(&summary);
        }
        self.engine.leave(interrupted && job.leads())?;
        // Last, so that no rank waits for rank 0 to write the file.
        if let Some(path) = &config.trace {
            optional(self.trace.write(path, &job.group), "no trace", callback)?;
        }
        match unsaved {
            Some(reason) => {
                let summary = if written.is_ok() { "; the summary was written" } else { "" };
                let problem = format!("could not be written: {reason}{summary}");
                Err(Error::checkpoint(self.saving.location().show(""), problem))
            }
            None => written.map(|()| summary),
        }
    }

    /// The number of the signal that stopped the run, if one did; the highest if ranks got several. All ranks call it.
    fn stopped_by(&self, interrupted: bool) -> Result<Option<u32>> {
        if !interrupted {
            return Ok(None);
        }
        let mut signal = [i64::from(self.job.requests.stopped_by().unwrap_or(0))];
        if self.job.group.size() > 1 {
            self.job.group.all_reduce(&mut signal, ReduceOp::Max)?;
        }
        // Without a signal, a callback stopped it.
        Ok(u32::try_from(signal[0]).ok().filter(|&signal| signal > 0))
    }

    /// Generates the configured sample of text. All ranks call it.
    fn sample(&mut self, interrupted: bool) -> Result<Option<String>> {
        let job = self.job;
        let sample = &job.config.sample;
        let (Some(prompt), Some(tokenizer), Some(longest), false) =
            (&sample.prompt, &self.data.tokenizer, job.config.model.context(), interrupted)
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
            // Single tokens cannot be split by time, so the model is loaded again without sequence parallelism.
            let mesh = job.plan.mesh.clone();
            let mut generator = crate::Generator::load_on(&job.out, Which::Last, &job.group, mesh)?;
            generator.stream(prompt, sample, seed, emit)?;
        } else {
            let engine = &mut self.engine;
            crate::generate::stream(engine, tokenizer, longest, prompt, sample, seed, &mut emit)?;
        }
        Ok(Some(text))
    }

    /// Number of first steps that medians leave out.
    fn warm_up(&self) -> usize {
        if self.times.len() > 2 * WARM_UP { WARM_UP } else { 0 }
    }

    /// The values that this rank knows alone. Times are none if no step was done.
    fn summary(&self, interrupted: bool) -> Result<Summary> {
        let job = self.job;
        let median_of = |time: fn(&StepTimes) -> f64| {
            let mut times: Vec<f64> = self.times.iter().skip(self.warm_up()).map(time).collect();
            (!times.is_empty()).then(|| median(&mut times))
        };
        let step_ms = median_of(|times| times.step);
        let tokens = job.plan.global_batch() * self.data.train.tokens_per_sample();
        let costs = job.config.model.costs(self.data.vocab);
        // Backward takes twice the operations of forward; recomputation does not count.
        let flops = 3.0 * costs.iter().map(|cost| cost.flops).sum::<f64>() * job.plan.global_batch() as f64;
        let started = SystemTime::now().checked_sub(job.started.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(Summary {
            version: env!("CARGO_PKG_VERSION").into(),
            started: humantime::format_rfc3339_millis(started).to_string(),
            hosts: vec![],
            steps: self.done,
            interrupted,
            stopped_by: self.job.requests.stopped_by().filter(|_| interrupted),
            train_loss: self.loss.unwrap_or(f64::NAN),
            val_loss: self.val_loss,
            best_val_loss: self.best.map(|(loss, _)| loss),
            val_accuracy: self.score.as_ref().and_then(|score| score.accuracy),
            val_metrics: self.score.iter().flat_map(|score| score.metrics.iter().cloned()).collect(),
            tokens_per_s: self.rate(step_ms).map(|steps| tokens as f64 * steps),
            step_ms,
            model_flops: flops,
            mfu: None,
            comm_ms: median_of(|times| times.comm),
            comm_exposed_ms: median_of(|times| times.comm_exposed),
            time_to_first_step_s: self.time_to_first_step.map(|time| time.as_secs_f64()),
            peak_rss_bytes: vec![peak_rss_bytes()],
            memory: vec![],
            pipeline: None,
            communication: vec![],
            link: None,
            checkpoint_blocked_ms: self.saving.blocked_ms(),
            skipped_steps: self.skipped_steps(),
            loss_scale: self.loss_scale.as_ref().map(|scaling| scaling.scale),
            device: job.config.train.device,
            precision: job.config.train.precision,
            world: job.plan.ranks(),
            plan: job.plan.clone(),
            transport: job.world().transport().to_string(),
            threads: job.threads,
            parameters: self.trainable()?,
            parameter_hash: String::new(),
            sample: None,
            profile: vec![],
        })
    }

    /// Steps a second: of the median of this rank's steps, or where workers train each at its own speed, of all.
    fn rate(&self, step_ms: Option<f64>) -> Option<f64> {
        let step_s = match self.job.is_free() {
            true => self.begun.elapsed().as_secs_f64() / (self.done - self.before) as f64,
            false => step_ms? / 1e3,
        };
        (step_s > 0.0 && step_s.is_finite()).then(|| 1.0 / step_s)
    }

    /// What goes between workers, and what would be faster: on rank 0, if there are several workers.
    fn link_use(&self, summary: &Summary) -> Result<Option<LinkUse>> {
        let job = self.job;
        if !job.leads() || job.plan.mesh.workers() == 1 {
            return Ok(None);
        }
        let waited = summary.comm_exposed_ms.unwrap_or(0.0);
        let compute = summary.step_ms.map(|ms| Duration::from_secs_f64((ms - waited).max(0.0) / 1e3));
        Ok(Some(LinkUse::of(&job.config, &job.plan, self.data.vocab, compute)?))
    }

    /// Number of elements of all parameters, without running statistics.
    pub(super) fn trainable(&self) -> Result<usize> {
        self.job.config.model.num_params(self.data.vocab)
    }

    /// Adds the values of all ranks to the summary. All ranks call it.
    fn gather(&self, summary: &mut Summary) -> Result<()> {
        let job = self.job;
        let mut rss = vec![0i64; job.group.size()];
        job.group.all_gather(&[peak_rss_bytes() as i64], &mut rss)?;
        summary.peak_rss_bytes = rss.into_iter().map(|bytes| bytes as u64).collect();
        let mut peaks = vec![0.0f64; job.group.size()];
        job.group.all_gather(&[self.peak_flops_per_s], &mut peaks)?;
        // Where workers train each at its own speed, this one's steps say nothing of the others' cores.
        let on_cores = job.config.train.device.backend == Backend::Cpu && !job.is_free();
        let peak = peaks.iter().sum::<f64>();
        summary.mfu =
            summary.step_ms.filter(|_| on_cores).map(|ms| summary.model_flops / (ms * 1e-3 * peak).max(1.0));
        let (parameters, gradients, working) = self.engine.bytes();
        let own = Memory {
            parameters,
            gradients,
            optimizer: self.optimizer.bytes(),
            working,
            saving: self.saving.copied(),
        };
        summary.memory = own.of_all(&job.group)?;
        let tasks = self.times.iter().skip(self.warm_up()).map(|times| (times.tasks, times.last_task));
        let tasks: Vec<(f64, f64)> = tasks.collect();
        summary.pipeline = Pipeline::of_all(&self.engine, &tasks)?;
        summary.communication = Communication::of_all(self.carried, &job.group)?;
        summary.link = self.link_use(summary)?;
        summary.checkpoint_blocked_ms = self.saving.blocked_ms();
        summary.hosts = hosts(&job.group)?;
        Ok(())
    }
}

/// The outcome of an optional part of the end. A failure becomes a warning, unless communication failed.
fn optional<T>(outcome: Result<T>, what: &str, callback: &mut dyn Callback) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(Error::Comm(error)) => Err(error.into()),
        Err(error) => {
            callback.warning(&format!("{what}: {error}"));
            Ok(None)
        }
    }
}
