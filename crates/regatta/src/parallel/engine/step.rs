//! A training step on one rank: the forward and backward pass of its micro-batches, in the order of the schedule.

use super::Engine;
use super::kept::{Kept, MicroBatch, MicroChunk, Output, StepResult, elements};
use crate::autograd::{self, backward, deferring, fetch, numbers, seed, waiting};
use crate::error::{Error, Result};
use crate::models::{Activation, Batch};
use crate::parallel::block_io::{
    as_leaves, detach, from_message, input_gradients, message, roots, shapes, to_f32, zero_loss,
};
use crate::parallel::rank_plan::{Pass, recomputed_blocks, uses};
use burn::tensor::Tensor;
use regatta_plan::{Direction, Recompute, Schedule, Task};
use std::ops::Range;

impl Engine {
    /// Runs the forward and backward pass of one step's micro-batches, of which `step` have been done before. When it returns,
    /// the gradients are combined over the workers.
    ///
    /// # Errors
    /// Communication fails.
    pub fn step(&mut self, step: u64, micro_batches: &[MicroBatch]) -> Result<StepResult> {
        let schedule = self.schedule.clone();
        let mut result = StepResult::default();
        self.gradients.begin(step, schedule.micro_batches, &mut *self.exchange);
        self.links.begin(&schedule, Some(step));
        self.timeline.begin();
        self.uses = uses(&schedule, self.stage, &self.chunks, self.plan.recompute).into();
        for &task in &schedule.tasks[self.stage] {
            let at = MicroChunk { chunk: task.chunk(), micro_batch: task.micro_batch() };
            let micro_batch = &micro_batches[at.micro_batch];
            match task {
                Task::Forward { .. } => {
                    let input = self.input(&schedule, at, |micro_batch| &micro_batches[micro_batch].batch)?;
                    let begun = self.timeline.now();
                    let loss = self.forward(&schedule, at, input, micro_batch)?;
                    result.loss_sum += loss.unwrap_or(0.0) * micro_batch.weight;
                    self.timeline.record(task, begun);
                }
                Task::Backward { .. } | Task::BackwardInput { .. } => {
                    let defer_weights = matches!(task, Task::BackwardInput { .. });
                    let gradient = self.output_gradient(&schedule, at, micro_batches)?;
                    let begun = self.timeline.now();
                    self.backward(&schedule, at, gradient, micro_batch, defer_weights)?;
                    self.timeline.record(task, begun);
                }
                Task::BackwardWeight { .. } => {
                    let begun = self.timeline.now();
                    self.backward_weights(at)?;
                    self.timeline.record(task, begun);
                }
            }
        }
        self.links.finish()?;
        result.comm = self.gradients.finish(&mut *self.exchange)?;
        result.comm.add(self.exchange.take_time());
        if let Some(tensor) = self.groups.tensor() {
            result.comm.add_exposed(tensor.take_time());
        }
        self.timeline.end();
        Ok(result)
    }

