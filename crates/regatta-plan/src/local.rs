//! Islands that train on their own for a while, and how they come together.

use crate::exchange::{Content, ExchangePlan, Kept, Operation, UnitOperation, UnitUse};
use crate::{Axis, AxisSet, Load, Plan};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();
/// Steps between two agreements of all ranks, where islands talk to their neighbours only.
const GOSSIP_AGREEMENT: u64 = 64;

/// How islands combine what they have learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Outer {
    /// The mean of their parameters (Stich 2019, "Local SGD Converges Fast and Communicates Little").
    #[default]
    Average,
    /// The mean of what they have moved by is the gradient of an outer optimizer with Nesterov momentum (Douillard et al.
    /// 2023, "DiLoCo").
    Diloco,
    /// Every island takes the mean with its two neighbours in a ring, and waits for nobody else (Lian et al. 2017, "Can
    /// Decentralized Algorithms Outperform Centralized Algorithms?").
    Gossip,
}

impl Outer {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Average => "average",
            Self::Diloco => "diloco",
            Self::Gossip => "gossip",
        }
    }
}

impl fmt::Display for Outer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// When and how the islands of a plan - the indices along the axis `replica` - come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Local {
    /// Steps from one time to the next; 0: islands exchange gradients in every step.
    pub every: u64,
    /// How they combine.
    pub outer: Outer,
    /// Steps before, in which gradients are exchanged (Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD").
    pub start: u64,
    /// The outer learning rate, in millionths.
    pub lr: u32,
    /// The outer momentum, in millionths.
    pub momentum: u32,
    /// Parts of the model, of which one comes together at a time (Douillard et al. 2025, "Streaming DiLoCo").
    pub fragments: u64,
    /// Steps that go on while a part is on its way.
    pub overlap: u64,
    /// How much of its own parameters an island keeps where steps went on, in millionths.
    pub mixing: u32,
    /// The number of steps of the whole run. After the last one all islands have the same parameters.
    pub steps: u64,
}

impl Default for Local {
    fn default() -> Self {
        let outer = Outer::Average;
        let (lr, momentum, mixing) = (700_000, 900_000, 500_000);
        Self { every: 0, outer, start: 0, lr, momentum, fragments: 1, overlap: 0, mixing, steps: 0 }
    }
}

impl Local {
    /// Whether islands still exchange gradients in a step, of which `step` have been done before.
    pub fn is_synchronous(self, step: u64) -> bool {
        step < self.start
    }

    /// The part of the model that comes together after `done` steps; none if none does.
    pub fn due(self, done: u64) -> Option<u64> {
        let distance = self.every / self.fragments.max(1);
        let since = done.checked_sub(self.start).filter(|since| *since > 0)?;
        since.is_multiple_of(distance.max(1)).then(|| (since / distance.max(1) - 1) % self.fragments.max(1))
    }

    /// Steps from one agreement of all ranks to the next.
    pub fn agreement(self) -> u64 {
        if self.outer == Outer::Gossip { GOSSIP_AGREEMENT } else { self.every.max(1) }
    }

    /// Whether all ranks agree on the loss, and on whether to go on, after `done` steps; else those of an island do.
    pub fn agrees(self, done: u64) -> bool {
        let since = done.saturating_sub(self.start);
        since.is_multiple_of(self.agreement()) || done <= self.start || self.ends(done)
    }

    /// Whether `done` steps are all.
    pub fn ends(self, done: u64) -> bool {
        done == self.steps
    }

    /// The part of the model that holds a unit of so many.
    pub fn fragment(self, unit: usize, units: usize) -> u64 {
        unit as u64 * self.fragments / units.max(1) as u64
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "islands together every {} steps by {}", self.every, self.outer)?;
        if self.fragments > 1 {
            write!(f, " in {} parts", self.fragments)?;
        }
        if self.overlap > 0 {
            write!(f, ", {} steps under way", self.overlap)?;
        }
        if self.start > 0 {
            write!(f, " after {} synchronous ones", self.start)?;
        }
        Ok(())
    }
}

