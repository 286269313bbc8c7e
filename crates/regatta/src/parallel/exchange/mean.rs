//! Every worker keeps all gradients. An all-reduce averages them over the workers, while the backward pass continues (Li et
//! al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.2).

use super::{CommTime, GradientExchange};
use crate::autograd::waiting;
use crate::error::Result;
use regatta_comm::{Buffer, Group, Pending, ReduceOp};
use std::time::Instant;

/// See the [module](self).
pub struct MeanExchange {
    workers: Group,
    lens: Vec<usize>,
    /// By unit: its gradients.
    units: Vec<Slot>,
    /// Units whose gradients are being averaged, in the order in which that started.
    in_flight: std::collections::VecDeque<usize>,
    time: CommTime,
}

/// The gradients of a unit.
enum Slot {
    /// The buffer does not exist yet, or the producer has it.
    Empty,
    /// The gradients are averaged.
    Ready(Buffer<f32>),
    /// The gradients are being averaged.
    InFlight(Pending<Buffer<f32>>),
}

impl MeanExchange {
    /// An exchange over `workers` for units of `lens` elements.
    pub fn new(workers: Group, lens: Vec<usize>) -> Self {
        let units = lens.iter().map(|_| Slot::Empty).collect();
        Self { workers, lens, units, in_flight: Default::default(), time: CommTime::default() }
    }

    /// The averaged gradients of `unit`, if they are ready.
    pub fn all(&self, unit: usize) -> Option<&[f32]> {
        match &self.units[unit] {
            Slot::Ready(buffer) => Some(buffer),
            _ => None,
        }
    }

    /// Waits until the gradients of `unit` are averaged.
    fn wait_for(&mut self, unit: usize) -> Result<()> {
        let Slot::InFlight(pending) = std::mem::replace(&mut self.units[unit], Slot::Empty) else {
            return Ok(());
        };
        let begun = Instant::now();
        let (buffer, timing) = waiting("wait for gradients", || pending.wait_timed())?;
        self.time.exposed += begun.elapsed();
        self.time.busy += timing.finished - timing.started;
        self.units[unit] = Slot::Ready(buffer);
        Ok(())
    }
}

impl GradientExchange for MeanExchange {
    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>> {
        match std::mem::replace(&mut self.units[unit], Slot::Empty) {
            Slot::Ready(buffer) => Ok(buffer),
            // The group's memory is zeroed, and the transport can reduce it in place.
            _ => Ok(self.workers.buffer(self.lens[unit])?),
        }
    }

    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        self.units[unit] = if self.workers.size() == 1 {
            Slot::Ready(gradients)
        } else {
            self.in_flight.push_back(unit);
            Slot::InFlight(self.workers.all_reduce_async(gradients, ReduceOp::Mean))
        };
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while let Some(unit) = self.in_flight.pop_front() {
            self.wait_for(unit)?;
        }
        Ok(())
    }

    fn combined(&mut self, unit: usize) -> Option<&mut [f32]> {
        match &mut self.units[unit] {
            Slot::Ready(buffer) => Some(buffer),
            _ => None,
        }
    }

    fn take_time(&mut self) -> CommTime {
        std::mem::take(&mut self.time)
    }

    fn bytes(&self) -> (usize, usize) {
        let ready = |slot: &Slot| match slot {
            Slot::Ready(buffer) => size_of_val(&**buffer),
            _ => 0,
        };
        (self.units.iter().map(ready).sum(), 0)
    }
}
