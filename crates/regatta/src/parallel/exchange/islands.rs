//! Islands - the indices along the axis `replica` - that train on their own and come together from time to time: local SGD,
//! DiLoCo, streaming DiLoCo and gossip. Inside an island its own exchange combines gradients. See [`Outer`] for the papers.

use super::{
    CommTime, CompressedExchange, GradientExchange, MeanExchange, NamedState, StateOf, Whose, mean_over,
};
use crate::error::Result;
use crate::params::{ParamStore, Units};
use regatta_comm::{Buffer, Group, ReduceOp};
use regatta_plan::{Compress, CompressKind, Local, Outer};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Where the islands have parted, before they have; and a mean that has not arrived. Checkpoints have it, too.
const UNKNOWN: f32 = f32::NAN;

/// See the [module](self).
pub struct IslandsExchange {
    inner: Box<dyn GradientExchange>,
    between: Between,
    islands: Group,
    local: Local,
    units: Arc<Units>,
    shard: usize,
    /// Steps done before the present one.
    step: u64,
    /// Islands may have different parameters.
    parted: bool,
    time: CommTime,
}

/// What islands keep and send each other, by unit: for the part that this rank updates.
struct Between {
    /// Takes the mean over the islands of what they have moved by.
    mean: Box<dyn GradientExchange>,
    /// Where the islands have parted: the same on all of them.
    anchors: Vec<Vec<f32>>,
    momenta: Vec<Vec<f32>>,
    /// Means that have arrived before their time.
    arrived: Vec<Vec<f32>>,
    under_way: Option<UnderWay>,
}

impl Between {
    /// Whether the means of these units are there.
    fn has_arrived(&self, units: &Range<usize>) -> bool {
        self.arrived[units.clone()].iter().all(|mean| !is_unknown(mean))
    }
}

/// Whether numbers are [`UNKNOWN`].
fn is_unknown(numbers: &[f32]) -> bool {
    numbers.first().is_some_and(|number| number.is_nan())
}

/// A part of the model on its way.
struct UnderWay {
    units: Range<usize>,
    /// After so many steps it is applied.
    applied: u64,
    has_arrived: bool,
}

impl IslandsExchange {
    /// Joins `inner`, the exchange inside an island, to the other `islands`. Rank `shard` of those that a unit is sharded over
    /// has its part.
    ///
    /// # Errors
    /// No thread can be started for encodings.
    pub fn new(
        inner: Box<dyn GradientExchange>,
        islands: Group,
        units: Arc<Units>,
        shard: usize,
        (local, compress): (Local, Compress),
    ) -> Result<Self> {
        let lens: Vec<usize> = (0..units.units.len()).map(|unit| units.shard(unit, shard).len()).collect();
        let filled = |wanted: bool, value: f32| -> Vec<Vec<f32>> {
            if wanted { lens.iter().map(|&len| vec![value; len]).collect() } else { vec![] }
        };
        let between = Between {
            anchors: filled(local.outer != Outer::Gossip, UNKNOWN),
            momenta: filled(local.outer == Outer::Diloco, 0.0),
            arrived: filled(local.overlap > 0, UNKNOWN),
            under_way: None,
            mean: match compress.kind {
                CompressKind::None => Box::new(MeanExchange::new(islands.clone(), lens.clone())),
                _ => Box::new(CompressedExchange::new(islands.clone(), &units, compress)?),
            },
        };
        Ok(Self {
            inner,
            between,
            islands,
            local,
            units,
            shard,
            step: 0,
            parted: false,
            time: CommTime::default(),
        })
    }

    /// The units of a part of the model.
    fn units_of(&self, part: u64) -> Range<usize> {
        let count = self.units.units.len();
        let first = |part: u64| (0..count).find(|&unit| self.local.fragment(unit, count) >= part);
        first(part).unwrap_or(count)..first(part + 1).unwrap_or(count)
    }

    /// Begins to send what this island has moved by in these units.
    fn send(&mut self, units: Range<usize>, done: u64, store: &ParamStore) -> Result<()> {
        self.between.mean.begin(done);
        for unit in units {
            let mut moved = self.between.mean.buffer(unit)?;
            let places = self.between.anchors[unit].iter().zip(store.own(unit));
            moved.iter_mut().zip(places).for_each(|(moved, (anchor, own))| *moved = anchor - own);
            self.between.mean.push(unit, moved)?;
        }
        Ok(())
    }

    /// Waits for the part that is on its way.
    fn arrive(&mut self) -> Result<()> {
        let Between { mean, arrived, under_way, .. } = &mut self.between;
        if let Some(part) = under_way
            && !part.has_arrived
        {
            mean.finish()?;
            for unit in part.units.clone() {
                if let Some(mean) = mean.combined(unit) {
                    arrived[unit].copy_from_slice(mean);
                }
            }
            part.has_arrived = true;
        }
        Ok(())
    }

