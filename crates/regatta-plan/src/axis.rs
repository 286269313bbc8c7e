//! The axes that a mesh may have, and sets of them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An axis of the mesh: one way to distribute a job over ranks.
///
/// The variants are ordered from the slowest to the fastest varying with the rank. `tensor` has the most traffic, so
/// it varies fastest and its ranks are usually on one host. Pipeline stages only send activations and gradients to
/// their neighbours, so they may be on different hosts (Narayanan et al. 2021, "Efficient Large-Scale Language Model
/// Training on GPU Clusters Using Megatron-LM", section 3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Axis {
    /// Ranks that hold the same shards and process different samples.
    Replica,
    /// Stages of a pipeline: each holds some of the model's blocks.
    Pipe,
    /// Ranks that process different samples. Parameters, gradients and optimizer state may be sharded over them.
    Data,
    /// Ranks that each hold a part of every layer.
    Tensor,
}

impl Axis {
    /// All axes, from the slowest to the fastest varying with the rank.
    pub const ALL: [Self; 4] = [Self::Replica, Self::Pipe, Self::Data, Self::Tensor];

    /// The name of the axis, as in `data=2`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replica => "replica",
            Self::Pipe => "pipe",
            Self::Data => "data",
            Self::Tensor => "tensor",
        }
    }

    /// The axis with this name, or `None` if there is none.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|axis| axis.name() == name)
    }

    /// The names of all axes, separated by commas.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of axes.
///
/// ```
/// use regatta_plan::{Axis, AxisSet};
/// let workers = AxisSet::of(&[Axis::Data, Axis::Replica]);
/// assert!(workers.contains(Axis::Data) && !workers.contains(Axis::Pipe));
/// assert_eq!(workers.to_string(), "replica,data");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct AxisSet(u8);

impl AxisSet {
    /// No axis.
    pub const NONE: Self = Self(0);
    /// All axes.
    pub const ALL: Self = Self::of(&Axis::ALL);
    /// The axes whose ranks process different samples.
    pub const WORKERS: Self = Self::of(&[Axis::Replica, Axis::Data]);

    /// The set that contains `axes`.
    pub const fn of(axes: &[Axis]) -> Self {
        let (mut bits, mut index) = (0, 0);
        while index < axes.len() {
            bits |= 1 << axes[index] as u8;
            index += 1;
        }
        Self(bits)
    }

    /// Whether `axis` is in the set.
    pub const fn contains(self, axis: Axis) -> bool {
        self.0 & (1 << axis as u8) != 0
    }

    /// The axes that are in this set or in `other`.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The axes of this set that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The axes of the set, from the slowest to the fastest varying with the rank.
    pub fn iter(self) -> impl Iterator<Item = Axis> {
        Axis::ALL.into_iter().filter(move |axis| self.contains(*axis))
    }
}

impl From<Axis> for AxisSet {
    fn from(axis: Axis) -> Self {
        Self::of(&[axis])
    }
}

impl fmt::Display for AxisSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.iter().map(Axis::name).collect();
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_contains_the_axes_it_was_made_of() {
        for bits in 0u8..1 << Axis::ALL.len() {
            let axes: Vec<Axis> =
                Axis::ALL.into_iter().filter(|axis| bits & (1 << *axis as u8) != 0).collect();
            let set = AxisSet::of(&axes);
            assert_eq!(set.iter().collect::<Vec<_>>(), axes);
            assert_eq!(AxisSet::ALL.without(set).union(set), AxisSet::ALL);
            assert!(Axis::ALL.iter().all(|axis| set.contains(*axis) == axes.contains(axis)));
        }
        assert_eq!(AxisSet::NONE.to_string(), "");
        assert!(Axis::ALL.iter().all(|axis| Axis::find(axis.name()) == Some(*axis)));
    }
}
