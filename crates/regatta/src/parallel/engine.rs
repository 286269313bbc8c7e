//! One training step on one rank, under any plan: the tasks of the pipeline's schedule, block by block.
//!
//! Every block has a graph of its own, cut off from its neighbours. So parameters can come just before a block and go
//! behind it (ZeRO 3), its gradients leave when it has gone backward (data parallelism), its input may come from another
//! rank (pipelines), and it may be computed again instead of kept (recomputation), all in one loop.

use super::axes::Axes;
use super::carried::{Carried, Purpose};
use super::gradients::{CommTime, Gradients};
use super::hand::{self, cut, from_message, message, widen};
use super::leaves::Leaves;
use super::links::Links;
use super::params::ParamStore;
use super::share::{Share, run_again, uses};
use super::timeline::Timeline;
use super::units::Units;
use super::whole::Parameters;
use crate::autograd::{self, Compute, Deferred, backward, deferring, fetch, numbers, seed, waiting};
use crate::error::{Error, Result};
use crate::layers::{Context, Made};
use crate::models::{Activation, Batch, Model};
use crate::train::FlatOptimizer;
use burn::tensor::Tensor;
use regatta_comm::{Kind, ReduceOp};
use regatta_plan::{Direction, Plan, Recompute, Schedule, Task};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// A model on one rank, ready to train.
pub struct Engine<M> {
    plan: Plan,
    axes: Axes,
    compute: Compute,
    schedule: Schedule,
    /// The blocks of each chunk of this stage.
    chunks: Vec<Range<usize>>,
    model: M,
    /// The same model, recording nothing.
    quiet: M,
    leaves: Leaves,
    units: Arc<Units>,
    /// The parameters.
    pub parameters: Parameters,
    /// Their gradients.
    pub gradients: Gradients,
    links: Links,
    /// Blocks whose parameters come next, under ZeRO 3: in the order of their use.
    uses: VecDeque<(usize, bool)>,
    kept: HashMap<(usize, usize), Vec<Kept>>,
    /// Gradients for a chunk of this stage from the next one, where both are here.
    handed_back: HashMap<(usize, usize), Activation>,
    deferred: HashMap<(usize, usize), Vec<Left>>,
    in_flight: usize,
    peak_in_flight: usize,
    /// What the loss is multiplied by before backward, and so the gradients with it.
    pub loss_scale: f64,
    /// When this rank did what in the last step.
    pub timeline: Timeline,
}

/// A block, and the gradients of its weights that its backward left for later.
type Left = (usize, Vec<Deferred>);

/// What is kept of a block from forward for backward.
struct Kept {
    input: Activation,
    /// With its graph; nothing where the block is computed again.
    output: Option<Output>,
}

#[allow(clippy::large_enum_variant)]
enum Output {
    Activation(Activation),
    Loss(Tensor<1>),
}

/// What a step gave.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepResult {
    /// Sum of the micro-batches' losses on the rank that computes them; 0 elsewhere.
    pub loss_sum: f64,
    /// Gradients' and parameters' communication.
    pub comm: CommTime,
}

impl<M: Model> Engine<M> {
    /// Sets `model` up on this rank, to compute as `compute` says. `made` are its parameters, and `blocks` those of every
    /// virtual stage.
    ///
    /// # Errors
    /// A plan that the model cannot follow, or a failure of communication.
    pub fn new(
        model: M,
        made: Vec<Made>,
        plan: &Plan,
        axes: Axes,
        blocks: &[Range<usize>],
        compute: Compute,
    ) -> Result<Self> {
        let usage = |error: regatta_plan::PlanError| Error::Usage(error.to_string());
        let share = Share::new(made, plan, blocks, axes.coordinate("pipe")).map_err(usage)?;
        let Share { schedule, chunks, units, zero, ties, flushes, .. } = share;
        let units = Arc::new(units);
        let (model, store) = ParamStore::adopt(model, &units, &compute);
        let quiet = model.valid();
        let leaves = Leaves::of(&model, &units, store.copies());
        let tie = |stages: &Vec<usize>| (stages.len() > 1).then(|| axes.stages(stages)).transpose();
        let ties = ties.iter().map(tie).collect::<Result<_>>()?;
        let gradients = Gradients::new(units.clone(), zero, axes.clone(), ties, flushes);
        let evaluation = Schedule::forward_only(schedule.stages, schedule.chunks, 1);
        let links = Links::new(&axes, &[&schedule, &evaluation])?;
        Ok(Self {
            parameters: Parameters::new(units.clone(), store, axes.data.clone(), zero),
            plan: plan.clone(),
            axes,
            compute,
            schedule,
            chunks,
            model,
            quiet,
            leaves,
            units,
            gradients,
            links,
            uses: VecDeque::new(),
            kept: HashMap::new(),
            handed_back: HashMap::new(),
            deferred: HashMap::new(),
            in_flight: 0,
            peak_in_flight: 0,
            loss_scale: 1.0,
            timeline: Timeline::default(),
        })
    }

