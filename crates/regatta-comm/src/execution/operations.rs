//! Operations from the call to the engine: arguments checked, factors before and after.

use super::engine::Core;
use super::operation::Operation;
use crate::algorithm::backend::Task;
use crate::error::Result;
use crate::member::call::Kind;
use crate::numbers::element::{DType, Element, Reduction, Typed};
use crate::numbers::kernel;
use crate::numbers::memory::{Input, Output};
use std::time::Duration;

/// How long a call that its caller waits for looks for its peers before it sleeps.
const CALLER_PATIENCE: Duration = Duration::from_micros(200);
/// The same on the communication thread, which takes the processor from the caller's computation.
const QUEUE_PATIENCE: Duration = Duration::from_micros(2);

/// A thread that carries operations out, and how long it looks for its peers before it sleeps.
#[derive(Clone, Copy)]
pub(crate) struct Caller<'a> {
    pub(crate) core: &'a Core,
    patience: Duration,
}

impl Core {
    /// As a thread of the program, which waits for the operation.
    pub(crate) fn waiting(&self) -> Caller<'_> {
        Caller { core: self, patience: CALLER_PATIENCE }
    }

    /// As the communication thread.
    pub(crate) fn queued(&self) -> Caller<'_> {
        Caller { core: self, patience: QUEUE_PATIENCE }
    }
}

impl Caller<'_> {
    /// Carries `operation` out from `input` to `output`.
    pub(crate) fn move_numbers<T: Element>(
        self,
        operation: &Operation,
        input: Option<&[T]>,
        output: Option<&mut [T]>,
    ) -> Result<()> {
        self.run(operation, T::DTYPE, input.map(Input::of), output.map(Output::of))
    }

    /// Carries `operation` out in place.
    pub(crate) fn in_place<T: Element>(self, operation: &Operation, data: &mut [T]) -> Result<()> {
        self.run(operation, T::DTYPE, None, Some(Output::of(data)))
    }

    /// Carries `operation` out on numbers of the type `dtype`.
    pub(crate) fn run(
        self,
        operation: &Operation,
        dtype: DType,
        input: Option<Input<'_>>,
        output: Option<Output<'_>>,
    ) -> Result<()> {
        let mut task = self.core.check(operation, dtype, input, output)?;
        let reduction = operation.reduction;
        if reduction.before == 1.0 && reduction.after == 1.0 {
            return self.carry_out(&mut task);
        }
        dtype.with(Scaled { caller: self, task, reduction })
    }

    /// Carries an operation out whose arguments have been checked.
    pub(crate) fn carry_out(self, task: &mut Task<'_>) -> Result<()> {
        let (rank, size) = (self.core.context.rank, self.core.context.size);
        if let (Some(Input::Host(input)), Some(Output::Host(output))) = (task.input, &mut task.output) {
            // Algorithms find this rank's part of an all-gather in its place.
            if task.call.kind == Kind::AllGather || size == 1 {
                let width = task.call.dtype.bytes();
                let start = if task.call.kind == Kind::AllGather { task.parts.get(rank).start } else { 0 };
                output[start * width..][..input.len()].copy_from_slice(input);
            }
        }
        self.core.execute(task, self.patience)
    }
}

/// An operation between the factors of its reduction.
struct Scaled<'a> {
    caller: Caller<'a>,
    task: Task<'a>,
    reduction: Reduction,
}

impl Typed for Scaled<'_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let Self { caller, task, reduction: Reduction { before, after, .. } } = self;
        let keeps = task.call.kind == Kind::Reduce && task.call.root as usize != caller.core.context.rank;
        let scale = |data: &mut [T], factor: f64| {
            if factor != 1.0 {
                kernel::scale(data, factor);
            }
        };
        let mut own;
        let mut task: Task<'_> = task;
        match (task.input, &mut task.output) {
            _ if before == 1.0 => {}
            (Some(input), _) => {
                own = input.host::<T>()?.to_vec();
                scale(&mut own, before);
                task = Task { input: Some(Input::of(&own)), ..task };
            }
            (None, Some(data)) if keeps => {
                own = data.host::<T>()?.to_vec();
                scale(&mut own, before);
                task = Task { output: Some(Output::of(&mut own)), ..task };
            }
            (None, Some(data)) => scale(data.host::<T>()?, before),
            (None, None) => {}
        }
        caller.carry_out(&mut task)?;
        match &mut task.output {
            Some(result) if !keeps => scale(result.host::<T>()?, after),
            _ => {}
        }
        Ok(())
    }
}
