//! Times one operation on one rank.

use super::op::{Buffers, Op};
use crate::error::Result;
use clap::ValueEnum;
use regatta_comm::{Buffer, DType, Element, Group, ReduceOp, bf16, f16};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Calls before the first that is timed.
const WARM_UP_CALLS: usize = 3;
/// The memory bound is measured from this many bytes on.
const BOUND_FROM: usize = 1 << 20;
/// Bytes that all timed calls together move.
const TIMED_BYTES: usize = 64 << 20;
/// Least and most calls that are timed.
const TIMED_CALLS: [usize; 2] = [5, 400];
/// Elements of the larger side that are set to 1 again before each call.
const RESET_ELEMENTS: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// Ordinary memory of each rank.
    Private,
    /// Memory from the group that the transport reduces in place, as gradient buckets are.
    Registered,
}

/// How operations are measured.
#[derive(Clone, Copy)]
pub struct Method {
    pub dtype: DType,
    pub memory: MemoryKind,
    /// Whether ranks wait for each other before each call: the time of the slowest rank is then that of the operation.
    pub together: bool,
}

/// What was measured; times in seconds.
pub struct Sample {
    pub elements: usize,
    /// Median and minimum on this rank.
    pub median: f64,
    pub minimum: f64,
    /// Median on the slowest rank.
    pub slowest: f64,
    /// Wrong numbers in the results of all ranks.
    pub errors: u64,
}

/// Measures `op` with `bytes` of data on the larger side of a rank. All ranks must call it.
pub fn sample(method: Method, op: Op, group: &Group, bytes: usize) -> Result<Sample> {
    match method.dtype {
        DType::F32 => sample_of::<f32>(method, op, group, bytes),
        DType::F64 => sample_of::<f64>(method, op, group, bytes),
        DType::F16 => sample_of::<f16>(method, op, group, bytes),
        DType::BF16 => sample_of::<bf16>(method, op, group, bytes),
        DType::I32 => sample_of::<i32>(method, op, group, bytes),
        other => Err(format!("{other} is not measured; use f32, f16, bf16, f64 or i32").into()),
    }
}

fn sample_of<T: Element>(method: Method, op: Op, group: &Group, bytes: usize) -> Result<Sample> {
    let n = group.size();
    let elements = op.elements(bytes / size_of::<T>(), n);
    let mut whole = match method.memory {
        MemoryKind::Registered => group.buffer::<T>(elements)?,
        MemoryKind::Private => Buffer::from(vec![T::from_f64(1.0); elements]),
    };
    let mut part = vec![T::from_f64(1.0); if op.in_parts() { elements / n } else { 0 }];
    let mut other = vec![T::zeroed(); if op == Op::AllToAll { elements } else { 0 }];
    let mut buffers = Buffers { whole: &mut whole, part: &mut part, other: &mut other };
    buffers.fill(group.rank());
    buffers.run(op, group)?;
    let wrong = buffers.wrong(op, group.rank(), n) as u64;
    let mut times = vec![];
    for call in 0..calls(bytes) + WARM_UP_CALLS {
        // Sums of these elements must not grow from call to call.
        buffers.whole.iter_mut().take(RESET_ELEMENTS).for_each(|x| *x = T::from_f64(1.0));
        if call == WARM_UP_CALLS || method.together {
            group.barrier()?;
        }
        let begun = Instant::now();
        buffers.run(op, group)?;
        if call >= WARM_UP_CALLS {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    let median = median(&mut times);
    let mut all = vec![0.0; 2 * n];
    group.all_gather(&[median, wrong as f64], &mut all)?;
    Ok(Sample {
        elements,
        median,
        minimum: times[0],
        slowest: all.iter().step_by(2).copied().fold(0.0, f64::max),
        errors: all.iter().skip(1).step_by(2).sum::<f64>() as u64,
    })
}

/// The seconds that the memory's bandwidth allows for `bytes` on each rank: the median time of an in-place `x *= c`,
/// which reads and writes every byte once, on all ranks at once. `None` for small sizes, where bandwidth is not the
/// limit.
pub fn memory_bound(group: &Group, bytes: usize) -> Result<Option<f64>> {
    if bytes < BOUND_FROM {
        return Ok(None);
    }
    // In a group of one rank, the all-reduce does only that, with the widest vectors of the processor.
    let alone = Group::solo();
    let mut data = vec![1.0f64; bytes / size_of::<f64>()];
    let mut times = vec![];
    for call in 0..calls(bytes) + WARM_UP_CALLS {
        group.barrier()?;
        let begun = Instant::now();
        alone.all_reduce(&mut data, ReduceOp::Sum.scaled_after(1.000_000_1))?;
        if call >= WARM_UP_CALLS {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(Some(median(&mut times)))
}

/// How many calls are timed.
fn calls(bytes: usize) -> usize {
    (TIMED_BYTES / bytes.max(1)).clamp(TIMED_CALLS[0], TIMED_CALLS[1])
}

/// The upper median, or 0 of no values. Sorts `values`.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
