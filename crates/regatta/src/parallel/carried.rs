//! The communication of a rank's groups, by purpose.

use regatta_comm::{Kind, Traffic, Volume};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The purpose of communication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Gradients are averaged over the workers, or summed over stages that share a parameter.
    Gradients,
    /// Parameters are gathered from the ranks that own their shards.
    Parameters,
    /// Inputs and outputs of layers that are split over ranks, and the loss over a split vocabulary.
    Tensor,
    /// Activations and their gradients go from stage to stage.
    Pipeline,
    /// Ranks agree at the end of a step on the loss, the norm of the gradient and whether to stop.
    Control,
}

impl Purpose {
    /// All purposes.
    pub const ALL: [Self; 5] =
        [Self::Gradients, Self::Parameters, Self::Tensor, Self::Pipeline, Self::Control];

    /// The name of the purpose in summaries.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gradients => "gradients",
            Self::Parameters => "parameters",
            Self::Tensor => "tensor",
            Self::Pipeline => "pipeline",
            Self::Control => "control",
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The number of operations and bytes that one rank communicated, by purpose and kind of operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried([[Volume; Kind::ALL.len()]; Purpose::ALL.len()]);

impl Carried {
    /// Adds `more` operations of one purpose and kind.
    pub fn add(&mut self, purpose: Purpose, kind: Kind, more: Volume) {
        let volume = &mut self.0[purpose as usize][kind as usize - 1];
        volume.operations += more.operations;
        volume.bytes += more.bytes;
        volume.sent += more.sent;
    }

    /// Adds the traffic of a group; `purpose` gives the purpose of each kind of operation.
    pub(crate) fn group(&mut self, traffic: &Traffic, purpose: impl Fn(Kind) -> Purpose) {
        traffic.kinds().for_each(|(kind, volume)| self.add(purpose(kind), kind, volume));
    }

    /// The difference between this count and an earlier one.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = *self;
        for (volume, before) in difference.0.iter_mut().flatten().zip(earlier.0.iter().flatten()) {
            volume.operations = volume.operations.saturating_sub(before.operations);
            volume.bytes = volume.bytes.saturating_sub(before.bytes);
            volume.sent = volume.sent.saturating_sub(before.sent);
        }
        difference
    }

    /// The volume of every purpose and kind that has operations, in order.
    pub fn volumes(&self) -> impl Iterator<Item = (Purpose, Kind, Volume)> {
        let kinds = |purpose: Purpose| Kind::ALL.iter().map(move |&kind| (purpose, kind));
        let volume =
            |(purpose, kind): (Purpose, Kind)| (purpose, kind, self.0[purpose as usize][kind as usize - 1]);
        Purpose::ALL.into_iter().flat_map(kinds).map(volume).filter(|(_, _, volume)| volume.operations > 0)
    }

    /// The counts as numbers, to send to other ranks.
    pub(crate) fn to_numbers(self) -> Vec<i64> {
        let numbers = self.0.iter().flatten().flat_map(|v| [v.operations, v.bytes, v.sent]);
        numbers.map(u64::cast_signed).collect()
    }

    /// The inverse of [`to_numbers`](Self::to_numbers).
    pub(crate) fn from_numbers(numbers: &[i64]) -> Self {
        let mut carried = Self::default();
        for (volume, numbers) in carried.0.iter_mut().flatten().zip(numbers.chunks_exact(3)) {
            let [operations, bytes, sent] = [0, 1, 2].map(|i| numbers[i].cast_unsigned());
            *volume = Volume { operations, bytes, sent };
        }
        carried
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_to_numbers_is_lossless_and_differences_are_exact() {
        let mut carried = Carried::default();
        let volume = |operations, bytes, sent| Volume { operations, bytes, sent };
        carried.add(Purpose::Tensor, Kind::AllReduce, volume(1, 8, 6));
        let before = carried;
        carried.add(Purpose::Tensor, Kind::AllReduce, volume(2, 16, 12));
        carried.add(Purpose::Pipeline, Kind::Send, volume(1, 4, 0));
        assert_eq!(Carried::from_numbers(&carried.to_numbers()), carried);
        let since: Vec<_> = carried.since(&before).volumes().collect();
        assert_eq!(
            since,
            [
                (Purpose::Tensor, Kind::AllReduce, volume(2, 16, 12)),
                (Purpose::Pipeline, Kind::Send, volume(1, 4, 0))
            ]
        );
    }
}