    /// Applies the part that is on its way.
    fn apply_arrived(&mut self, store: &mut ParamStore) -> Result<()> {
        self.arrive()?;
        let Some(part) = self.between.under_way.take() else { return Ok(()) };
        let kept = self.local.mixing as f32 / 1e6;
        for unit in part.units {
            let mut mean = std::mem::take(&mut self.between.arrived[unit]);
            self.apply(unit, &mean, kept, store);
            mean.fill(UNKNOWN);
            self.between.arrived[unit] = mean;
        }
        Ok(())
    }

    /// Brings these units of all islands together now.
    fn come_together(&mut self, units: Range<usize>, done: u64, store: &mut ParamStore) -> Result<()> {
        self.send(units.clone(), done, store)?;
        self.between.mean.finish()?;
        for unit in units {
            if let Some(mean) = self.between.mean.combined(unit).map(|mean| mean.to_vec()) {
                self.apply(unit, &mean, 0.0, store);
            }
        }
        Ok(())
    }

    /// One step of the outer optimizer, with Nesterov momentum. The island keeps the part `kept` of its own parameters.
    fn apply(&mut self, unit: usize, mean: &[f32], kept: f32, store: &mut ParamStore) {
        let is_diloco = self.local.outer == Outer::Diloco;
        let (lr, mu) = (self.local.lr as f32 / 1e6, self.local.momentum as f32 / 1e6);
        let own = store.own_mut(unit);
        for segment in self.units.segments(unit, self.units.shard(unit, self.shard)) {
            let range = segment.within;
            let anchors = &mut self.between.anchors[unit][range.clone()];
            let mean = &mean[range.clone()];
            if is_diloco && !self.units.params[segment.param].statistic {
                let momenta = &mut self.between.momenta[unit][range.clone()];
                for ((anchor, momentum), gradient) in anchors.iter_mut().zip(momenta).zip(mean) {
                    *momentum = mu * *momentum + gradient;
                    *anchor -= lr * (gradient + mu * *momentum);
                }
            } else {
                anchors.iter_mut().zip(mean).for_each(|(anchor, moved)| *anchor -= moved);
            }
            let own = &mut own[range];
            own.iter_mut().zip(anchors).for_each(|(own, anchor)| *own = kept * *own + (1.0 - kept) * *anchor);
        }
        self.inner.updated(unit);
    }

    /// Takes the mean with the islands before and after this one.
    fn gossip(&mut self, store: &mut ParamStore) -> Result<()> {
        let (own, count) = (self.islands.rank(), self.islands.size());
        let neighbours = neighbours(own, count);
        for unit in 0..self.units.units.len() {
            let parameters = store.own_mut(unit);
            let mut theirs = vec![vec![0.0f32; parameters.len()]; neighbours.len()];
            for (&peer, theirs) in neighbours.iter().zip(&mut theirs) {
                // One of the two sends first.
                if own < peer {
                    self.islands.send(parameters, peer)?;
                    self.islands.recv(theirs, peer)?;
                } else {
                    self.islands.recv(theirs, peer)?;
                    self.islands.send(parameters, peer)?;
                }
            }
            let part = 1.0 / (1 + neighbours.len()) as f32;
            for (index, own) in parameters.iter_mut().enumerate() {
                *own =
                    part * theirs.iter().map(|theirs| theirs[index]).fold(*own, |sum, theirs| sum + theirs);
            }
            self.inner.updated(unit);
        }
        Ok(())
    }

    /// The mean of all islands, after which they have the same parameters.
    fn average(&mut self, store: &mut ParamStore) -> Result<()> {
        for unit in 0..self.units.units.len() {
            self.islands.all_reduce(store.own_mut(unit), ReduceOp::Mean)?;
            self.inner.updated(unit);
        }
        Ok(())
    }

    /// What is to be done after `done` steps.
    fn after(&mut self, done: u64, store: &mut ParamStore) -> Result<()> {
        let local = self.local;
        let all = 0..self.units.units.len();
        self.parted = true;
        if local.outer == Outer::Gossip {
            if local.ends(done) {
                self.parted = false;
                return self.average(store);
            }
            return if local.due(done).is_some() { self.gossip(store) } else { Ok(()) };
        }
        if self.between.under_way.as_ref().is_some_and(|part| part.applied <= done || local.ends(done)) {
            self.apply_arrived(store)?;
        }
        if local.ends(done) {
            self.parted = false;
            return self.come_together(all, done, store);
        }
        let Some(units) = local.due(done).map(|part| self.units_of(part)) else { return Ok(()) };
        if local.overlap == 0 {
            self.parted = local.fragments > 1;
            return self.come_together(units, done, store);
        }
        self.send(units.clone(), done, store)?;
        self.between.under_way = Some(UnderWay { units, applied: done + local.overlap, has_arrived: false });
        Ok(())
    }
}

/// The islands that one of a ring of `count` talks with, in an order in which no two wait for each other.
fn neighbours(own: usize, count: usize) -> Vec<usize> {
    let (before, after) = ((own + count - 1) % count, (own + 1) % count);
    if count <= 2 {
        return if count == 2 { vec![after] } else { vec![] };
    }
    // Pairs that begin at an even place go first, then those at odd ones; the pair that closes an odd ring is the last.
    let turn = |first: usize| if first + 1 == count && count % 2 == 1 { 2 } else { first % 2 };
    if turn(own) < turn(before) { vec![after, before] } else { vec![before, after] }
}

