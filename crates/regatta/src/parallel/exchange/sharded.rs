//! Every rank along the `data` axis owns a shard. Gradients are reduce-scattered to the owners (Rajbhandari et al. 2020,
//! "ZeRO", sections 5.1 and 5.2), and parameters are gathered from them.

use super::gather::Gather;
use super::pool::Pool;
use super::{CommTime, GradientExchange, mean_over};
use crate::autograd::waiting;
use crate::error::Result;
use crate::params::{ParamStore, Units};
use regatta_comm::{Buffer, Group, Pending, ReduceOp};
use regatta_plan::{ExchangePlan, Sharded};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Most reduce-scatters that are in flight at once, because each needs a temporary buffer.
const MAX_IN_FLIGHT: usize = 2;

/// A reduce-scatter in flight: the whole unit, and this rank's shard.
type ReduceScatter = Pending<(Buffer<f32>, Buffer<f32>)>;

/// See the [module](self).
pub struct ShardedExchange {
    units: Arc<Units>,
    plan: Sharded,
    data: Group,
    /// The ranks that own the same shard; none if this rank is the only one.
    replica: Option<Group>,
    /// By unit: all gradients, of which this rank's shard is averaged. Used if all gradients are kept from step to step.
    full: Vec<Option<Buffer<f32>>>,
    /// By unit: the averaged gradients of this rank's shard. Used if only the shard is kept.
    shard: Vec<Vec<f32>>,
    in_flight: VecDeque<(usize, ReduceScatter)>,
    gather: Gather,
    pool: Pool,
    time: CommTime,
}

impl ShardedExchange {
    /// An exchange for `units`, sharded over the ranks of `data`; `replica` has the ranks that own the same shard.
    pub fn new(units: Arc<Units>, plan: Sharded, data: Group, replica: Option<Group>) -> Self {
        let count = units.units.len();
        let shard = |unit: usize| vec![0.0; units.shard(unit, data.rank()).len()];
        let shard = if plan.sends_each_micro_batch() { (0..count).map(shard).collect() } else { vec![] };
        Self {
            full: (0..count).map(|_| None).collect(),
            shard,
            in_flight: VecDeque::new(),
            gather: Gather::new(units.clone(), data.clone(), plan.gathers_on_use()),
            pool: Pool::new(data.clone()),
            time: CommTime::default(),
            units,
            plan,
            data,
            replica,
        }
    }

    /// Waits for the oldest reduce-scatter.
    fn wait_oldest(&mut self) -> Result<()> {
        let Some((unit, pending)) = self.in_flight.pop_front() else { return Ok(()) };
        let begun = Instant::now();
        let ((mut buffer, shard), timing) = waiting("wait for gradients", || pending.wait_timed())?;
        if self.plan.sends_each_micro_batch() {
            self.shard[unit].iter_mut().zip(&*shard).for_each(|(sum, g)| *sum += g);
            self.pool.put_back(buffer);
        } else {
            buffer[self.units.shard(unit, self.data.rank())].copy_from_slice(&shard);
            self.full[unit] = Some(buffer);
        }
        self.pool.put_back(shard);
        self.time.exposed += begun.elapsed();
        self.time.busy += timing.finished - timing.started;
        Ok(())
    }
}

impl GradientExchange for ShardedExchange {
    fn begin(&mut self, _step: u64) {
        self.shard.iter_mut().for_each(|shard| shard.fill(0.0));
    }

    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>> {
        let len = self.units.units[unit].len;
        if self.plan.sends_each_micro_batch() {
            let mut buffer = self.pool.take(len)?;
            buffer.fill(0.0);
            return Ok(buffer);
        }
        match self.full[unit].take() {
            Some(buffer) => Ok(buffer),
            None => Ok(self.data.buffer(len)?),
        }
    }

    fn takes_each_micro_batch(&self) -> bool {
        self.plan.sends_each_micro_batch()
    }

    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        let output = self.pool.take(self.units.units[unit].len / self.units.shards)?;
        let pending = self.data.reduce_scatter_async(gradients, output, ReduceOp::Mean);
        self.in_flight.push_back((unit, pending));
        while self.in_flight.len() > MAX_IN_FLIGHT {
            self.wait_oldest()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.wait_oldest()?;
        }
        let Some(replica) = self.replica.clone() else { return Ok(()) };
        let begun = Instant::now();
        let units = self.units.units.len();
        mean_over(self, units, &replica)?;
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    fn combined(&mut self, unit: usize) -> Option<&mut [f32]> {
        if self.plan.sends_each_micro_batch() {
            return Some(&mut self.shard[unit]);
        }
        let own = self.units.shard(unit, self.data.rank());
        self.full[unit].as_mut().map(|full| &mut full[own])
    }

    fn updated(&mut self, unit: usize) {
        self.gather.updated(unit);
    }

    fn prefetch(&mut self, unit: usize, store: &ParamStore) -> Result<()> {
        self.gather.prefetch(unit, store)
    }

    fn acquire(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        self.gather.acquire(unit, store)
    }

    fn release(&mut self, unit: usize, store: &mut ParamStore) {
        self.gather.release(unit, store);
    }

    fn gathers_on_use(&self) -> bool {
        self.plan.gathers_on_use()
    }

    fn wait_all(&mut self, store: &mut ParamStore) -> Result<()> {
        self.gather.wait_all(store)
    }

    fn take_time(&mut self) -> CommTime {
        let mut time = std::mem::take(&mut self.time);
        time.add(self.gather.take_time());
        time
    }

    fn bytes(&self) -> (usize, usize) {
        let kept = self.full.iter().flatten().map(|buffer| size_of_val(&**buffer)).sum::<usize>()
            + self.shard.iter().map(|shard| size_of_val(&shard[..])).sum::<usize>();
        (kept, self.pool.peak_bytes() + self.gather.peak_bytes())
    }
}
