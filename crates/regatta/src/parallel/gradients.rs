//! Gradients of one rank: added up over micro-batches, averaged over the workers while backward goes on, and under ZeRO
//! left on the rank that owns them (Rajbhandari et al. 2020, "ZeRO", sections 5.1 and 5.2).

use super::axes::Axes;
use super::pool::Pool;
use super::units::{Unit, Units};
use crate::autograd::{Cost, Phase, measured, waiting};
use crate::error::{Error, Result};
use regatta_comm::{Buffer, Group, Pending, ReduceOp};
use regatta_kernel::bias::accumulate;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reductions into working buffers that may be on their way at once.
const IN_FLIGHT: usize = 2;

/// What communication took in one step.
#[derive(Debug, Clone, Copy, Default)]
pub struct CommTime {
    /// Time that it ran.
    pub busy: Duration,
    /// Time the step stood waiting for it: what computation did not hide.
    pub exposed: Duration,
}

/// The gradients of one rank's parameters.
pub struct Gradients {
    units: Arc<Units>,
    zero: u8,
    axes: Axes,
    /// By unit: the ranks that hold it at other stages.
    ties: Vec<Option<Group>>,
    /// By unit, all of it: kept from step to step below ZeRO 2, and above only while a micro-batch goes backward.
    whole: Vec<Option<Buffer<f32>>>,
    /// By unit, this rank's shard: from ZeRO 2 on.
    shard: Vec<Vec<f32>>,
    /// By parameter: whether its place holds something of this step (or micro-batch, from ZeRO 2 on).
    written: Vec<bool>,
    /// By unit: how often it is yet to be [`flush`](Self::flush)ed in this step.
    missing: Vec<usize>,
    /// What a micro-batch's statistics are multiplied by, which the loss does not reach.
    share: f32,
    expected: Vec<usize>,
    flying: VecDeque<(usize, Flight)>,
    pool: Pool,
    time: CommTime,
}

enum Flight {
    Reduced(Pending<Buffer<f32>>),
    Scattered(Pending<(Buffer<f32>, Buffer<f32>)>),
}

impl Gradients {
    /// For the parameters of `units`; `ties` are the ranks that hold a unit at other stages, and `expected` how often a
    /// unit is flushed in a step.
    pub fn new(
        units: Arc<Units>,
        zero: u8,
        axes: Axes,
        ties: Vec<Option<Group>>,
        expected: Vec<usize>,
    ) -> Self {
        let group = if zero == 0 { axes.workers.clone() } else { axes.data.clone() };
        let shard = |unit: &Unit| if zero < 2 { vec![] } else { vec![0.0; unit.len / units.shards] };
        Self {
            whole: units.units.iter().map(|_| None).collect(),
            shard: units.units.iter().map(shard).collect(),
            written: vec![false; units.params.len()],
            missing: expected.clone(),
            share: 1.0,
            expected,
            flying: VecDeque::new(),
            pool: Pool::new(group),
            time: CommTime::default(),
            units,
            zero,
            axes,
            ties,
        }
    }

    /// Begins a step of `micros` micro-batches.
    pub fn begin(&mut self, micros: usize) {
        self.share = 1.0 / micros.max(1) as f32;
        self.written.fill(false);
        self.missing.copy_from_slice(&self.expected);
        self.shard.iter_mut().for_each(|shard| shard.fill(0.0));
        self.time = CommTime::default();
    }

    /// Adds the gradient of a parameter.
    ///
    /// # Errors
    /// Another number of elements than the parameter has; no memory.
    pub fn add(&mut self, param: usize, values: &[f32]) -> Result<()> {
        let (unit, range) = self.units.place(param);
        if values.len() != range.len() {
            let path = &self.units.params[param].spec.path;
            return Err(Error::Numeric(format!(
                "the gradient of {path} has {} elements of {}",
                values.len(),
                range.len()
            )));
        }
        if self.whole[unit].is_none() {
            self.whole[unit] = Some(self.fresh(unit)?);
        }
        let Some(whole) = &mut self.whole[unit] else { return Ok(()) };
        let target = &mut whole[range];
        let scaled: Vec<f32>;
        let values = match self.units.params[param].statistic {
            true => {
                scaled = values.iter().map(|value| value * self.share).collect();
                &scaled
            }
            false => values,
        };
        let again = std::mem::replace(&mut self.written[param], true);
        let cost = Cost { flops: 0.0, bytes: (8 * values.len()) as f64 };
        measured("gradients into buckets", Phase::Backward, cost, || {
            if again {
                accumulate(target, values);
            } else {
                target.copy_from_slice(values);
            }
        });
        Ok(())
    }

