//! Gathers the parameters whose shards the ranks own. They are gathered ahead of use, and released after it if a rank keeps
//! only its shard (Rajbhandari et al. 2020, "ZeRO", sections 5.3 and 7; Zhao et al. 2023, "PyTorch FSDP", section 3.2).

use super::CommTime;
use super::pool::Pool;
use crate::autograd::waiting;
use crate::error::Result;
use crate::params::{ParamStore, Units};
use regatta_comm::{Buffer, Group, Pending};
use std::sync::Arc;
use std::time::Instant;

/// Gathers the parameters of units over the ranks of a group.
pub(super) struct Gather {
    units: Arc<Units>,
    data: Group,
    /// Whether units are gathered before each use.
    on_use: bool,
    /// By unit.
    state: Vec<State>,
    pool: Pool,
    time: CommTime,
    /// Bytes of all units that are gathered now, and the peak of that number.
    gathered: usize,
    peak: usize,
}

/// The state of a unit's parameters.
enum State {
    /// All shards are in the store and up to date.
    Ready,
    /// The shards of other ranks are missing or out of date.
    Missing,
    /// The shards are being gathered: this rank's shard, and all shards.
    InFlight(Pending<(Buffer<f32>, Buffer<f32>)>),
}

impl Gather {
    pub(super) fn new(units: Arc<Units>, data: Group, on_use: bool) -> Self {
        let state = |_| if on_use { State::Missing } else { State::Ready };
        Self {
            state: (0..units.units.len()).map(state).collect(),
            pool: Pool::new(data.clone()),
            time: CommTime::default(),
            gathered: 0,
            peak: 0,
            units,
            data,
            on_use,
        }
    }

    /// Called after the ranks have updated their shards of `unit`: the shards of other ranks are out of date here.
    pub(super) fn updated(&mut self, unit: usize) {
        if !self.on_use {
            self.state[unit] = State::Missing;
        }
    }

    /// Starts to gather `unit`, if it is missing.
    pub(super) fn prefetch(&mut self, unit: usize, store: &ParamStore) -> Result<()> {
        if !matches!(self.state[unit], State::Missing) {
            return Ok(());
        }
        let mut own = self.pool.take(store.own(unit).len())?;
        own.copy_from_slice(store.own(unit));
        let all = self.pool.take(self.units.units[unit].len)?;
        self.state[unit] = State::InFlight(self.data.all_gather_async(own, all));
        Ok(())
    }

    /// Waits until all shards of `unit` are in the store.
    pub(super) fn acquire(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        self.prefetch(unit, store)?;
        let State::InFlight(pending) = std::mem::replace(&mut self.state[unit], State::Ready) else {
            return Ok(());
        };
        let begun = Instant::now();
        let ((own, all), timing) = waiting("wait for parameters", || pending.wait_timed())?;
        store.unit_mut(unit).copy_from_slice(&all);
        self.time.exposed += begun.elapsed();
        self.time.busy += timing.finished - timing.started;
        self.pool.put_back(own);
        self.pool.put_back(all);
        if self.on_use {
            self.gathered += size_of_val(store.unit(unit));
            self.peak = self.peak.max(self.gathered);
        }
        Ok(())
    }

    /// Releases the memory of `unit`, if units are gathered before each use.
    pub(super) fn release(&mut self, unit: usize, store: &mut ParamStore) {
        if self.on_use && matches!(self.state[unit], State::Ready) {
            self.gathered -= size_of_val(store.unit(unit));
            store.release(unit);
            self.state[unit] = State::Missing;
        }
    }

    /// Waits for all operations that are in flight. If parameters are kept, also gathers those that are out of date.
    pub(super) fn wait_all(&mut self, store: &mut ParamStore) -> Result<()> {
        for unit in 0..self.state.len() {
            if !self.on_use || matches!(self.state[unit], State::InFlight(_)) {
                self.acquire(unit, store)?;
                self.release(unit, store);
            }
        }
        Ok(())
    }

    pub(super) fn take_time(&mut self) -> CommTime {
        std::mem::take(&mut self.time)
    }

    /// The peak bytes of gathered parameters and of the buffers to gather them.
    pub(super) fn peak_bytes(&self) -> usize {
        self.peak + self.pool.peak_bytes()
    }
}
