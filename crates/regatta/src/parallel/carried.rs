//! What a rank's groups have carried, by what it was for.

use regatta_comm::{Kind, Traffic, Volume};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What communication is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Gradients, averaged over the workers or summed over stages that share a parameter.
    Gradients,
    /// Parameters, gathered from the ranks that own their shards.
    Parameters,
    /// Inputs and outputs of layers that are split over ranks, and the loss over a split vocabulary.
    Tensor,
    /// Activations and their gradients, from stage to stage.
    Pipeline,
    /// What ranks agree on at the end of a step: the loss, the gradient's norm, whether to stop.
    Control,
}

impl Purpose {
    /// All purposes.
    pub const ALL: [Self; 5] =
        [Self::Gradients, Self::Parameters, Self::Tensor, Self::Pipeline, Self::Control];

    /// Its name in summaries.
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

/// Operations of one rank by purpose and kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried([[Volume; Kind::ALL.len()]; Purpose::ALL.len()]);

impl Carried {
    /// Adds operations.
    pub fn add(&mut self, purpose: Purpose, kind: Kind, more: Volume) {
        let volume = &mut self.0[purpose as usize][kind as usize - 1];
        volume.operations += more.operations;
        volume.bytes += more.bytes;
        volume.sent += more.sent;
    }

    /// Adds what a group has carried; `purpose` says what for.
    pub(crate) fn group(&mut self, traffic: &Traffic, purpose: impl Fn(Kind) -> Purpose) {
        traffic.kinds().for_each(|(kind, volume)| self.add(purpose(kind), kind, volume));
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut rest = *self;
        for (rest, before) in rest.0.iter_mut().flatten().zip(earlier.0.iter().flatten()) {
            rest.operations = rest.operations.saturating_sub(before.operations);
            rest.bytes = rest.bytes.saturating_sub(before.bytes);
            rest.sent = rest.sent.saturating_sub(before.sent);
        }
        rest
    }

    /// Purposes and kinds of which there were operations, in their order.
    pub fn volumes(&self) -> impl Iterator<Item = (Purpose, Kind, Volume)> {
        let kinds = |purpose: Purpose| Kind::ALL.iter().map(move |&kind| (purpose, kind));
        let volume =
            |(purpose, kind): (Purpose, Kind)| (purpose, kind, self.0[purpose as usize][kind as usize - 1]);
        Purpose::ALL.into_iter().flat_map(kinds).map(volume).filter(|(_, _, volume)| volume.operations > 0)
    }

    /// As numbers, to send.
    pub(crate) fn to_numbers(self) -> Vec<i64> {
        let numbers = self.0.iter().flatten().flat_map(|v| [v.operations, v.bytes, v.sent]);
        numbers.map(u64::cast_signed).collect()
    }

    /// From [`to_numbers`](Self::to_numbers).
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
    fn numbers_and_differences_keep_everything() {
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
