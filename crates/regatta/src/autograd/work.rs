//! What operations cost and how long they took, where somebody records it.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// What an operation does, by count.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written, each input and output once.
    pub bytes: f64,
}

/// An operation and its costs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// The operation.
    pub(crate) name: &'static str,
    /// Of forward.
    pub(crate) forward: Cost,
    /// Of backward.
    pub(crate) backward: Cost,
}

/// A part of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// From the batch to the loss.
    Forward,
    /// From the loss to the gradients.
    Backward,
    /// Everything else: gradients' communication, the optimizer.
    Update,
}

/// One run of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// The operation.
    pub name: &'static str,
    /// In which part of the step.
    pub phase: Phase,
    /// When it began.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
    /// What it did.
    pub cost: Cost,
}

thread_local! {
    static RECORD: RefCell<Option<Vec<Measured>>> = const { RefCell::new(None) };
}

/// Runs `body` and returns beside its result what every operation of this thread cost meanwhile.
pub fn recording<R>(body: impl FnOnce() -> R) -> (R, Vec<Measured>) {
    RECORD.set(Some(vec![]));
    let result = body();
    (result, RECORD.take().unwrap_or_default())
}

/// Runs `body` as one operation; not inside of another one.
pub(crate) fn measured<R>(name: &'static str, phase: Phase, cost: Cost, body: impl FnOnce() -> R) -> R {
    if RECORD.with_borrow(Option::is_none) {
        return body();
    }
    let begun = Instant::now();
    let result = body();
    let took = begun.elapsed();
    RECORD.with_borrow_mut(|record| {
        record.iter_mut().for_each(|all| all.push(Measured { name, phase, begun, took, cost }));
    });
    result
}

/// Runs `body`, which waits for other ranks.
pub(crate) fn waiting<R>(name: &'static str, body: impl FnOnce() -> R) -> R {
    measured(name, Phase::Update, Cost::default(), body)
}

impl Work {
    /// An operation whose backward costs as much as its forward.
    pub(crate) fn new(name: &'static str, flops: f64, bytes: f64) -> Self {
        let cost = Cost { flops, bytes };
        Self { name, forward: cost, backward: cost }
    }

    /// An operation that only hands on what it is given.
    pub(crate) fn none(name: &'static str) -> Self {
        Self::new(name, 0.0, 0.0)
    }

    /// A product of an `[rows, inner]` and an `[inner, columns]` matrix; backward is two of them.
    pub(crate) fn product(name: &'static str, rows: usize, inner: usize, columns: usize) -> Self {
        let (rows, inner, columns) = (rows as f64, inner as f64, columns as f64);
        let bytes = 4.0 * (rows * inner + inner * columns + rows * columns);
        let forward = Cost { flops: 2.0 * rows * inner * columns, bytes };
        Self { name, forward, backward: Cost { flops: 2.0 * forward.flops, bytes: 2.0 * forward.bytes } }
    }

    pub(super) fn forward<R>(self, body: impl FnOnce() -> R) -> R {
        measured(self.name, Phase::Forward, self.forward, body)
    }

    pub(super) fn backward<R>(self, body: impl FnOnce() -> R) -> R {
        measured(self.name, Phase::Backward, self.backward, body)
    }
}
