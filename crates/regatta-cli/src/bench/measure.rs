//! Times one operation on one rank.

use super::op::{Op, Sides};
use crate::error::Result;
use clap::ValueEnum;
use regatta_comm::{Buffer, DType, Element, Group, ReduceOp, bf16, f16};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Calls before the first that counts.
const WARM: usize = 3;
/// From here on, the memory bound is measured.
const BOUND_FROM: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// Ordinary memory of each rank.
    Private,
    /// Memory from the group that the transport reduces in place, as gradient buckets are.
    Registered,
}

/// How everything is measured.
#[derive(Clone, Copy)]
pub struct Manner {
    pub dtype: DType,
    pub memory: MemoryKind,
    /// Whether ranks wait for each other before each call: the slowest rank's time is then that of the whole.
    pub together: bool,
}

/// What was measured; times in seconds.
pub struct Sample {
    pub elements: usize,
    /// Median and least on this rank.
    pub median: f64,
    pub least: f64,
    /// Median on the slowest rank.
    pub slowest: f64,
    /// Numbers that are not what they must be, on all ranks.
    pub errors: u64,
}

/// Measures `op` with `bytes` of data on the larger side of a rank. All ranks call it.
pub fn sample(manner: Manner, op: Op, group: &Group, bytes: usize) -> Result<Sample> {
    match manner.dtype {
        DType::F32 => sample_of::<f32>(manner, op, group, bytes),
        DType::F64 => sample_of::<f64>(manner, op, group, bytes),
        DType::F16 => sample_of::<f16>(manner, op, group, bytes),
        DType::BF16 => sample_of::<bf16>(manner, op, group, bytes),
        DType::I32 => sample_of::<i32>(manner, op, group, bytes),
        other => Err(format!("{other} is not measured; use f32, f16, bf16, f64 or i32").into()),
    }
}

fn sample_of<T: Element>(manner: Manner, op: Op, group: &Group, bytes: usize) -> Result<Sample> {
    let n = group.size();
    let elements = op.elements(bytes / size_of::<T>(), n);
    let mut whole = match manner.memory {
        MemoryKind::Registered => group.buffer::<T>(elements)?,
        MemoryKind::Private => Buffer::from(vec![T::from_f64(1.0); elements]),
    };
    let mut part = vec![T::from_f64(1.0); if op.in_parts() { elements / n } else { 0 }];
    let mut other = vec![T::zeroed(); if op == Op::AllToAll { elements } else { 0 }];
    let mut sides = Sides { whole: &mut whole, part: &mut part, other: &mut other };
    sides.fill(group.rank());
    sides.run(op, group)?;
    let wrong = sides.wrong(op, group.rank(), n) as u64;
    let mut times = vec![];
    for call in 0..calls(bytes) + WARM {
        // The same numbers each time: sums must not grow to infinity.
        sides.whole.iter_mut().take(16).for_each(|x| *x = T::from_f64(1.0));
        if call == WARM || manner.together {
            group.barrier()?;
        }
        let begun = Instant::now();
        sides.run(op, group)?;
        if call >= WARM {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    let median = median(&mut times);
    let mut all = vec![0.0; 2 * n];
    group.all_gather(&[median, wrong as f64], &mut all)?;
    Ok(Sample {
        elements,
        median,
        least: times[0],
        slowest: all.iter().step_by(2).copied().fold(0.0, f64::max),
        errors: all.iter().skip(1).step_by(2).sum::<f64>() as u64,
    })
}

/// What memory allows for `bytes` on each rank, where that is the limit: the median seconds of an in-place `x *= c`,
/// which reads and writes all of them once, by all ranks at once.
pub fn memory_bound(group: &Group, bytes: usize) -> Result<Option<f64>> {
    if bytes < BOUND_FROM {
        return Ok(None);
    }
    // A group of one does nothing else, with the widest vectors there are.
    let alone = Group::solo();
    let mut data = vec![1.0f64; bytes / size_of::<f64>()];
    let mut times = vec![];
    for call in 0..calls(bytes) + WARM {
        group.barrier()?;
        let begun = Instant::now();
        alone.all_reduce(&mut data, ReduceOp::Sum.scaled_after(1.000_000_1))?;
        if call >= WARM {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(Some(median(&mut times)))
}

/// Calls that are timed: as many as move 64 MiB.
fn calls(bytes: usize) -> usize {
    ((64 << 20) / bytes.max(1)).clamp(5, 400)
}

/// The upper median; 0 of nothing. Leaves them sorted.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
