//! What a plan sends between workers, and at which rate of their links another encoding would be faster.

use super::volume::{Outline, SERVERS};
use crate::config::Config;
use crate::parallel::Purpose;
use regatta_kernel::compress::{blocks, half, low_rank};
use regatta_plan::{Axis, CompressKind, Plan, PlanError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant};

/// Numbers with which the speed of an encoding is measured: a square matrix.
const SIDE: usize = 512;
/// The part of a step's computation beside which gradients can travel: backward is two of three parts of it.
const BACKWARD: f64 = 2.0 / 3.0;
/// Rates that are compared, in Mbit/s.
const FASTEST_LINK: f64 = 100_000.0;
const SLOWEST_LINK: f64 = 0.1;
/// From one rate to the next.
const FINER: f64 = 0.97;

/// What a rank sends to other workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkUse {
    /// Parameter servers that it sends them to; 0: to other workers.
    #[serde(default)]
    pub servers: usize,
    /// Bytes that it sends in a step, in the mean over steps.
    pub bytes_a_step: f64,
    /// Encodings that would be faster over slow links, from the fastest link to the slowest.
    pub faster: Vec<Faster>,
}

/// An encoding that would be faster over slow links.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Faster {
    /// Where links have less than this, in Mbit/s.
    pub below_mbit: f64,
    /// The value of `compress.kind`.
    pub kind: CompressKind,
}

impl LinkUse {
    /// What rank 0 sends under `plan`; with `compute`, the time that a step takes where nothing waits for communication, also
    /// which encodings would be faster.
    ///
    /// # Errors
    /// The model does not support the plan.
    pub fn of(
        config: &Config,
        plan: &Plan,
        vocab: usize,
        compute: Option<Duration>,
    ) -> Result<Self, PlanError> {
        let bytes_a_step = bytes(config, plan, vocab)?;
        let mut faster = vec![];
        // Where islands come together rarely, or a shard has one owner, there is no other encoding.
        let plain = plan.compress.kind == CompressKind::None
            && plan.sharded().is_none()
            && plan.local().is_none()
            && plan.servers.count == 0;
        if let (Some(compute), true) = (compute, plain && bytes_a_step > 0.0) {
            let numbers = bytes_a_step / 4.0 / sent_each(plan.mesh.workers());
            let mut ways = vec![Way { kind: CompressKind::None, bytes: bytes_a_step, coding: 0.0 }];
            for kind in [CompressKind::Bf16, CompressKind::Int8, CompressKind::Powersgd] {
                let mut other = plan.clone();
                other.compress.kind = kind;
                let bytes = bytes(config, &other, vocab)?;
                ways.push(Way { kind, bytes, coding: numbers * seconds_a_number(kind, plan.compress.rank) });
            }
            faster = changes(&ways, compute.as_secs_f64());
        }
        Ok(Self { servers: plan.servers.count, bytes_a_step, faster })
    }
}

impl fmt::Display for LinkUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes_a_step;
        match self.servers {
            0 => write!(f, "a rank sends {bytes:.0} bytes a step to other workers")?,
            servers => write!(
                f,
                "a worker sends {bytes:.0} bytes a step to {servers} server(s), and gets as many back"
            )?,
        }
        for (index, Faster { below_mbit, kind }) in self.faster.iter().enumerate() {
            let be = if index == 0 { " would be faster" } else { "" };
            let joint = if index == 0 { ";" } else { "," };
            write!(
                f,
                "{joint} over links of less than {below_mbit:.0} Mbit/s compress.kind = \"{kind}\"{be}"
            )?;
        }
        Ok(())
    }
}

/// A way to exchange gradients.
struct Way {
    kind: CompressKind,
    bytes: f64,
    /// Seconds that encoding and decoding take in a step.
    coding: f64,
}

impl Way {
    /// Seconds of a step over links of `mbit`.
    fn step(&self, compute: f64, mbit: f64) -> f64 {
        let sending = self.bytes * 8.0 / (mbit * 1e6);
        compute + self.coding + (sending - BACKWARD * compute).max(0.0)
    }
}

