//! The gradients of one rank's parameters. They are summed over micro-batches in a buffer for each unit, and an exchange
//! combines them over the workers.

use super::exchange::{CommTime, GradientExchange};
use super::groups::{Groups, Role};
use crate::autograd::{Cost, Phase, measured};
use crate::error::{Error, Result};
use crate::params::Units;
use regatta_comm::{Buffer, Group, ReduceOp};
use regatta_kernel::bias::accumulate;
use regatta_plan::Axis;
use std::sync::Arc;
use std::time::Instant;

/// See the [module](self).
pub(crate) struct Gradients {
    units: Arc<Units>,
    /// The ranks over which partial gradients are summed; none if this rank is the only one.
    partial: Option<Group>,
    /// By unit: the group of the stages that share it.
    ties: Vec<Option<Group>>,
    /// By unit: the buffer that is being filled.
    filling: Vec<Option<Buffer<f32>>>,
    /// By parameter: whether its part of the buffer has been written in this step, or in this micro-batch if the exchange
    /// takes each.
    written: Vec<bool>,
    /// By unit: how often it will still be [`flush`](Self::flush)ed in this step.
    remaining: Vec<usize>,
    /// By unit: how often it is flushed in a step.
    expected: Vec<usize>,
    /// The weight of a micro-batch's statistics. Gradients get theirs from the loss.
    statistic_weight: f32,
    time: CommTime,
}

impl Gradients {
    /// Buffers for the parameters of `units`. For each unit, `ties` has the stages that share it, and `expected` how often it
    /// is flushed in a step.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn new(
        units: Arc<Units>,
        groups: &Groups,
        ties: &[Vec<usize>],
        expected: Vec<usize>,
    ) -> Result<Self> {
        let tie = |stages: &Vec<usize>| (stages.len() > 1).then(|| groups.stages(stages)).transpose();
        Ok(Self {
            partial: groups.over_several(Axis::Tensor.into(), Role::Partial)?,
            ties: ties.iter().map(tie).collect::<Result<_>>()?,
            filling: units.units.iter().map(|_| None).collect(),
            written: vec![false; units.params.len()],
            remaining: expected.clone(),
            statistic_weight: 1.0,
            time: CommTime::default(),
            expected,
            units,
        })
    }

    /// Begins a step of `micro_batches` micro-batches, of which `step` have been done before.
    pub(crate) fn begin(&mut self, step: u64, micro_batches: usize, exchange: &mut dyn GradientExchange) {
        self.statistic_weight = 1.0 / micro_batches.max(1) as f32;
        self.written.fill(false);
        self.remaining.copy_from_slice(&self.expected);
        self.time = CommTime::default();
        exchange.begin(step);
    }

    /// Adds the gradient of a parameter to its unit's buffer.
    ///
    /// # Errors
    /// The gradient does not have as many elements as the parameter, or memory runs out.
    pub(crate) fn add(
        &mut self,
        param: usize,
        values: &[f32],
        exchange: &mut dyn GradientExchange,
    ) -> Result<()> {
        let (unit, range) = self.units.place(param);
        if values.len() != range.len() {
            let path = &self.units.params[param].spec.path;
            return Err(Error::Numeric(format!(
                "the gradient of {path} has {} elements, the parameter {}",
                values.len(),
                range.len()
            )));
        }
        let buffer = match &mut self.filling[unit] {
            Some(buffer) => buffer,
            empty => empty.insert(exchange.buffer(unit)?),
        };
        let target = &mut buffer[range];
        let scaled: Vec<f32>;
        let values = if self.units.params[param].statistic {
            scaled = values.iter().map(|value| value * self.statistic_weight).collect();
            &scaled
        } else {
            values
        };
        let accumulates = std::mem::replace(&mut self.written[param], true);
        let cost = Cost { flops: 0.0, bytes: (8 * values.len()) as f64 };
        measured("gradients into buckets", Phase::Backward, cost, || {
            if accumulates {
                accumulate(target, values);
            } else {
                target.copy_from_slice(values);
            }
        });
        Ok(())
    }

    /// Called when a micro-batch has gone backward through all blocks of a chunk that use `unit`. Pushes the unit's gradients
    /// to the exchange when they are complete.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn flush(&mut self, unit: usize, exchange: &mut dyn GradientExchange) -> Result<()> {
        self.remaining[unit] = self.remaining[unit].saturating_sub(1);
        if exchange.takes_each_micro_batch() || self.remaining[unit] == 0 {
            self.push(unit, exchange)?;
        }
        Ok(())
    }

    /// Pushes a unit's gradients to the exchange. Parameters without a gradient get zeros.
    fn push(&mut self, unit: usize, exchange: &mut dyn GradientExchange) -> Result<()> {
        let mut buffer = match self.filling[unit].take() {
            Some(buffer) => buffer,
            None => exchange.buffer(unit)?,
        };
        let stays_written = !exchange.takes_each_micro_batch();
        for &(param, _) in &self.units.units[unit].params {
            if !std::mem::replace(&mut self.written[param], stays_written) {
                buffer[self.units.place(param).1].fill(0.0);
            }
        }
        let partial = self.units.units[unit].partial;
        if let (Some(tensor), true) = (&self.partial, partial > 0) {
            let begun = Instant::now();
            tensor.all_reduce(&mut buffer[..partial], ReduceOp::Sum)?;
            self.time.add_exposed(begun.elapsed());
        }
        exchange.push(unit, buffer)
    }

    /// Waits until all gradients are combined over the workers, then sums them over the stages that share a unit.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn finish(&mut self, exchange: &mut dyn GradientExchange) -> Result<CommTime> {
        exchange.finish()?;
        let begun = Instant::now();
        for (unit, tie) in self.ties.iter().enumerate() {
            if let (Some(tie), Some(own)) = (tie, exchange.combined(unit)) {
                tie.all_reduce(own, ReduceOp::Sum)?;
            }
        }
        self.time.add_exposed(begun.elapsed());
        Ok(std::mem::take(&mut self.time))
    }

    /// The groups of stages that share a unit, to count their traffic.
    pub(crate) fn ties(&self) -> impl Iterator<Item = &Group> {
        self.ties.iter().flatten()
    }
}