    /// Where each parameter lies.
    pub fn units(&self) -> &Arc<Units> {
        &self.units
    }

    /// The ranks.
    pub fn axes(&self) -> &Axes {
        &self.axes
    }

    /// Where this rank computes.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// The model without recording, for what needs all of it on one rank.
    pub fn quiet(&self) -> &M {
        &self.quiet
    }

    /// Whether this rank computes the loss.
    pub fn is_last(&self) -> bool {
        self.axes.coordinate("pipe") + 1 == self.schedule.stages
    }

    /// Which part of every unit this rank owns.
    pub fn shard(&self) -> usize {
        if self.units.shards > 1 { self.axes.data.rank() } else { 0 }
    }

    /// Whether this rank holds the first of the blocks that share `unit`, or is the only stage that holds it.
    fn leads(&self, unit: usize) -> bool {
        let shared = &self.units.units[unit].shared;
        shared.first().is_none_or(|block| self.chunks.iter().any(|blocks| blocks.contains(block)))
    }

    /// Whether this rank is the one, of all that own the same part of `param`, that counts and writes it.
    fn first_of_tensor(&self, param: usize) -> bool {
        let made = &self.units.params[param];
        super::units::len(made) < made.spec.len() || self.axes.coordinate("tensor") == 0
    }

    /// Whether this rank writes its part of `param` in `unit` into checkpoints.
    pub fn writes(&self, unit: usize, param: usize) -> bool {
        let worker = self.axes.coordinate("replica") == 0;
        let data = self.units.shards > 1 || self.axes.coordinate("data") == 0;
        worker && data && self.leads(unit) && self.first_of_tensor(param)
    }

    /// Updates the parameters that this rank owns from their gradients, multiplied by `scale`; the others' updates come
    /// while the next step begins.
    ///
    /// # Errors
    /// No memory.
    pub fn update(&mut self, optimizer: &mut FlatOptimizer, lr: f64, scale: f64) -> Result<()> {
        optimizer.begin();
        for unit in 0..self.units.units.len() {
            optimizer.update(unit, self.parameters.own_mut(unit), self.gradients.own(unit), lr, scale);
            self.parameters.updated(unit);
        }
        // The first blocks of the next step.
        let first = 0..self.units.units.len().min(1 + self.plan.prefetch);
        let zero = self.plan.zero;
        first.filter(|_| zero < 3).try_for_each(|unit| self.parameters.prefetch(unit))
    }

    /// Checks that ranks that hold the same parameters agree on them, bit for bit, and returns a hash of all ranks'.
    ///
    /// # Errors
    /// Names the workers that differ from the first.
    pub fn check_identical(&mut self) -> Result<u64> {
        self.parameters.settle()?;
        let fold = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        let bits = (0..self.units.units.len())
            .flat_map(|unit| self.parameters.own(unit))
            .map(|x| u64::from(x.to_bits()));
        let mine = bits.fold(0xcbf2_9ce4_8422_2325, fold);
        let same = if self.units.shards > 1 { self.axes.replica.as_ref() } else { Some(&self.axes.workers) };
        if let Some(same) = same {
            let mut hashes = vec![0i64; same.size()];
            same.all_gather(&[mine.cast_signed()], &mut hashes)?;
            let differ = (0..hashes.len()).filter(|&worker| hashes[worker] != hashes[0]);
            let differ: Vec<String> = differ.map(|worker| same.members()[worker].to_string()).collect();
            if !differ.is_empty() {
                return Err(Error::Numeric(format!(
                    "the parameters of rank {} differ from rank {}'s (hashes {hashes:x?}): the ranks have drifted apart; \
                     resume from the last checkpoint",
                    differ.join(", "),
                    same.members()[0]
                )));
            }
        }
        let world = &self.axes.world;
        let mut all = vec![0i64; world.size()];
        world.all_gather(&[mine.cast_signed()], &mut all)?;
        let worker = |rank: &usize| self.units.shards > 1 || self.axes.mesh.worker(*rank) == 0;
        let counted = (0..world.size()).filter(worker).map(|rank| all[rank].cast_unsigned());
        Ok(counted.fold(0xcbf2_9ce4_8422_2325, fold))
    }