    /// The input of a chunk, from the stage before, which may be this rank's own.
    pub(super) fn input<'a>(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        batch: impl Fn(usize) -> &'a Batch,
    ) -> Result<Activation> {
        let Some(before) = schedule.virtual_stage(self.stage, at.chunk).checked_sub(1) else {
            return Ok(Activation::Start);
        };
        let (from, _) = schedule.place(before);
        if from == self.stage {
            let before = MicroChunk { chunk: at.chunk - 1, ..at };
            return match self.kept.get(&before).and_then(|blocks| blocks.last()).map(|kept| &kept.output) {
                Some(Some(Output::Activation(activation))) => Ok(detach(activation.clone())),
                _ => Err(Error::Usage(format!(
                    "chunk {} of micro-batch {} has no input",
                    at.chunk, at.micro_batch
                ))),
            };
        }
        let (model, chunks) = (&*self.model, &self.chunks);
        let len =
            |chunk: usize, micro_batch: usize| elements(model, chunks[chunk].start - 1, batch(micro_batch));
        let links = &mut self.links;
        let data = waiting("wait for a stage", || {
            links.take(from, Direction::Activation, (at.chunk, at.micro_batch), len)
        })?;
        let shapes = model.output_shapes(chunks[at.chunk].start - 1, batch(at.micro_batch));
        Ok(from_message(&data, &shapes, &self.compute))
    }

    /// The gradient of a chunk's output, from the stage after it; [`Activation::Start`] for the chunk of the loss.
    fn output_gradient(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        micro_batches: &[MicroBatch],
    ) -> Result<Activation> {
        let next = schedule.virtual_stage(self.stage, at.chunk) + 1;
        if next == schedule.virtual_stages() {
            return Ok(Activation::Start);
        }
        let (from, _) = schedule.place(next);
        if from == self.stage {
            return Ok(self.local_gradients.remove(&at).unwrap_or(Activation::Start));
        }
        let (model, chunks) = (&*self.model, &self.chunks);
        let len = |chunk: usize, micro_batch: usize| {
            elements(model, chunks[chunk].end - 1, &micro_batches[micro_batch].batch)
        };
        let links = &mut self.links;
        let data = waiting("wait for a stage", || {
            links.take(from, Direction::Gradient, (at.chunk, at.micro_batch), len)
        })?;
        let shapes = model.output_shapes(chunks[at.chunk].end - 1, &micro_batches[at.micro_batch].batch);
        Ok(from_message(&data, &shapes, &self.compute))
    }

    /// Runs the blocks of a chunk on one micro-batch and passes on their output. Returns the loss after the last block of the
    /// model.
    fn forward(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        input: Activation,
        micro_batch: &MicroBatch,
    ) -> Result<Option<f64>> {
        let blocks = self.chunks[at.chunk].clone();
        let retain = self.plan.recompute;
        let BlocksResult { mut kept, output, loss } =
            self.run_blocks(schedule, at, blocks, input, micro_batch, retain)?;
        if retain == Recompute::All {
            // The next chunk may be on this rank and takes its input from the kept outputs.
            let output = kept.last_mut().and_then(|kept| kept.output.take()).filter(|_| loss.is_none());
            kept.truncate(1);
            if let Some(first) = kept.first_mut() {
                first.output = output;
            }
        }
        self.kept.insert(at, kept);
        self.in_flight += 1;
        self.peak_in_flight = self.peak_in_flight.max(self.in_flight);
        if loss.is_none() {
            self.check_output_shapes(at, &output, &micro_batch.batch)?;
            let task = Task::Forward { chunk: at.chunk, micro_batch: at.micro_batch };
            self.pass_on(schedule, task, output)?;
        }
        Ok(loss)
    }

    /// Runs `blocks` of a chunk on one micro-batch, and keeps what backward needs.
    fn run_blocks(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        blocks: Range<usize>,
        input: Activation,
        micro_batch: &MicroBatch,
        retain: Recompute,
    ) -> Result<BlocksResult> {
        let MicroBatch { batch, context, .. } = micro_batch;
        let last = schedule.virtual_stage(self.stage, at.chunk) + 1 == schedule.virtual_stages();
        let end = self.chunks[at.chunk].end;
        let mut result = BlocksResult { kept: Vec::with_capacity(blocks.len()), output: input, loss: None };
        for block in blocks {
            self.acquire_block(block)?;
            let input = as_leaves(detach(result.output));
            let y = self.model.forward_block(block, input.clone(), batch, context);
            result.output = detach(y.clone());
            let output = if last && block + 1 == end {
                // Without targets there is no loss, whatever the model makes of it; backward still runs, on zeros.
                let counts = micro_batch.weight > 0.0;
                let value = if counts { self.model.loss(to_f32(y), batch) } else { zero_loss(to_f32(y)) };
                result.loss = Some(f64::from(autograd::to_vec(value.clone()).unwrap_or_default()[0]));
                Some(Output::Loss(value))
            } else if retain != Recompute::None {
                // The graph is dropped. The next chunk may be on this rank and takes its input from the kept outputs.
                (block + 1 == end).then(|| Output::Activation(result.output.clone()))
            } else {
                Some(Output::Activation(y))
            };
            result.kept.push(Kept { input, output });
            self.release_block(block, Pass::Forward)?;
        }
        Ok(result)
    }

    /// Checks that the model returns what it says, because the next stage relies on it.
    fn check_output_shapes(&self, at: MicroChunk, output: &Activation, batch: &Batch) -> Result<()> {
        let block = self.chunks[at.chunk].end - 1;
        let (found, expected) = (shapes(output), self.model.output_shapes(block, batch));
        if found == expected {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "block {block} returned tensors of the shapes {found:?}, and Model::output_shapes says {expected:?}"
        )))
    }

    /// Passes the result of a chunk on to another stage, or to another chunk on this rank.
    pub(super) fn pass_on(&mut self, schedule: &Schedule, task: Task, data: Activation) -> Result<()> {
        let Some((direction, to, chunk)) = schedule.receiver(self.stage, task) else { return Ok(()) };
        if to == self.stage {
            if direction == Direction::Gradient {
                self.local_gradients.insert(MicroChunk { chunk, micro_batch: task.micro_batch() }, data);
            }
            return Ok(());
        }
        self.links.send(to, direction, message(data)?)
    }

    /// Runs the backward pass of one micro-batch through the blocks of a chunk, from `gradient` or from the loss. With
    /// `defer_weights`, the gradients of weights are left to [`backward_weights`](Self::backward_weights).
    fn backward(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        mut gradient: Activation,
        micro_batch: &MicroBatch,
        defer_weights: bool,
    ) -> Result<()> {
        let mut deferred_by_block = vec![];
        for (block, kept) in self.kept_for_backward(schedule, at, micro_batch)?.into_iter().rev() {
            self.acquire_block(block)?;
            let (input, output) = match kept {
                Kept { input, output: Some(output) }
                    if self.plan.recompute == Recompute::None || matches!(output, Output::Loss(_)) =>
                {
                    (input, output)
                }
                Kept { input, .. } => {
                    let input = as_leaves(input);
                    let output = self.model.forward_block(
                        block,
                        input.clone(),
                        &micro_batch.batch,
                        &micro_batch.context,
                    );
                    (input, Output::Activation(output))
                }
            };
            // The gradient is that of the mean over the micro-batches.
            let weight = self.loss_scale / schedule.micro_batches as f64 * micro_batch.weight;
            let run = || match output {
                Output::Loss(loss) => {
                    let one = Tensor::ones_like(&autograd::detached(loss.clone()));
                    backward(vec![seed(loss, one.mul_scalar(weight))])
                }
                Output::Activation(output) => backward(roots(output, gradient)),
            };
            let (gradients, deferred) = if defer_weights { deferring(run) } else { (run(), vec![]) };
            let no_root =
                || Error::Usage(format!("block {block} has no output gradient to start backward from"));
            let mut gradients = gradients.ok_or_else(no_root)?;
            gradient = input_gradients(input, &mut gradients);
            let of_params = self.leaves.gradients(block, &mut gradients).collect();
            fetch(of_params, |param, values| self.gradients.add(param, values, &mut *self.exchange))?;
            drop(gradients);
            self.release_block(block, Pass::Backward)?;
            if defer_weights {
                deferred_by_block.push((block, deferred));
            } else {
                self.flush(at.chunk, block)?;
            }
        }
        self.in_flight -= 1;
        if defer_weights {
            self.deferred.insert(at, deferred_by_block);
        }
        self.pass_on(schedule, Task::Backward { chunk: at.chunk, micro_batch: at.micro_batch }, gradient)
    }

    /// What was kept of the blocks of a chunk. If only the chunk's input was kept, the blocks run forward again.
    fn kept_for_backward(
        &mut self,
        schedule: &Schedule,
        at: MicroChunk,
        micro_batch: &MicroBatch,
    ) -> Result<Vec<(usize, Kept)>> {
        let mut kept = self.kept.remove(&at).unwrap_or_default();
        let blocks = self.chunks[at.chunk].clone();
        if self.plan.recompute == Recompute::All
            && let Some(first) = kept.pop()
        {
            let recomputed = recomputed_blocks(schedule, self.stage, at.chunk, blocks.clone());
            let result =
                self.run_blocks(schedule, at, recomputed, first.input, micro_batch, Recompute::Block)?;
            kept = result.kept;
            if kept.len() < blocks.len() {
                // The last block has only its input; backward recomputes its output.
                kept.push(Kept { input: result.output, output: None });
            }
        }
        Ok(blocks.zip(kept).collect())
    }

    /// Computes the weight gradients that a backward pass deferred.
    fn backward_weights(&mut self, at: MicroChunk) -> Result<()> {
        for (block, deferred) in self.deferred.remove(&at).unwrap_or_default() {
            for gradient in deferred {
                let param = self.leaves.find(gradient.node);
                let values = gradient.compute();
                if let Some(param) = param {
                    self.gradients.add(param, &numbers(&values), &mut *self.exchange)?;
                }
            }
            self.flush(at.chunk, block)?;
        }
        Ok(())
    }

    /// Flushes the units whose gradients are complete after the backward pass of `block`: no block before it in the chunk
    /// uses them.
    fn flush(&mut self, chunk: usize, block: usize) -> Result<()> {
        let units = self.units.clone();
        for unit in units.of_block(block) {
            let before = self.chunks[chunk].start..block;
            if !units.units[unit].blocks.iter().any(|other| before.contains(other)) {
                self.gradients.flush(unit, &mut *self.exchange)?;
            }
        }
        Ok(())
    }
}

/// The result of running blocks forward.
struct BlocksResult {
    /// What each block keeps for backward.
    kept: Vec<Kept>,
    /// The output of the last of these blocks, without its graph.
    output: Activation,
    /// The loss, if the last of these blocks is the last of the model.
    loss: Option<f64>,
}