impl GradientExchange for IslandsExchange {
    fn begin(&mut self, step: u64) {
        self.inner.begin(step);
        self.step = step;
        let local = self.local;
        if self.between.under_way.is_none() && local.overlap > 0 {
            // A run that was resumed has what had arrived in its checkpoint.
            let begun = (step.saturating_sub(local.overlap - 1)..=step).rev();
            let part = begun.into_iter().find_map(|done| local.due(done).map(|part| (done, part)));
            let part = part.map(|(done, part)| UnderWay {
                units: self.units_of(part),
                applied: done + local.overlap,
                has_arrived: true,
            });
            // Where a run has ended, all came together instead.
            self.between.under_way = part.filter(|part| self.between.has_arrived(&part.units));
        }
    }

    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>> {
        self.inner.buffer(unit)
    }

    fn takes_each_micro_batch(&self) -> bool {
        self.inner.takes_each_micro_batch()
    }

    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        self.inner.push(unit, gradients)
    }

    fn finish(&mut self) -> Result<()> {
        self.inner.finish()?;
        if !self.local.is_synchronous(self.step) {
            return Ok(());
        }
        let begun = Instant::now();
        mean_over(&mut *self.inner, self.units.units.len(), &self.islands)?;
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    fn combined(&mut self, unit: usize) -> Option<&mut [f32]> {
        self.inner.combined(unit)
    }

    fn updated(&mut self, unit: usize) {
        self.inner.updated(unit);
    }

    fn before_update(&mut self, store: &ParamStore) {
        if self.local.is_synchronous(self.step) {
            return;
        }
        for (unit, anchor) in self.between.anchors.iter_mut().enumerate() {
            // Here they part, unless a checkpoint says where they have.
            if is_unknown(anchor) {
                anchor.copy_from_slice(store.own(unit));
            }
        }
    }

    fn after_update(&mut self, store: &mut ParamStore) -> Result<()> {
        if self.local.is_synchronous(self.step) {
            return Ok(());
        }
        let begun = Instant::now();
        self.after(self.step + 1, store)?;
        let mean = self.between.mean.take_time();
        // What it has waited for is a part of this time.
        self.time.busy += mean.busy.saturating_sub(mean.exposed);
        self.time.add_exposed(begun.elapsed());
        Ok(())
    }

    fn has_parted(&self) -> bool {
        self.parted
    }

    fn prefetch(&mut self, unit: usize, store: &ParamStore) -> Result<()> {
        self.inner.prefetch(unit, store)
    }

    fn acquire(&mut self, unit: usize, store: &mut ParamStore) -> Result<()> {
        self.inner.acquire(unit, store)
    }

    fn release(&mut self, unit: usize, store: &mut ParamStore) {
        self.inner.release(unit, store);
    }

    fn gathers_on_use(&self) -> bool {
        self.inner.gathers_on_use()
    }

    fn wait_all(&mut self, store: &mut ParamStore) -> Result<()> {
        self.inner.wait_all(store)
    }

    fn before_save(&mut self, store: &mut ParamStore) -> Result<()> {
        self.inner.before_save(store)?;
        self.arrive()
    }

    fn state(&mut self) -> NamedState<'_> {
        let mut all = self.inner.state();
        let Between { mean, anchors, momenta, arrived, .. } = &mut self.between;
        all.extend(mean.state());
        for (name, numbers) in [("anchor", anchors), ("outer_momentum", momenta), ("under_way", arrived)] {
            if !numbers.is_empty() {
                let units = numbers.iter_mut().map(Vec::as_mut_slice).collect();
                all.push(StateOf { name, whose: Whose::All, units });
            }
        }
        all
    }

    fn take_time(&mut self) -> CommTime {
        let mut time = std::mem::take(&mut self.time);
        time.add(self.inner.take_time());
        time
    }

    fn bytes(&self) -> (usize, usize) {
        let (gradients, buffers) = self.inner.bytes();
        let (sent, more) = self.between.mean.bytes();
        let Between { anchors, momenta, arrived, .. } = &self.between;
        let kept: usize =
            [anchors, momenta, arrived].into_iter().flatten().map(|of| size_of_val(&of[..])).sum();
        (gradients + sent + kept, buffers + more)
    }
}

#[cfg(test)]
mod tests {
    use super::neighbours;

    #[test]
    fn no_two_islands_wait_for_each_other() {
        for count in 1..12 {
            // Each takes its pairs in its order; a pair is through when it is the next of both.
            let mut left: Vec<Vec<usize>> = (0..count).map(|own| neighbours(own, count)).collect();
            assert!(left.iter().all(|peers| peers.len() == (count - 1).min(2)), "{count}");
            loop {
                let next = |own: usize| left[own].first().copied();
                let pair = (0..count).find_map(|own| {
                    next(own).filter(|&peer| next(peer) == Some(own)).map(|peer| (own, peer))
                });
                let Some((own, peer)) = pair else { break };
                left[own].remove(0);
                left[peer].remove(0);
            }
            assert!(left.iter().all(Vec::is_empty), "{count}: {left:?}");
        }
    }
}
