//! The kinds of schedules and their names.

use crate::PlanError;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// In which order the stages of a pipeline execute forwards and backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// All forwards, then all backwards (Huang et al. 2019, "GPipe").
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward and one backward in turn, so at most as many micro-batches are in flight as there are stages
    /// (PipeDream-Flush; Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training").
    #[default]
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B where every stage holds several chunks of the model (Narayanan et al. 2021, "Efficient Large-Scale
    /// Language Model Training on GPU Clusters Using Megatron-LM", section 2.2).
    Interleaved,
    /// 1F1B with the backward divided into two parts, the second of which fills the bubble (ZB-H1; Qi et al. 2023,
    /// "Zero Bubble Pipeline Parallelism").
    ZeroBubble,
}

impl ScheduleKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::GPipe, Self::OneFOneB, Self::Interleaved, Self::ZeroBubble];

    /// The name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
            Self::Interleaved => "interleaved",
            Self::ZeroBubble => "zero-bubble",
        }
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ScheduleKind {
    type Err = PlanError;

    fn from_str(name: &str) -> Result<Self, PlanError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| PlanError::UnknownSchedule(name.into(), Self::ALL.map(Self::name).join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::{IntoDeserializer, value::Error};

    #[test]
    fn names_are_the_same_everywhere() {
        for kind in ScheduleKind::ALL {
            let name = kind.to_string();
            assert_eq!(name.parse(), Ok(kind));
            let read = ScheduleKind::deserialize(IntoDeserializer::<Error>::into_deserializer(name.as_str()));
            assert_eq!(read, Ok(kind));
        }
        assert_eq!(ScheduleKind::default().name(), "1f1b");
        assert_eq!(
            "gpip".parse::<ScheduleKind>().unwrap_err().to_string(),
            "there is no schedule 'gpip'; use one of gpipe, 1f1b, interleaved, zero-bubble"
        );
    }
}