/// Where another way becomes the fastest as links become slower. The first of `ways` is that of the plan.
fn changes(ways: &[Way], compute: f64) -> Vec<Faster> {
    let fastest = |mbit: f64| {
        let step = |way: &&Way| way.step(compute, mbit);
        ways.iter().min_by(|a, b| step(a).total_cmp(&step(b))).map(|way| way.kind)
    };
    let (mut mbit, mut best, mut found) = (FASTEST_LINK, CompressKind::None, vec![]);
    while mbit > SLOWEST_LINK {
        if let Some(kind) = fastest(mbit).filter(|kind| *kind != best) {
            found.push(Faster { below_mbit: mbit, kind });
            best = kind;
        }
        mbit *= FINER;
    }
    found
}

/// Bytes that rank 0 sends to other workers in a step.
fn bytes(config: &Config, plan: &Plan, vocab: usize) -> Result<f64, PlanError> {
    let outline = Outline::new(config, plan, vocab, 0)?;
    let others = [Axis::Data.name(), Axis::Replica.name(), SERVERS];
    let between = |over: &str| over.split(',').any(|axis| others.contains(&axis));
    let all = outline.collectives();
    let sent = all.iter().filter(|one| one.purpose != Purpose::Control && between(&one.over));
    Ok(sent.map(|one| one.volume().sent as f64 / one.every as f64).sum())
}

/// How often a ring sends each number, by rank.
fn sent_each(workers: usize) -> f64 {
    2.0 * (workers.max(2) - 1) as f64 / workers.max(2) as f64
}

/// Seconds that this machine takes to encode and decode a number.
fn seconds_a_number(kind: CompressKind, rank: usize) -> f64 {
    let len = SIDE * SIDE;
    let values: Vec<f32> = (0..len).map(|index| (index as f32 * 0.37).sin()).collect();
    let mut back = vec![0.0; len];
    let seconds = match kind {
        CompressKind::Bf16 => {
            let mut bits = vec![0; len];
            least(|| {
                half::to_bf16(&values, &mut bits);
                half::from_bf16(&bits, &mut back);
            })
        }
        CompressKind::Int8 => {
            let width = blocks::Width::Eight;
            let mut codes = vec![0; width.bytes(len)];
            // Gradients and their mean are each encoded and decoded.
            2.0 * least(|| {
                blocks::encode(width, &values, 1, &mut codes);
                blocks::decode(width, &codes, 1.0, false, &mut back);
            })
        }
        _ => {
            let rank = rank.clamp(1, SIDE);
            let (mut p, mut q) = (vec![0.0; SIDE * rank], values[..SIDE * rank].to_vec());
            least(|| {
                low_rank::project(&values, SIDE, &q, &mut p);
                low_rank::orthogonalize(&mut p, rank);
                low_rank::project_back(&values, SIDE, &p, &mut q);
                low_rank::expand(&p, &q, rank, &mut back);
            })
        }
    };
    seconds / len as f64
}

/// The least seconds that `once` takes, which is the time of a core without others. The first one warms up.
fn least(mut once: impl FnMut()) -> f64 {
    let mut timed = || {
        let begun = Instant::now();
        once();
        begun.elapsed().as_secs_f64()
    };
    (0..4).map(|_| timed()).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slower_links_take_ways_with_fewer_bytes() {
        let way = |kind, bytes, coding| Way { kind, bytes, coding };
        let ways = [
            way(CompressKind::None, 1e6, 0.0),
            way(CompressKind::Bf16, 5e5, 0.001),
            way(CompressKind::Powersgd, 1e4, 0.01),
        ];
        let found = changes(&ways, 0.03);
        let kinds: Vec<CompressKind> = found.iter().map(|one| one.kind).collect();
        assert_eq!(kinds, [CompressKind::Bf16, CompressKind::Powersgd]);
        // Plain: 8 Mbit beside 20 ms of backward, and one more millisecond.
        assert!((found[0].below_mbit / (8.0 / 0.021) - 1.0).abs() < 0.04, "{found:?}");
        // In 16 bits: 4 Mbit in 20 ms and nine more.
        assert!((found[1].below_mbit / (4.0 / 0.029) - 1.0).abs() < 0.04, "{found:?}");
        assert_eq!(changes(&ways[..1], 0.03), []);
    }
}
