//! Uneven data: a rank that has run out takes part until all have.

use super::{CALLER_PATIENCE, Group};
use crate::algorithm::parts::Parts;
use crate::error::{Error, Result};
use crate::execution::engine::Core;
use crate::member::call::{Call, Kind};
use crate::member::notes::Invitation;
use crate::member::timer::Timer;
use crate::numbers::element::{DType, Element};
use crate::numbers::sized::filled;
use half::{bf16, f16};
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
        if notes.join(token, sequence)? == context.size as u64 {
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
        match call.dtype {
            DType::F32 => self.take_part_with::<f32>(call),
            DType::F64 => self.take_part_with::<f64>(call),
            DType::F16 => self.take_part_with::<f16>(call),
            DType::BF16 => self.take_part_with::<bf16>(call),
            DType::I32 => self.take_part_with::<i32>(call),
            DType::I64 => self.take_part_with::<i64>(call),
            DType::U8 => self.take_part_with::<u8>(call),
            DType::I8 => self.take_part_with::<i8>(call),
        }
    }

    fn take_part_with<T: Element>(&self, call: Call) -> Result<()> {
        let (rank, size) = (self.context.rank, self.context.size);
        let cannot = |why: &str| {
            Err(Error::Usage(format!(
                "rank {} has joined and cannot take part in {call}: {why}",
                self.job.rank
            )))
        };
        self.rank_exists(call.kind.name(), call.root as usize)?;
        let len = match usize::try_from(call.len) {
            Ok(len) if len.checked_mul(size * size_of::<T>()).is_some() => len,
            _ => return cannot("it is too long"),
        };
        let what = call.to_string();
        let neutral = |len: usize| filled(len, T::neutral(call.op), &what);
        let zeros = |len: usize| filled(len, T::zeroed(), &what);
        let even = Parts::even(size, len);
        let at_root = call.root as usize == rank;
        // Even operations say no counts.
        let counts = call.detail != 0;
        match call.kind {
            Kind::AllReduce => self.all_reduce_call(call, &mut neutral(len)?, CALLER_PATIENCE),
            Kind::Reduce => self.reduce_call(call, &mut neutral(len)?, CALLER_PATIENCE),
            Kind::Broadcast if at_root => cannot("it is the root and has nothing to give"),
            Kind::Broadcast => self.broadcast_call(call, &mut zeros(len)?, CALLER_PATIENCE),
            Kind::Barrier => self.barrier(CALLER_PATIENCE),
            Kind::ReduceScatter | Kind::AllGather | Kind::Gather | Kind::AllToAll if counts => {
                cannot("its counts or factors are not known here")
            }
            Kind::ReduceScatter => {
                let (input, mut output) = (neutral(len * size)?, zeros(len)?);
                self.reduce_scatter_call(call, &even, false, (&input, &mut output), CALLER_PATIENCE)
            }
            Kind::AllGather => {
                let mut output = zeros(len * size)?;
                self.all_gather_call(call, &even, false, (None, &mut output), CALLER_PATIENCE)
            }
            Kind::Gather => {
                let mut output = zeros(if at_root { len * size } else { 0 })?;
                self.gather_call(call, &even, false, (&zeros(len)?, &mut output), CALLER_PATIENCE)
            }
            Kind::Scatter if at_root || counts => cannot("it has nothing to give"),
            Kind::Scatter => self.scatter_call(call, &even, false, (&[], &mut zeros(len)?), CALLER_PATIENCE),
            Kind::AllToAll => {
                let (input, mut output) = (zeros(len * size)?, zeros(len * size)?);
                self.all_to_all_call(call, len, (&input, &mut output), CALLER_PATIENCE)
            }
            Kind::Send | Kind::Join => cannot("it is no operation of all ranks"),
        }
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
