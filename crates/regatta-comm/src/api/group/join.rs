//! Uneven data: a rank that has run out takes part until all have.

use super::Group;
use crate::error::{Error, Result};
use crate::execution::engine::Core;
use crate::execution::operation::Operation;
use crate::execution::operations::Caller;
use crate::member::call::{Call, Kind};
use crate::member::directory::Invitation;
use crate::member::timer::Timer;
use crate::numbers::element::{DType, Element, Typed};
use crate::numbers::memory::{Input, Output};
use crate::numbers::sized::filled;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long to wait for an invitation between looks at the job's health.
const LOOK: Duration = Duration::from_millis(100);

impl Group {
    /// Says that this rank has run out of data, and takes part in the operations of the others until all ranks of the
    /// group have called it: with zeros in sums (a mean is still divided by all ranks), with the neutral numbers in
    /// other reductions, with zeros where data is gathered. Returns the rank that joined last, whose state is the
    /// newest. Until then operations take longer, as each is announced through the job's store.
    ///
    /// # Errors
    /// A joined rank as the root of a broadcast or scatter, and variable-length operations, end the job; else as
    /// [`all_reduce`](Self::all_reduce).
    pub fn join(&self) -> Result<usize> {
        self.inner.queue.drain();
        let core = self.core();
        if core.context.size == 1 {
            return Ok(0);
        }
        let last = core.join().inspect_err(|error| {
            if !matches!(error, Error::Aborted { .. }) {
                core.job.abort(&error.to_string());
            }
        })?;
        let ended = self.inner.joinings.fetch_add(1, Ordering::Relaxed) + 1;
        core.context.joining.renew(core.context.notes.token(ended));
        Ok(last)
    }
}

impl Core {
    /// The rank of the group that joined last.
    fn join(&self) -> Result<usize> {
        let context = &self.context;
        let (notes, token) = (&context.notes, context.joining.token());
        let mut sequence = self.sequence();
        if notes.join(token, sequence)? == context.size {
            notes.invite(token, sequence + 1, Invitation::End { rank: context.rank })?;
            return Ok(context.rank);
        }
        let mut timer = Timer::new(self.options.deadline);
        loop {
            context.health.check()?;
            match notes.invited(token, sequence + 1, Instant::now() + LOOK)? {
                Some(Invitation::End { rank }) => return Ok(rank),
                Some(Invitation::Call(call)) => {
                    self.take_part(call)?;
                    sequence += 1;
                    timer = Timer::new(self.options.deadline);
                }
                None if !timer.is_over() => {}
                None => {
                    let joined = notes.joined(token);
                    let missing = context.names.iter().find(|rank| !joined.contains(rank));
                    let call = Call { sequence: sequence + 1, ..Call::new(Kind::Join, DType::U8, 0) };
                    return Err(Error::Deadline {
                        rank: missing.copied().unwrap_or(context.names[context.rank]),
                        call: call.to_string(),
                        waited: timer.used(),
                    });
                }
            }
        }
    }

    /// Calls the same as the others, with numbers that change nothing.
    fn take_part(&self, call: Call) -> Result<()> {
        call.dtype.with(TakePart { caller: self.waiting(), call })
    }
}

struct TakePart<'a> {
    caller: Caller<'a>,
    call: Call,
}

impl Typed for TakePart<'_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let Self { caller, call } = self;
        let (core, context) = (caller.core, &caller.core.context);
        let (rank, size) = (context.rank, context.size);
        let cannot = |why: &str| {
            Err(Error::Usage(format!(
                "rank {} has joined and cannot take part in {call}: {why}",
                core.job.rank
            )))
        };
        core.context.rank_exists(call.kind.name(), call.root as usize)?;
        let len = match usize::try_from(call.len) {
            Ok(len) if len.checked_mul(size * size_of::<T>()).is_some() => len,
            _ => return cannot("it is too long"),
        };
        let at_root = call.root as usize == rank;
        // Even operations say no counts.
        let counts = call.detail != 0;
        // Elements of the input and of the output.
        let (input, output) = match call.kind {
            Kind::AllReduce | Kind::Reduce => (None, Some(len)),
            Kind::Broadcast if at_root => return cannot("it is the root and has nothing to give"),
            Kind::Broadcast => (None, Some(len)),
            Kind::Barrier => (None, None),
            Kind::ReduceScatter | Kind::AllGather | Kind::Gather | Kind::AllToAll if counts => {
                return cannot("its counts or factors are not known here");
            }
            Kind::ReduceScatter => (Some(len * size), Some(len)),
            Kind::AllGather => (None, Some(len * size)),
            Kind::Gather => (Some(len), at_root.then_some(len * size)),
            Kind::Scatter if at_root || counts => return cannot("it has nothing to give"),
            Kind::Scatter => (None, Some(len)),
            Kind::AllToAll => (Some(len * size), Some(len * size)),
            Kind::Send | Kind::Join => return cannot("it is no operation of all ranks"),
        };
        let neutral = match call.kind {
            Kind::AllReduce | Kind::Reduce | Kind::ReduceScatter => T::neutral(call.op),
            _ => T::zeroed(),
        };
        let what = call.to_string();
        let memory = |len: Option<usize>| len.map(|len| filled(len, neutral, &what)).transpose();
        let (input, mut output) = (memory(input)?, memory(output)?);
        let operation = Operation::reducing(call.kind, call.op).rooted(call.root as usize);
        let (input, output) = (input.as_deref().map(Input::of), output.as_deref_mut().map(Output::of));
        let mut task = core.check(&operation, call.dtype, input, output)?;
        // With what the others agree on beside the numbers.
        task.call = call;
        caller.carry_out(&mut task)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_to_a_rank_that_is_not_there_is_refused() {
        let groups = Group::threads(2);
        for kind in [Kind::Reduce, Kind::Broadcast, Kind::Gather, Kind::Scatter] {
            let error = groups[0].core().take_part(Call::new(kind, DType::F32, 1).root(9)).unwrap_err();
            assert!(error.to_string().contains("no rank 9"), "{error}");
        }
    }
}