    /// Whether each rank of the tensor axis has logits for its own tokens only.
    pub(crate) fn splits_vocabulary(&self) -> bool {
        self.plan.layout.axis(&self.plan.mesh, "vocab").is_some()
    }

    /// What the stages do in a step.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Most micro-batches whose activations were held at once, each counted once a chunk.
    pub fn peak_in_flight(&self) -> usize {
        self.peak_in_flight
    }

    /// Forward and backward of one step's micro-batches. The gradients are averaged over the workers when it returns.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn step(&mut self, batches: &[Batch], contexts: &[Context]) -> Result<StepResult> {
        let schedule = self.schedule.clone();
        let tasks = &schedule.tasks[self.axes.coordinate("pipe")];
        self.gradients.begin(schedule.micros);
        self.links.begin(&schedule);
        self.timeline.begin();
        self.plan_uses(&schedule);
        let mut result = StepResult::default();
        for &task in tasks {
            let (chunk, micro) = (task.chunk(), task.micro());
            match task {
                Task::Forward { .. } => {
                    let input = self.input(&schedule, (chunk, micro), batches)?;
                    let begun = self.timeline.now();
                    let loss = self.forward(&schedule, (chunk, micro), input, batches, &contexts[micro])?;
                    result.loss_sum += loss.unwrap_or(0.0);
                    self.timeline.did(task, begun);
                }
                Task::Backward { .. } | Task::BackwardInput { .. } => {
                    let later = matches!(task, Task::BackwardInput { .. });
                    let gradient = self.gradient(&schedule, (chunk, micro), batches)?;
                    let begun = self.timeline.now();
                    self.backward(&schedule, (chunk, micro), gradient, batches, &contexts[micro], later)?;
                    self.timeline.did(task, begun);
                }
                Task::BackwardWeight { .. } => {
                    let begun = self.timeline.now();
                    self.weights((chunk, micro))?;
                    self.timeline.did(task, begun);
                }
            }
        }
        self.links.finish()?;
        result.comm = self.gradients.finish()?;
        let whole = self.parameters.take_time();
        result.comm.busy += whole.busy;
        result.comm.exposed += whole.exposed;
        if let Some(tensor) = &self.axes.tensor {
            let time = tensor.take_time();
            result.comm.busy += time;
            result.comm.exposed += time;
        }
        self.timeline.end();
        Ok(result)
    }

    /// The order in which blocks are used in a step.
    fn plan_uses(&mut self, schedule: &Schedule) {
        let (stage, recompute) = (self.axes.coordinate("pipe"), self.plan.recompute);
        self.uses = uses(schedule, stage, &self.chunks, recompute).into();
    }

    /// Makes the parameters of the next block whole, and begins to fetch those behind it.
    fn arrive(&mut self, block: usize) -> Result<()> {
        let units = self.units.clone();
        units.of_block(block).try_for_each(|unit| self.parameters.need(unit))?;
        self.uses.pop_front();
        self.ahead()
    }

    fn ahead(&mut self) -> Result<()> {
        for index in 0..self.plan.prefetch.min(self.uses.len()) {
            let units = self.units.clone();
            units.of_block(self.uses[index].0).try_for_each(|unit| self.parameters.prefetch(unit))?;
        }
        Ok(())
    }

    /// The parameters of a block have been used, going `forward` or not: those not needed on the way on may go.
    fn leave(&mut self, block: usize, forward: bool) -> Result<()> {
        let units = self.units.clone();
        let soon: Vec<usize> = self
            .uses
            .iter()
            .take(self.plan.prefetch)
            .filter(|(_, way)| *way == forward)
            .map(|(block, _)| *block)
            .collect();
        for unit in units.of_block(block) {
            if !soon.iter().any(|&next| units.units[unit].blocks.contains(&next)) {
                self.parameters.done(unit);
            }
        }
        self.check_axis()?;
        self.ahead()
    }

    fn check_axis(&self) -> Result<()> {
        match &self.axes.tensor {
            Some(axis) => Ok(axis.check()?),
            None => Ok(()),
        }
    }

    /// What comes into a chunk: from the stage before, which may be this one.
    fn input(&mut self, schedule: &Schedule, at: (usize, usize), batches: &[Batch]) -> Result<Activation> {
        let (stage, (chunk, micro)) = (self.axes.coordinate("pipe"), at);
        let Some(before) = schedule.virtual_stage(stage, chunk).checked_sub(1) else {
            return Ok(Activation::Start);
        };
        let (from, _) = schedule.place(before);
        let block = self.chunks[chunk].start - 1;
        if from == stage {
            let lost = || Error::Usage(format!("chunk {chunk} of micro-batch {micro} has no input"));
            let kept =
                self.kept.get(&(chunk - 1, micro)).and_then(|blocks| blocks.last()).ok_or_else(lost)?;
            return match &kept.output {
                Some(Output::Activation(activation)) => Ok(cut(activation.clone())),
                _ => Err(lost()),
            };
        }
        let (model, chunks) = (&self.model, &self.chunks);
        let len = |chunk: usize, micro: usize| elements(model, chunks[chunk].start - 1, &batches[micro]);
        let data = waiting("wait for a stage", || self.links.take(from, Direction::Activation, at, len))?;
        Ok(from_message(&data, &self.model.handed_on(block, &batches[micro]), &self.compute))
    }

    /// The gradient of what went out of a chunk: from the stage behind; nothing behind the loss.
    fn gradient(&mut self, schedule: &Schedule, at: (usize, usize), batches: &[Batch]) -> Result<Activation> {
        let (stage, (chunk, micro)) = (self.axes.coordinate("pipe"), at);
        let behind = schedule.virtual_stage(stage, chunk) + 1;
        if behind == schedule.virtual_stages() {
            return Ok(Activation::Start);
        }
        let (from, _) = schedule.place(behind);
        if from == stage {
            return Ok(self.handed_back.remove(&at).unwrap_or(Activation::Start));
        }
        let (model, chunks) = (&self.model, &self.chunks);
        let len = |chunk: usize, micro: usize| elements(model, chunks[chunk].end - 1, &batches[micro]);
        let data = waiting("wait for a stage", || self.links.take(from, Direction::Gradient, at, len))?;
        let shapes = self.model.handed_on(self.chunks[chunk].end - 1, &batches[micro]);
        Ok(from_message(&data, &shapes, &self.compute))
    }

    /// Runs the blocks of a chunk on one micro-batch and hands on what comes out; returns the loss behind the last.
    fn forward(
        &mut self,
        schedule: &Schedule,
        at: (usize, usize),
        input: Activation,
        batches: &[Batch],
        context: &Context,
    ) -> Result<Option<f64>> {
        let (chunk, micro) = at;
        let blocks = self.chunks[chunk].clone();
        let retain = self.plan.recompute;
        let (mut kept, x, loss) = self.run(schedule, at, blocks, input, batches, context, retain)?;
        let last = loss.is_some();
        if retain == Recompute::All {
            // The next chunk may be on this rank and looks for its input among what is kept.
            let output = kept.last_mut().and_then(|kept| kept.output.take()).filter(|_| !last);
            kept.truncate(1);
            if let Some(first) = kept.first_mut() {
                first.output = output;
            }
        }
        self.kept.insert(at, kept);
        self.in_flight += 1;
        self.peak_in_flight = self.peak_in_flight.max(self.in_flight);
        if !last {
            self.hand_on(schedule, Task::Forward { chunk, micro }, x)?;
        }
        Ok(loss)
    }

    /// Runs `blocks` of a chunk on one micro-batch, and returns what is kept of each, what came out, and the loss behind
    /// the last block of all.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &mut self,
        schedule: &Schedule,
        at: (usize, usize),
        blocks: Range<usize>,
        input: Activation,
        batches: &[Batch],
        context: &Context,
        retain: Recompute,
    ) -> Result<(Vec<Kept>, Activation, Option<f64>)> {
        let (chunk, micro) = at;
        let batch = &batches[micro];
        let last =
            schedule.virtual_stage(self.axes.coordinate("pipe"), chunk) + 1 == schedule.virtual_stages();
        let end = self.chunks[chunk].end;
        let mut x = input;
        let mut kept = Vec::with_capacity(blocks.len());
        let mut loss = None;
        for block in blocks {
            self.arrive(block)?;
            let input = hand::begin(cut(x));
            let y = self.model.forward_block(block, input.clone(), batch, context);
            x = cut(y.clone());
            let output = if last && block + 1 == end {
                let value = self.model.loss(widen(y), batch);
                loss = Some(f64::from(autograd::to_vec(value.clone()).unwrap_or_default()[0]));
                Some(Output::Loss(value))
            } else if retain != Recompute::None {
                // Its graph ends here. The next chunk may be on this rank and looks for its input among what is kept.
                (block + 1 == end).then(|| Output::Activation(x.clone()))
            } else {
                Some(Output::Activation(y))
            };
            kept.push(Kept { input, output });
            self.leave(block, true)?;
        }
        Ok((kept, x, loss))
    }

    fn hand_on(&mut self, schedule: &Schedule, task: Task, data: Activation) -> Result<()> {
        let stage = self.axes.coordinate("pipe");
        let Some((direction, to, chunk)) = schedule.receiver(stage, task) else { return Ok(()) };
        if to == stage {
            if direction == Direction::Gradient {
                self.handed_back.insert((chunk, task.micro()), data);
            }
            return Ok(());
        }
        self.links.send(to, direction, message(data)?)
    }

    /// Takes one micro-batch backward through the blocks of a chunk, from `gradient` or from the loss. With `later`, the
    /// gradients of weights wait for [`weights`](Self::weights).
    fn backward(
        &mut self,
        schedule: &Schedule,
        at: (usize, usize),
        gradient: Activation,
        batches: &[Batch],
        context: &Context,
        later: bool,
    ) -> Result<()> {
        let (chunk, micro) = at;
        let mut kept = self.kept.remove(&at).unwrap_or_default();
        let blocks = self.chunks[chunk].clone();
        if self.plan.recompute == Recompute::All
            && let Some(first) = kept.pop()
        {
            let again = run_again(schedule, self.axes.coordinate("pipe"), chunk, blocks.clone());
            let (inputs, out, _) =
                self.run(schedule, at, again, first.input, batches, context, Recompute::Block)?;
            kept = inputs;
            if kept.len() < blocks.len() {
                // The last block has only its input yet.
                kept.push(Kept { input: out, output: None });
            }
        }
        let mut gradient = gradient;
        let mut left = vec![];
        for (block, kept) in blocks.clone().zip(kept).rev() {
            self.arrive(block)?;
            let (input, output) = match kept {
                Kept { input, output: Some(output) }
                    if self.plan.recompute == Recompute::None || matches!(output, Output::Loss(_)) =>
                {
                    (input, output)
                }
                Kept { input, .. } => {
                    let input = hand::begin(input);
                    let output = self.model.forward_block(block, input.clone(), &batches[micro], context);
                    (input, Output::Activation(output))
                }
            };
            // The mean over the micro-batches.
            let share = self.loss_scale / schedule.micros as f64;
            let run = || match output {
                Output::Loss(loss) => {
                    let whole = Tensor::ones_like(&autograd::detached(loss.clone()));
                    backward(vec![seed(loss, whole.mul_scalar(share))])
                }
                Output::Activation(output) => backward(hand::roots(output, gradient)),
            };
            let (found, deferred) = if later { deferring(run) } else { (run(), vec![]) };
            let mut found =
                found.ok_or_else(|| Error::Usage(format!("block {block} has no gradient to begin from")))?;
            gradient = hand::gradients(input, &mut found);
            let of_params = self.leaves.gradients(block, &mut found).collect();
            fetch(of_params, |param, values| self.gradients.add(param, values))?;
            drop(found);
            self.leave(block, false)?;
            if later {
                left.push((block, deferred));
            } else {
                self.flush(chunk, block)?;
            }
        }
        self.in_flight -= 1;
        if later {
            self.deferred.insert(at, left);
        }
        self.hand_on(schedule, Task::Backward { chunk, micro }, gradient)
    }

    /// The gradients of weights that a backward left for later.
    fn weights(&mut self, at: (usize, usize)) -> Result<()> {
        for (block, deferred) in self.deferred.remove(&at).unwrap_or_default() {
            for one in deferred {
                let param = self.leaves.find(one.node);
                let values = one.compute();
                if let Some(param) = param {
                    self.gradients.add(param, &numbers(&values))?;
                }
            }
            self.flush(at.0, block)?;
        }
        Ok(())
    }

    /// A block of a chunk has its gradients: units that no block before it uses are complete for this micro-batch.
    fn flush(&mut self, chunk: usize, block: usize) -> Result<()> {
        let units = self.units.clone();
        for unit in units.of_block(block) {
            let before = self.chunks[chunk].start..block;
            if !units.units[unit].blocks.iter().any(|other| before.contains(other)) {
                self.gradients.flush(unit)?;
            }
        }
        Ok(())
    }

    /// Runs `batch` through all stages without recording; what comes out is on the ranks of the last stage, with the loss.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn evaluate(&mut self, batch: &Batch, context: &Context) -> Result<Option<Activation>> {
        let schedule = Schedule::forward_only(self.schedule.stages, self.schedule.chunks, 1);
        let stage = self.axes.coordinate("pipe");
        let tasks = schedule.tasks[stage].clone();
        self.links.begin(&schedule);
        self.plan_uses(&schedule);
        let mut result = None;
        let batches = std::slice::from_ref(batch);
        for task in tasks {
            let at = (task.chunk(), task.micro());
            let mut x = self.input(&schedule, at, batches)?;
            for block in self.chunks[at.0].clone() {
                self.arrive(block)?;
                x = self.quiet.forward_block(block, x, batch, context);
                self.leave(block, true)?;
            }
            let here = schedule.virtual_stage(stage, at.0) + 1;
            if here == schedule.virtual_stages() {
                result = Some(widen(x));
            } else {
                let to = schedule.place(here).0;
                if to == stage {
                    // The next chunk is here: it looks for its input among what is kept.
                    let output = Some(Output::Activation(x.clone()));
                    self.kept.insert(at, vec![Kept { input: Activation::Start, output }]);
                }
                self.hand_on(&schedule, task, x)?;
            }
        }
        self.kept.clear();
        self.links.finish()?;
        self.parameters.take_time();
        Ok(result)
    }

    /// The global norm of the averaged gradients: the root of the sum of their squares, each counted once.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        let units = self.units.clone();
        let mut squares = 0.0;
        for unit in 0..units.units.len() {
            let range = units.shard(unit, self.shard());
            let counted = self.leads(unit);
            for segment in units.segments(unit, range).filter(|_| counted) {
                let learnt = !units.params[segment.param].statistic;
                if learnt && self.first_of_tensor(segment.param) {
                    squares +=
                        regatta_kernel::optimizer::sum_of_squares(&self.gradients.own(unit)[segment.within]);
                }
            }
        }
        let mut sum = [squares];
        if self.axes.model.size() > 1 {
            self.axes.model.all_reduce(&mut sum, ReduceOp::Sum)?;
        }
        Ok(sum[0].sqrt())
    }

    /// What this rank's groups have carried so far, by purpose. Under ZeRO 1 and 2 it first waits for the parameters that
    /// other ranks have updated, so that a step's updates count with the step.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn carried(&mut self) -> Result<Carried> {
        self.parameters.complete()?;
        let mut carried = Carried::default();
        let sharded = |kind| if kind == Kind::AllGather { Purpose::Parameters } else { Purpose::Gradients };
        let axes = &self.axes;
        carried.group(&axes.data.traffic(), sharded);
        // One group with `data` where there are no replicas.
        if let Some(replica) = &axes.replica {
            carried.group(&axes.workers.traffic(), |_| Purpose::Gradients);
            carried.group(&replica.traffic(), |_| Purpose::Gradients);
        }
        for group in self.gradients.ties().chain(&axes.partial) {
            carried.group(&group.traffic(), |_| Purpose::Gradients);
        }
        if let Some(tensor) = &axes.tensor {
            carried.group(&tensor.group().traffic(), |_| Purpose::Tensor);
        }
        for group in self.links.groups() {
            carried.group(&group.traffic(), |_| Purpose::Pipeline);
        }
        for group in [&axes.model, &axes.control] {
            carried.group(&group.traffic(), |_| Purpose::Control);
        }
        Ok(carried)
    }
}

/// Elements of what `block` hands on.
fn elements<M: Model>(model: &M, block: usize, batch: &Batch) -> usize {
    model.handed_on(block, batch).iter().map(|shape| shape.iter().product::<usize>()).sum()
}