    /// A micro-batch has gone backward through all blocks of a chunk that use `unit`.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn flush(&mut self, unit: usize) -> Result<()> {
        self.missing[unit] = self.missing[unit].saturating_sub(1);
        if self.zero >= 2 || self.missing[unit] == 0 {
            self.launch(unit)?;
        }
        Ok(())
    }

    /// A buffer of zeros for a unit: kept from the first step on below ZeRO 2, and borrowed above.
    fn fresh(&mut self, unit: usize) -> Result<Buffer<f32>> {
        let len = self.units.units[unit].len;
        if self.zero < 2 {
            let group = if self.zero == 0 { &self.axes.workers } else { &self.axes.data };
            return Ok(group.buffer(len)?);
        }
        let mut buffer = self.pool.take(len)?;
        buffer.fill(0.0);
        Ok(buffer)
    }

    /// Sends a unit's gradients to where they are averaged.
    fn launch(&mut self, unit: usize) -> Result<()> {
        let len = self.units.units[unit].len;
        let mut buffer = match self.whole[unit].take() {
            Some(buffer) => buffer,
            None => self.fresh(unit)?,
        };
        for &(param, _) in &self.units.units[unit].params {
            if !std::mem::replace(&mut self.written[param], self.zero < 2) {
                buffer[self.units.place(param).1].fill(0.0);
            }
        }
        let partial = self.units.units[unit].partial;
        if let (Some(tensor), true) = (&self.axes.partial, partial > 0) {
            let begun = Instant::now();
            tensor.all_reduce(&mut buffer[..partial], ReduceOp::Sum)?;
            self.time.busy += begun.elapsed();
            self.time.exposed += begun.elapsed();
        }
        let group = if self.zero == 0 { &self.axes.workers } else { &self.axes.data };
        if group.size() == 1 {
            self.arrived(unit, buffer, None);
            return Ok(());
        }
        let flight = if self.zero == 0 {
            Flight::Reduced(group.all_reduce_async(buffer, ReduceOp::Mean))
        } else {
            let output = self.pool.take(len / self.units.shards)?;
            Flight::Scattered(group.reduce_scatter_async(buffer, output, ReduceOp::Mean))
        };
        self.flying.push_back((unit, flight));
        while self.zero >= 1 && self.flying.len() > IN_FLIGHT {
            self.land()?;
        }
        Ok(())
    }

    /// Waits for the oldest reduction.
    fn land(&mut self) -> Result<()> {
        let Some((unit, flight)) = self.flying.pop_front() else { return Ok(()) };
        let begun = Instant::now();
        let timing = match flight {
            Flight::Reduced(pending) => {
                let (buffer, timing) = waiting("wait for gradients", || pending.wait_timed())?;
                self.arrived(unit, buffer, None);
                timing
            }
            Flight::Scattered(pending) => {
                let ((buffer, shard), timing) = waiting("wait for gradients", || pending.wait_timed())?;
                self.arrived(unit, buffer, Some(shard));
                timing
            }
        };
        self.time.exposed += begun.elapsed();
        self.time.busy += timing.finished - timing.started;
        Ok(())
    }

    /// Takes in what came back: all of a unit, or this rank's shard of it.
    fn arrived(&mut self, unit: usize, mut buffer: Buffer<f32>, shard: Option<Buffer<f32>>) {
        let own = self.own_range(unit);
        if self.zero >= 2 {
            let values = shard.as_deref().unwrap_or(&buffer[own]);
            self.shard[unit].iter_mut().zip(values).for_each(|(sum, g)| *sum += g);
            self.pool.give(buffer);
        } else {
            if let Some(shard) = &shard {
                buffer[own].copy_from_slice(shard);
            }
            self.whole[unit] = Some(buffer);
        }
        shard.into_iter().for_each(|shard| self.pool.give(shard));
    }

    /// Waits until all gradients are averaged over all workers, and summed over the stages that share them.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn finish(&mut self) -> Result<CommTime> {
        while !self.flying.is_empty() {
            self.land()?;
        }
        let begun = Instant::now();
        for unit in 0..self.units.units.len() {
            let replica = self.axes.replica.clone().filter(|_| self.zero > 0);
            let tie = self.ties[unit].clone();
            let own = self.own(unit);
            if let Some(replica) = replica {
                replica.all_reduce(own, ReduceOp::Mean)?;
            }
            if let Some(tie) = tie {
                tie.all_reduce(own, ReduceOp::Sum)?;
            }
        }
        self.time.busy += begun.elapsed();
        self.time.exposed += begun.elapsed();
        Ok(std::mem::take(&mut self.time))
    }

    fn own_range(&self, unit: usize) -> std::ops::Range<usize> {
        self.units.shard(unit, if self.units.shards > 1 { self.axes.data.rank() } else { 0 })
    }

    /// The averaged gradients of the part of `unit` that this rank updates, after [`finish`](Self::finish).
    pub fn own(&mut self, unit: usize) -> &mut [f32] {
        if self.zero >= 2 {
            return &mut self.shard[unit];
        }
        let own = self.own_range(unit);
        match &mut self.whole[unit] {
            Some(whole) => &mut whole[own],
            None => &mut [],
        }
    }

    /// The groups of stages that share a unit, for counting.
    pub(crate) fn ties(&self) -> impl Iterator<Item = &Group> {
        self.ties.iter().flatten()
    }

    /// Bytes that are kept from step to step, and most bytes that were in use beside them for a while.
    pub fn bytes(&self) -> (usize, usize) {
        let kept = self.whole.iter().flatten().map(|buffer| size_of_val(&**buffer)).sum::<usize>()
            + self.shard.iter().map(|shard| size_of_val(&shard[..])).sum::<usize>();
        (kept, self.pool.peak_bytes())
    }
}
