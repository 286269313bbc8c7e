//! The time of training steps by operation.

use super::statistics::median;
use crate::autograd::{Cost, Measured, Phase};
use crate::error::{Error, Result};
use regatta_comm::Group;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One kind of work of one rank. Values are per step, medians over the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the operation.
    pub name: String,
    /// The part of the step: `forward`, `backward` or `update`; empty for the rest of the time.
    pub phase: String,
    /// Number of calls.
    #[serde(with = "crate::json::float")]
    pub calls: f64,
    /// Duration of all calls in milliseconds.
    #[serde(with = "crate::json::float")]
    pub ms: f64,
    /// Number of floating-point operations.
    #[serde(with = "crate::json::float")]
    pub flops: f64,
    /// Bytes that are read and written; each input and output counts once.
    #[serde(with = "crate::json::float")]
    pub bytes: f64,
}

/// The profile of one rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Median duration of a step in milliseconds.
    #[serde(with = "crate::json::float")]
    pub step_ms: f64,
    /// Measured peak of floating-point operations per second of the rank's threads.
    #[serde(with = "crate::json::float")]
    pub peak_flops_per_s: f64,
    /// Measured peak of bytes per second that one thread copies; bytes read and bytes written both count.
    #[serde(with = "crate::json::float")]
    pub peak_bytes_per_s: f64,
    /// The kinds of work, the longest first.
    pub rows: Vec<Row>,
}

/// Name and phase.
type Kind = (&'static str, &'static str);

/// The measurements of the steps so far.
#[derive(Default)]
pub(super) struct Profiler {
    /// By kind of work, in the order in which they first occurred: for each step, calls, milliseconds, floating-point
    /// operations and bytes.
    kinds: Vec<(Kind, Vec<[f64; 4]>)>,
    steps: Vec<f64>,
}

fn name_of(phase: Phase) -> &'static str {
    match phase {
        Phase::Forward => "forward",
        Phase::Backward => "backward",
        Phase::Update => "update",
    }
}

impl Profiler {
    /// Adds a step.
    pub(super) fn add(&mut self, step: Duration, operations: &[Measured]) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let index = self.steps.len();
        self.steps.push(ms(step));
        for one in operations {
            self.count(index, (one.name, name_of(one.phase)), ms(one.took), one.cost);
        }
        // Kinds that did not occur in this step took no time in it.
        self.kinds.iter_mut().for_each(|(_, steps)| steps.resize(index + 1, [0.0; 4]));
        let known: f64 = self.kinds.iter().map(|(_, steps)| steps[index][1]).sum();
        self.count(index, ("everything else", ""), ms(step) - known, Cost::default());
    }

    fn count(&mut self, step: usize, kind: Kind, ms: f64, cost: Cost) {
        let place = self.kinds.iter().position(|(known, _)| *known == kind).unwrap_or_else(|| {
            self.kinds.push((kind, vec![]));
            self.kinds.len() - 1
        });
        let steps = &mut self.kinds[place].1;
        steps.resize(step + 1, [0.0; 4]);
        let sums = &mut steps[step];
        sums.iter_mut().zip([1.0, ms, cost.flops, cost.bytes]).for_each(|(sum, value)| *sum += value);
    }

    /// The medians over the steps after the first `skip`.
    pub(super) fn finish(mut self, skip: usize, peak_flops_per_s: f64) -> Profile {
        let skip = skip.min(self.steps.len().saturating_sub(1));
        let row = |((name, phase), steps): &(Kind, Vec<[f64; 4]>)| {
            let column = |i: usize| median(&mut steps[skip..].iter().map(|step| step[i]).collect::<Vec<_>>());
            Row {
                name: (*name).into(),
                phase: (*phase).into(),
                calls: column(0),
                ms: column(1),
                flops: column(2),
                bytes: column(3),
            }
        };
        let mut rows: Vec<Row> = self.kinds.iter().map(row).collect();
        rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Profile {
            step_ms: median(&mut self.steps[skip..]),
            peak_flops_per_s,
            peak_bytes_per_s: regatta_kernel::peak::bytes_per_s(),
            rows,
        }
    }
}

impl Profile {
    /// The profiles of all ranks. All ranks call it.
    pub(super) fn of_all(self, group: &Group) -> Result<Vec<Self>> {
        let usage = |error: serde_json::Error| Error::Usage(error.to_string());
        let own = serde_json::to_vec(&self).map_err(usage)?;
        let all = group.all_gather_vec(&own)?;
        all.iter().map(|json| serde_json::from_slice(json).map_err(usage)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn medians_of_steps_and_the_rest() {
        let mut profiler = Profiler::default();
        for (step, product) in [(50, 9), (10, 4), (12, 6), (14, 8)] {
            let ms = Duration::from_millis;
            let one = |name, phase, took| Measured {
                name,
                phase,
                begun: Instant::now(),
                took: ms(took),
                cost: Cost { flops: 5.0, bytes: 7.0 },
            };
            let operations = [
                one("linear", Phase::Forward, 1),
                one("linear", Phase::Backward, product - 2),
                one("linear", Phase::Backward, 1),
                one("optimizer", Phase::Update, 2),
            ];
            profiler.add(ms(step), &operations);
        }
        let profile = profiler.finish(1, 1e9);
        let row = |name: &str, phase: &str| {
            let found = profile.rows.iter().find(|row| row.name == name && row.phase == phase);
            found.map(|row| (row.calls, row.ms, row.flops, row.bytes)).unwrap()
        };
        assert_eq!(profile.step_ms, 12.0);
        assert_eq!(row("linear", "forward"), (1.0, 1.0, 5.0, 7.0));
        assert_eq!(row("linear", "backward"), (2.0, 5.0, 10.0, 14.0));
        assert_eq!(row("optimizer", "update"), (1.0, 2.0, 5.0, 7.0));
        assert_eq!(row("everything else", "").1, 4.0);
        assert_eq!(profile.rows[0].name, "linear");
    }
}
