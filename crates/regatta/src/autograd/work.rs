//! The cost of operations and the time that they took, for the profile of a step.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// What an operation costs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written, each input and output once.
    pub bytes: f64,
}

/// An operation and its cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// The name of the operation.
    pub(crate) name: &'static str,
    /// The cost of its forward pass.
    pub(crate) forward: Cost,
    /// The cost of its backward pass.
    pub(crate) backward: Cost,
}

/// A part of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// From the batch to the loss.
    Forward,
    /// From the loss to the gradients.
    Backward,
    /// Everything else: the communication of gradients, the optimizer.
    Update,
}

/// One run of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// The name of the operation.
    pub name: &'static str,
    /// The part of the step that it ran in.
    pub phase: Phase,
    /// When it began.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
    /// What it cost.
    pub cost: Cost,
}

thread_local! {
    static RECORD: RefCell<Option<Vec<Measured>>> = const { RefCell::new(None) };
}

/// Runs `body` and returns its result and the measurements of every operation that this thread ran in it.
pub fn recording<R>(body: impl FnOnce() -> R) -> (R, Vec<Measured>) {
    RECORD.set(Some(vec![]));
    let result = body();
    (result, RECORD.take().unwrap_or_default())
}

/// Runs `body` and measures it as one operation while [`recording`] runs. Must not be nested.
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

/// Runs `body`, which waits for other ranks, and measures it as an operation without cost.
pub(crate) fn waiting<R>(name: &'static str, body: impl FnOnce() -> R) -> R {
    measured(name, Phase::Update, Cost::default(), body)
}

impl Work {
    /// An operation whose backward pass costs as much as its forward pass.
    pub(crate) fn new(name: &'static str, flops: f64, bytes: f64) -> Self {
        let cost = Cost { flops, bytes };
        Self { name, forward: cost, backward: cost }
    }

    /// An operation that passes its input on without computation.
    pub(crate) fn none(name: &'static str) -> Self {
        Self::new(name, 0.0, 0.0)
    }

    /// A product of an f32 `[rows, inner]` and an f32 `[inner, columns]` matrix. The backward pass is two such products.
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