/// Islands exchange gradients inside as `inner` says, and come together by `outer` from time to time.
#[derive(Debug)]
pub struct Islands {
    /// What the ranks of an island exchange.
    pub inner: Box<dyn ExchangePlan>,
    /// What islands exchange.
    pub outer: Box<dyn ExchangePlan>,
    /// When.
    pub local: Local,
    /// The number of islands.
    pub islands: usize,
    /// Ranks that a unit is sharded over inside an island.
    pub shards: usize,
}

impl Islands {
    /// Numbers that each rank keeps for each parameter that it updates: where the islands have parted, and the momentum.
    fn kept_of_outer(&self) -> usize {
        match self.local.outer {
            Outer::Gossip => 0,
            Outer::Average => 1,
            Outer::Diloco => 2,
        }
    }
}

impl ExchangePlan for Islands {
    fn sends_each_micro_batch(&self) -> bool {
        self.inner.sends_each_micro_batch()
    }

    fn gathers_on_use(&self) -> bool {
        self.inner.gathers_on_use()
    }

    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation> {
        let mut all = self.inner.operations(unit);
        all.iter_mut().for_each(|one| one.over = one.over.without(Axis::Replica.into()));
        all.retain(|one| one.over != AxisSet::NONE);
        let numbers = unit.len / self.shards;
        if self.local.outer == Outer::Gossip {
            all.push(UnitOperation {
                content: Content::Parameters,
                over: Axis::Replica.into(),
                operation: Operation::Neighbours,
                count: 1,
                every: self.local.every,
                numbers,
                width: F32,
                what: "parameters, to the neighbours",
            });
            return all;
        }
        let outer = self.outer.operations(UnitUse { len: numbers, ..unit }).into_iter();
        all.extend(outer.map(|one| UnitOperation {
            over: Axis::Replica.into(),
            every: self.local.every,
            what: if one.what == "gradients" { "what islands have moved by" } else { one.what },
            ..one
        }));
        all
    }

    fn kept(&self, numbers: usize) -> Kept {
        let inner = self.inner.kept(numbers);
        // Besides, what is on its way.
        let waiting = usize::from(self.local.overlap > 0);
        let buffers = if self.local.outer == Outer::Gossip { 0 } else { 1 + waiting };
        let of_codes = self.outer.kept(inner.updated).gradients.saturating_sub(inner.updated);
        let outer = inner.updated * (self.kept_of_outer() + buffers) + of_codes;
        Kept { gradients: inner.gradients.saturating_add(outer), ..inner }
    }

    fn buffers(&self, plan: &Plan, load: &Load) -> usize {
        let largest = load.units.iter().copied().max().unwrap_or(0) / self.shards;
        let neighbours = if self.local.outer == Outer::Gossip { 3 * largest } else { 0 };
        self.inner.buffers(plan, load) + neighbours
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_comes_together_once_in_each_interval() {
        let local = Local { every: 12, fragments: 3, start: 5, steps: 100, ..Local::default() };
        assert!((0..9).all(|done| local.due(done).is_none()));
        let due: Vec<(u64, u64)> =
            (0..30).filter_map(|done| local.due(done).map(|part| (done, part))).collect();
        assert_eq!(due, [(9, 0), (13, 1), (17, 2), (21, 0), (25, 1), (29, 2)]);
        assert!(local.is_synchronous(4) && !local.is_synchronous(5));
        let agreed: Vec<u64> = (1..30).filter(|&done| local.agrees(done)).collect();
        assert_eq!(agreed, [1, 2, 3, 4, 5, 17, 29]);
        assert!(local.agrees(100) && local.ends(100));
    }

    #[test]
    fn parts_hold_all_units_in_order() {
        let local = Local { fragments: 4, ..Local::default() };
        let parts: Vec<u64> = (0..10).map(|unit| local.fragment(unit, 10)).collect();
        assert_eq!(parts, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]);
    }
}
