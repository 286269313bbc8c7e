//! One step of a run: computes gradients, updates parameters, and combines loss and requests over all ranks.

use super::Run;
use super::outcome::{Agreed, Requested, StepTimes};
use crate::autograd::{Cost, Phase, Precision, measured, recording};
use crate::data::prefetch::Prefetch;
use crate::data::sampler::Position;
use crate::datasets::HostBatch;
use crate::error::{Error, Result};
use crate::layers::{Context, SampleRows};
use crate::optim::learning_rate;
use crate::parallel::{CommTime, MicroBatch};
use crate::random::Stream;
use crate::train::callback::{Callback, Flow, StepReport};
use regatta_comm::ReduceOp;
use regatta_plan::Axis;
use std::time::{Duration, Instant};

/// Number of newest steps whose times are kept at least, so that memory does not grow with the length of a run.
const TIMED: usize = 20_000;

/// 1 if `set`, else 0.
fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

impl Run<'_> {
    /// Does one step. Records its operations if a profile or a trace was requested.
    pub(super) fn step(
        &mut self,
        batches: &mut Prefetch<(HostBatch, Position)>,
        callback: &mut dyn Callback,
    ) -> Result<(StepReport, Requested)> {
        let config = &self.job.config.train;
        if !config.profile && config.trace.is_none() {
            return self.one_step(batches, callback);
        }
        let begun = Instant::now();
        let (result, operations) = recording(|| self.one_step(batches, callback));
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
        callback: &mut dyn Callback,
    ) -> Result<(StepReport, Requested)> {
        let (job, plan) = (self.job, &self.job.plan);
        let begun = Instant::now();
        let wait = Cost::default();
        let (host, position) = measured("wait for data", Phase::Update, wait, || batches.next())?;
        let together = plan.local().is_none_or(|local| local.agrees(self.done as u64 + 1));
        let workers = match (job.is_free(), together) {
            (true, _) => 1,
            (false, true) => plan.mesh.workers(),
            (false, false) => plan.mesh.axis(Axis::Data),
        };
        let tokens = host.tokens() * plan.mesh.workers();
        let targets = host.targets();
        let counted = host.counted();
        let micro_batches = self.micro_batches(host);
        let loss_scale = self.loss_scale.as_ref().map(|scaling| scaling.scale);
        let unscale = 1.0 / loss_scale.unwrap_or(1.0);
        self.engine.loss_scale = loss_scale.unwrap_or(1.0);
        let result = self.engine.step(self.done as u64, &micro_batches)?;
        let mut comm = result.comm;
        let owned = self.engine.units().owned();
        let cost = |flops: f64, bytes: f64| Cost { flops: flops * owned as f64, bytes: bytes * owned as f64 };
        let norm = measured("gradient norm", Phase::Update, cost(2.0, 4.0), || self.engine.gradient_norm())?;
        let lr = learning_rate(&job.config.optimizer, self.done, job.config.train.steps);
        let lr = callback.learning_rate(self.done, lr);
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(Error::Usage(format!(
                "a callback returned the learning rate {lr} for step {}: it must be a number from 0 up",
                self.done
            )));
        }
        let loss = result.loss_sum / plan.accumulate as f64;
        let Agreed { loss, counted, requested } = measured("agree on the loss", Phase::Update, wait, || {
            self.agree(loss, counted, (together, workers), &mut comm, callback)
        })?;
        // Gradients and loss are means over all targets. This factor makes them means over those that count.
        let all = (targets * workers) as f64;
        let reweight = if counted > 0.0 { all / counted } else { 0.0 };
        let (loss, norm) = (loss * reweight, norm * unscale * reweight);
        let clip = job.config.optimizer.clip;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        // All ranks have the same loss and norm, so they decide alike.
        let finite = loss.is_finite() && norm.is_finite();
        // In f32 another scale cannot make the loss finite.
        let lost = !loss.is_finite() && job.config.train.precision == Precision::F32;
        let continues = match &mut self.loss_scale {
            Some(scaling) if !lost => scaling.stepped(finite),
            _ => finite,
        };
        if !continues {
            let culprit = self.engine.not_finite();
            let culprit =
                culprit.map_or(String::new(), |rank| format!("rank {rank}'s gradients are not finite; "));
            return Err(Error::Numeric(format!(
                "{culprit}the loss is {loss} and the gradient's norm {norm} at step {}: lower optimizer.lr or set \
                 optimizer.clip; {} has the last checkpoint for --resume, and --from step-N returns to an older one",
                self.done + 1,
                job.out.display()
            )));
        }
        if finite {
            // Bytes per element: gradients are read; parameters and moments are read and written.
            let bytes = 12.0 + 8.0 * self.optimizer.moments() as f64;
            let cost = cost(4.0 + 5.0 * self.optimizer.moments() as f64, bytes);
            measured("optimizer", Phase::Update, cost, || {
                self.engine.update(&mut self.optimizer, lr, scale * unscale * reweight)
            })?;
        } else {
            self.engine.skip_update()?;
            self.warn_skipped(callback);
        }
        let requested = self.advance(requested);
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
        self.times.push(StepTimes {
            step: ms(took),
            comm: ms(comm.busy),
            comm_exposed: ms(comm.exposed),
            tasks: ms(tasks.busy()),
            last_task: ms(last),
        });
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
        Ok((report, requested))
    }

    /// Counts the step. Where workers train each at its own speed, so many steps are done as have been pushed by all of them.
    fn advance(&mut self, requested: Requested) -> Requested {
        let Some((pushed, ends)) = self.engine.progress() else {
            self.done += 1;
            return requested;
        };
        let steps = self.before + pushed as usize / self.job.plan.mesh.workers();
        self.done = steps.min(self.job.config.train.steps).max(self.done);
        if ends { Requested::Stop } else { requested }
    }

    /// Applies a callback's decision.
    pub(super) fn apply(&mut self, flow: Flow) {
        self.stop |= flow == Flow::Stop;
    }

    /// Number of steps so far whose update was skipped.
    pub(super) fn skipped_steps(&self) -> usize {
        self.loss_scale.as_ref().map_or(0, |scaling| scaling.skipped)
    }

    /// On rank 0, warns that this step's update is skipped.
    fn warn_skipped(&self, callback: &mut dyn Callback) {
        if let (Some(scaling), true) = (&self.loss_scale, self.job.leads()) {
            callback.warning(&format!(
                "step {} is skipped: its gradients are not finite ({} skipped so far); the loss is scaled by {} from now on",
                self.done + 1,
                scaling.skipped,
                scaling.scale
            ));
        }
    }

    /// Splits a worker's samples into micro-batches on the device.
    fn micro_batches(&self, host: HostBatch) -> Vec<MicroBatch> {
        let (job, plan) = (self.job, &self.job.plan);
        let (worker, workers) = (self.worker(), plan.mesh.workers());
        let noise = Stream::new(job.config.train.seed).named("dropout").at(self.done as u64);
        // Worker w of W has every W-th sample of the global batch from the w-th on.
        let dealt = SampleRows { first: worker, stride: workers };
        let compute = self.engine.compute();
        let (device, dtype) = (compute.train_device(), compute.dtype());
        let one = |(part, rows): (HostBatch, SampleRows)| MicroBatch {
            weight: part.counted() as f64 / part.targets() as f64,
            batch: part.into_batch(&device).cast(dtype),
            context: Context::train(noise, dealt.of(rows)),
        };
        host.split(plan.accumulate).into_iter().map(one).collect()
    }

    /// Combines the loss, the number of targets that count, and the requests of all ranks. If all ranks have written
    /// their part of a checkpoint, completes it. Where islands are not together, combines the loss of this island's workers.
    fn agree(
        &mut self,
        loss: f64,
        counted: usize,
        (together, workers): (bool, usize),
        comm: &mut CommTime,
        callback: &mut dyn Callback,
    ) -> Result<Agreed> {
        let job = self.job;
        let stop = self.stop || job.requests.stopped_by().is_some();
        let save = self.requested_saves.wanted(&job.requests);
        // One rank of each worker adds the worker's values.
        let reports = self.engine.is_last() && self.engine.groups().coordinate(Axis::Tensor) == 0;
        let (loss, counted) = if reports { (loss / workers as f64, counted as f64) } else { (0.0, 0.0) };
        let written = self.saving.written();
        // Rank 0's clock decides when a checkpoint is due.
        let minutes = job.config.train.checkpoint_minutes;
        let due = job.leads() && minutes > 0.0 && self.saved.elapsed().as_secs_f64() >= 60.0 * minutes;
        let mut values = [loss, flag(stop), flag(written), flag(save || due), counted];
        if job.group.size() > 1 {
            let begun = Instant::now();
            let groups = self.engine.groups();
            let group = if together { groups.agreement()? } else { groups.island()? };
            group.all_reduce(&mut values, ReduceOp::Sum)?;
            comm.busy += begun.elapsed();
            comm.exposed += begun.elapsed();
        }
        if !together {
            // Requests wait until all islands hear of them.
            return Ok(Agreed { loss: values[0], counted: values[4], requested: Requested::Nothing });
        }
        if values[2] == job.group.size() as f64 {
            let failed = self.saving.finish(job, false)?;
            self.warn_unsaved(failed, callback);
        }
        if values[3] > 0.0 {
            self.requested_saves.granted(&job.requests);
        }
        let requested = match (values[1] > 0.0, values[3] > 0.0) {
            (true, _) => Requested::Stop,
            (false, true) => Requested::Save,
            (false, false) => Requested::Nothing,
        };
        Ok(Agreed { loss: values[0], counted: values[4], requested })
    }
}
