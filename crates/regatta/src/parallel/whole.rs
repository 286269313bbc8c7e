//! Whole parameters where only a shard is owned: gathered ahead of their use, and under ZeRO 3 dropped behind it
//! (Rajbhandari et al. 2020, "ZeRO", sections 5.3 and 7; Zhao et al. 2023, "PyTorch FSDP", section 3.2).

use super::gradients::CommTime;
use super::params::ParamStore;
use super::pool::Pool;
use super::units::Units;
use crate::autograd::waiting;
use crate::error::Result;
use regatta_comm::{Buffer, Group, Pending};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// The parameters of one rank, whole or sharded.
pub struct Parameters {
    units: Arc<Units>,
    store: ParamStore,
    data: Group,
    zero: u8,
    /// By unit, under ZeRO 3: this rank's shard.
    shard: Vec<Vec<f32>>,
    state: Vec<State>,
    /// By unit: whether it has changed since layers were last shown it.
    changed: Vec<bool>,
    pool: Pool,
    time: CommTime,
    whole_bytes: usize,
    peak_bytes: usize,
}

enum State {
    /// Whole and up to date.
    Here,
    /// Not whole, or out of date.
    Away,
    Coming(Pending<(Buffer<f32>, Buffer<f32>)>),
}

impl Parameters {
    /// Takes `store`, where everything is whole, and drops what is not to stay so.
    pub fn new(units: Arc<Units>, store: ParamStore, data: Group, zero: u8) -> Self {
        let count = units.units.len();
        let mut parameters = Self {
            shard: vec![vec![]; count],
            state: (0..count).map(|_| State::Here).collect(),
            changed: vec![true; count],
            pool: Pool::new(data.clone()),
            time: CommTime::default(),
            whole_bytes: 0,
            peak_bytes: 0,
            units,
            store,
            data,
            zero,
        };
        for unit in 0..count {
            if zero == 3 {
                parameters.shard[unit] = parameters.store.unit(unit)[parameters.own_range(unit)].to_vec();
                parameters.drop_whole(unit);
            }
        }
        parameters
    }

    fn own_range(&self, unit: usize) -> Range<usize> {
        self.units.shard(unit, if self.units.shards > 1 { self.data.rank() } else { 0 })
    }

    /// The part of `unit` that this rank updates.
    pub fn own(&self, unit: usize) -> &[f32] {
        if self.zero == 3 { &self.shard[unit] } else { &self.store.unit(unit)[self.own_range(unit)] }
    }

    /// The part of `unit` that this rank updates, to write.
    pub fn own_mut(&mut self, unit: usize) -> &mut [f32] {
        let own = self.own_range(unit);
        if self.zero == 3 { &mut self.shard[unit] } else { &mut self.store.unit_mut(unit)[own] }
    }

    /// All of `unit`, which must be whole.
    pub fn whole(&self, unit: usize) -> &[f32] {
        self.store.unit(unit)
    }

    /// This rank has changed its part of `unit`: the others' parts are out of date, and are fetched before the next use.
    pub fn updated(&mut self, unit: usize) {
        self.changed[unit] = true;
        if matches!(self.zero, 1 | 2) && self.data.size() > 1 {
            self.state[unit] = State::Away;
        }
    }

    /// Begins to fetch `unit`, if it is away.
    ///
    /// # Errors
    /// No memory.
    pub fn prefetch(&mut self, unit: usize) -> Result<()> {
        if matches!(self.state[unit], State::Away) { self.gather(unit) } else { Ok(()) }
    }

    fn gather(&mut self, unit: usize) -> Result<()> {
        let mut own = self.pool.take(self.own(unit).len())?;
        own.copy_from_slice(self.own(unit));
        let all = self.pool.take(self.units.units[unit].len)?;
        self.state[unit] = State::Coming(self.data.all_gather_async(own, all));
        Ok(())
    }

    /// Waits until `unit` is whole.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn need(&mut self, unit: usize) -> Result<()> {
        self.arrive(unit)?;
        // Once an update, also where a unit is gathered again: a graph knows its leaves until it has gone backward.
        if std::mem::replace(&mut self.changed[unit], false) {
            self.store.show(&self.units, unit);
        }
        Ok(())
    }

    fn arrive(&mut self, unit: usize) -> Result<()> {
        self.prefetch(unit)?;
        let State::Coming(pending) = std::mem::replace(&mut self.state[unit], State::Here) else {
            return Ok(());
        };
        let begun = Instant::now();
        let ((own, all), timing) = waiting("wait for parameters", || pending.wait_timed())?;
        self.store.unit_mut(unit).copy_from_slice(&all);
        self.time.exposed += begun.elapsed();
        self.time.busy += timing.finished - timing.started;
        self.pool.give(own);
        self.pool.give(all);
        if self.zero == 3 {
            self.whole_bytes += size_of_val(self.store.unit(unit));
            self.peak_bytes = self.peak_bytes.max(self.whole_bytes);
        }
        Ok(())
    }

    /// `unit` is not needed for a while.
    pub fn done(&mut self, unit: usize) {
        if self.zero == 3 && matches!(self.state[unit], State::Here) {
            self.whole_bytes -= size_of_val(self.store.unit(unit));
            self.drop_whole(unit);
        }
    }

    fn drop_whole(&mut self, unit: usize) {
        self.store.release(unit);
        self.state[unit] = State::Away;
    }

    /// Waits for everything that is on its way.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn settle(&mut self) -> Result<()> {
        for unit in 0..self.state.len() {
            if matches!(self.state[unit], State::Coming(_)) {
                self.need(unit)?;
                self.done(unit);
            }
        }
        Ok(())
    }

    /// Fetches what other ranks have updated, where parameters stay whole.
    ///
    /// # Errors
    /// A failure of communication.
    pub(crate) fn complete(&mut self) -> Result<()> {
        if self.zero == 3 {
            self.settle()
        } else {
            (0..self.state.len()).try_for_each(|unit| self.need(unit))
        }
    }

    /// What fetching took since the last call.
    pub fn take_time(&mut self) -> CommTime {
        std::mem::take(&mut self.time)
    }

    /// Bytes that stay; and most bytes that were whole for a while, with the buffers that they came in.
    pub fn bytes(&self) -> (usize, usize) {
        let stays = match self.zero {
            3 => self.shard.iter().map(|shard| size_of_val(&shard[..])).sum(),
            _ => self.units.units.iter().map(|unit| unit.len * size_of::<f32>()).sum(),
        };
        (stays, self.peak_bytes + self.pool.peak_bytes())
    }
}
