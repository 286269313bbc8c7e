//! MPI's own collective operations, the nonblocking ones, so that a rank that is dead or elsewhere is noticed.
//!
//! MPI works on copies, a step of limited size after the other and two at a time: an operation that fails cannot be
//! taken back from MPI, which then keeps the copies, while the caller's memory goes back to the caller. 16-bit floats
//! are widened in the copies, so they are summed in f32 as everywhere.

use super::library::{Library, Loan, datatype};
use super::{Comm, look};
use crate::algorithm::session::Session;
use crate::error::{Error, Result};
use crate::member::call::Call;
use crate::member::context::Context;
use crate::member::health::SLICE;
use crate::member::wait::Wait;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;
use crate::transport::patience::Patience;
use ::mpi::ffi;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Bytes of a step on the larger side, for each rank of the group: MPI divides a large operation among the ranks.
const STEP: usize = 128 << 10;
/// Bytes of a step at most.
const LONGEST_STEP: usize = 4 << 20;
/// Steps at a time: one is copied while the other is under way.
const DEPTH: usize = 2;
/// How long to go on without sleeping once all ranks are in the operation: it gets on only while MPI is called.
const FLOW: Duration = Duration::from_millis(2);

/// A group's collective operations.
pub(crate) struct Native {
    pub(super) comm: Comm,
    pub(super) patience: Patience,
    /// An operation has failed.
    pub(super) broken: bool,
    spare: Vec<Memory>,
}

/// What MPI reads, and what it writes.
#[derive(Default)]
struct Memory {
    from: Vec<u64>,
    into: Vec<u64>,
}

/// The first `len` numbers of `memory`, which grows.
fn view<T: Element>(memory: &mut Vec<u64>, len: usize) -> &mut [T] {
    let words = (len * size_of::<T>()).div_ceil(size_of::<u64>());
    if memory.len() < words {
        memory.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(memory)[..len]
}

/// The arguments of a collective operation that MPI is handed.
struct Start<'a> {
    from: *const c_void,
    into: *mut c_void,
    /// Elements of each rank in this step.
    count: c_int,
    comm: ffi::MPI_Comm,
    request: &'a mut ffi::MPI_Request,
}

/// Begins an operation in which MPI reads and writes `memory`.
fn begin(
    comm: &Comm,
    call: Call,
    count: usize,
    memory: Memory,
    start: impl FnOnce(Start<'_>) -> c_int,
) -> Result<Loan<Memory>> {
    Loan::new(comm.library, format_args!("begin {call} in MPI"), memory, |memory, request| {
        let (from, into) = (memory.from.as_ptr().cast(), memory.into.as_mut_ptr().cast());
        start(Start { from, into, count: count as c_int, comm: comm.handle, request })
    })
}

impl Native {
    pub(super) fn new(comm: Comm, ranks: usize) -> Self {
        Self { comm, patience: Patience::new(ranks), broken: false, spare: vec![] }
    }

    fn library(&self) -> &'static Library {
        self.comm.library
    }

    /// Waits for MPI to be done; `flowing`: all ranks are in the operation.
    fn finish(
        &mut self,
        context: &Context,
        call: Call,
        wait: &mut Wait<'_>,
        mut loan: Loan<Memory>,
        flowing: bool,
    ) -> Result<Memory> {
        let begun = Instant::now();
        let mut outcome = Ok(None);
        while flowing && begun.elapsed() < FLOW {
            outcome = loan.reclaim(self.library());
            if !matches!(outcome, Ok(None)) {
                break;
            }
            std::thread::yield_now();
        }
        while matches!(outcome, Ok(None)) {
            let library = self.library();
            let done = look(&self.patience, SLICE, || {
                outcome = loan.reclaim(library);
                !matches!(outcome, Ok(None))
            });
            if !done {
                // Whoever waits says so, and the chain of those who wait for their neighbours ends at the rank that is late.
                wait.check((context.rank + 1) % context.size, call)?;
            }
        }
        match outcome {
            Ok(Some(memory)) => {
                wait.progress();
                Ok(memory)
            }
            Ok(None) => Err(Error::Internal("a wait for MPI ended before its time".into())),
            Err(error) => Err(context.health.verdict(error)),
        }
    }

    /// Makes sure that all ranks make the same call: MPI itself would hang or write where it should not.
    fn agree(&mut self, context: &Context, call: Call, wait: &mut Wait<'_>) -> Result<()> {
        let words = call.encode();
        let mut memory = self.spare.pop().unwrap_or_default();
        // A bit that all have, or that none has, is the same in the conjunction of all words or of all complements.
        let both: [u64; 8] = std::array::from_fn(|index| match index {
            0..4 => words[index],
            _ => !words[index - 4],
        });
        view::<i64>(&mut memory.from, both.len()).copy_from_slice(bytemuck::cast_slice(&both));
        view::<i64>(&mut memory.into, both.len());
        let loan =
            begin(&self.comm, call, both.len(), memory, |Start { from, into, count, comm, request }| {
                // SAFETY: both sides have `count` words, which the loan keeps until the request is done.
                unsafe {
                    let (words, and) = (ffi::RSMPI_UINT64_T, ffi::RSMPI_BAND);
                    ffi::MPI_Iallreduce(from, into, count, words, and, comm, request)
                }
            })?;
        let mut memory = self.finish(context, call, wait, loan, false)?;
        if memory.into[..both.len()] == both {
            self.spare.push(memory);
            return Ok(());
        }
        // All see that, and tell each other.
        let size = context.size;
        view::<i64>(&mut memory.into, words.len() * size);
        let loan =
            begin(&self.comm, call, words.len(), memory, |Start { from, into, count, comm, request }| {
                // SAFETY: there are `count` words, and room for as many of each rank, which the loan keeps.
                unsafe {
                    let words = ffi::RSMPI_UINT64_T;
                    ffi::MPI_Iallgather(from, count, words, into, count, words, comm, request)
                }
            })?;
        let memory = self.finish(context, call, wait, loan, true)?;
        let theirs = memory.into[..words.len() * size].chunks_exact(words.len());
        let other = theirs.enumerate().find(|(_, theirs)| *theirs != words);
        Err(match other {
            Some((peer, theirs)) => {
                let mut words = words;
                words.copy_from_slice(theirs);
                context.mismatch(call, peer, Call::decode(words))
            }
            None => Error::Internal(format!("MPI has garbled {call}")),
        })
    }
}

/// Carries out an operation on `len` elements of each rank, after all have agreed on it, in steps of `chunk`: `fill`
/// copies what MPI reads, `start` hands it over, and `take` copies what MPI has written.
fn carry_out<D>(
    session: &mut Session<'_>,
    (len, chunk): (usize, usize),
    mut data: D,
    fill: impl Fn(&D, Range<usize>, &mut Memory),
    start: impl Fn(Start<'_>) -> c_int,
    take: impl Fn(&mut D, Range<usize>, &mut Memory),
) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let native = session.transport.native();
    let native =
        native.ok_or_else(|| Error::Internal("the native algorithm has no MPI beneath it".into()))?;
    let mut operation = || {
        let mut wait = Wait::new(context);
        native.agree(context, call, &mut wait)?;
        let mut flying: VecDeque<(Range<usize>, Loan<Memory>)> = VecDeque::with_capacity(DEPTH);
        let mut next = 0;
        loop {
            while next < len && flying.len() < DEPTH {
                let step = next..len.min(next + chunk);
                next = step.end;
                let mut memory = native.spare.pop().unwrap_or_default();
                fill(&data, step.clone(), &mut memory);
                let loan = begin(&native.comm, call, step.len(), memory, &start);
                flying.push_back((step, loan.map_err(|error| context.health.verdict(error))?));
            }
            let Some((step, loan)) = flying.pop_front() else { return Ok(()) };
            let mut memory = native.finish(context, call, &mut wait, loan, true)?;
            take(&mut data, step, &mut memory);
            native.spare.push(memory);
        }
    };
    let outcome: Result<()> = operation();
    native.broken |= outcome.is_err();
    outcome
}

/// Elements of a step that each of `ranks` ranks has.
fn chunk<T>(ranks: usize) -> usize {
    (STEP * ranks).min(LONGEST_STEP) / size_of::<T>()
}

/// Elements of each block in a step in which each of `ranks` ranks has as many blocks.
fn block<T>(ranks: usize) -> usize {
    (chunk::<T>(ranks) / ranks).max(1)
}

/// The library that is beneath the session.
fn library(session: &mut Session<'_>) -> Result<&'static Library> {
    let native = session.transport.native().map(|native| native.library());
    native.ok_or_else(|| Error::Internal("the native algorithm has no MPI beneath it".into()))
}

/// Leaves what MPI has reduced in `into`.
fn conclude<T: Element>(into: &mut [T], memory: &mut Memory, op: ReduceOp, ranks: usize) {
    let wide = view::<T::Wide>(&mut memory.into, into.len());
    if op == ReduceOp::Mean {
        kernel::divide(wide, ranks);
    }
    kernel::narrow(into, wide);
}

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let (op, ranks) = (session.call.op, session.context.size);
    let dtype = datatype(T::Wide::DTYPE)?;
    let reduction = library(session)?.op(op, T::Wide::DTYPE)?;
    carry_out(
        session,
        (data.len(), chunk::<T::Wide>(ranks)),
        data,
        |data, step, memory| {
            kernel::widen(view::<T::Wide>(&mut memory.from, step.len()), &data[step.clone()]);
            view::<T::Wide>(&mut memory.into, step.len());
        },
        |Start { from, into, count, comm, request }| {
            // SAFETY: `fill` has made both sides `count` numbers long, and the loan keeps them.
            unsafe { ffi::MPI_Iallreduce(from, into, count, dtype, reduction, comm, request) }
        },
        |data, step, memory| conclude(&mut data[step], memory, op, ranks),
    )
}

/// Leaves the reduction of all ranks' `data` in that of the call's root; the others keep theirs.
pub(crate) fn reduce<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let (op, root, ranks) = (session.call.op, session.call.root as c_int, session.context.size);
    let at_root = session.call.root as usize == session.context.rank;
    let dtype = datatype(T::Wide::DTYPE)?;
    let reduction = library(session)?.op(op, T::Wide::DTYPE)?;
    carry_out(
        session,
        (data.len(), chunk::<T::Wide>(ranks)),
        data,
        |data, step, memory| {
            kernel::widen(view::<T::Wide>(&mut memory.from, step.len()), &data[step.clone()]);
            view::<T::Wide>(&mut memory.into, step.len());
        },
        |Start { from, into, count, comm, request }| {
            // SAFETY: `fill` has made both sides `count` numbers long, and the loan keeps them.
            unsafe { ffi::MPI_Ireduce(from, into, count, dtype, reduction, root, comm, request) }
        },
        |data, step, memory| {
            if at_root {
                conclude(&mut data[step], memory, op, ranks);
            }
        },
    )
}

/// Leaves the reduction of everyone's `rank`-th part of `input`, all equally long, in `output`.
pub(crate) fn reduce_scatter<T: Element>(
    session: &mut Session<'_>,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (op, ranks, len) = (session.call.op, session.context.size, output.len());
    let dtype = datatype(T::Wide::DTYPE)?;
    let reduction = library(session)?.op(op, T::Wide::DTYPE)?;
    carry_out(
        session,
        (len, block::<T::Wide>(ranks)),
        output,
        |_, step, memory| {
            let wide = view::<T::Wide>(&mut memory.from, ranks * step.len());
            for (wide, part) in wide.chunks_exact_mut(step.len()).zip(input.chunks_exact(len)) {
                kernel::widen(wide, &part[step.clone()]);
            }
            view::<T::Wide>(&mut memory.into, step.len());
        },
        |Start { from, into, count, comm, request }| {
            // SAFETY: `fill` has given every rank's block and the result `count` numbers, and the loan keeps them.
            unsafe { ffi::MPI_Ireduce_scatter_block(from, into, count, dtype, reduction, comm, request) }
        },
        |output, step, memory| conclude(&mut output[step], memory, op, ranks),
    )
}

/// Gathers everyone's part, all equally long, into everyone's `output`, where this rank's own part already is.
pub(crate) fn all_gather<T: Element>(session: &mut Session<'_>, output: &mut [T]) -> Result<()> {
    let (rank, ranks) = (session.context.rank, session.context.size);
    let len = output.len() / ranks;
    let width = size_of::<T>() as c_int;
    carry_out(
        session,
        (len, block::<T>(ranks)),
        output,
        |output, step, memory| {
            let own = &output[rank * len..][step.clone()];
            view::<T>(&mut memory.from, step.len()).copy_from_slice(own);
            view::<T>(&mut memory.into, ranks * step.len());
        },
        |Start { from, into, count, comm, request }| {
            // SAFETY: `fill` has made room for `count` numbers of each rank, and the loan keeps it.
            unsafe {
                let bytes = ffi::RSMPI_UINT8_T;
                ffi::MPI_Iallgather(from, count * width, bytes, into, count * width, bytes, comm, request)
            }
        },
        |output, step, memory| {
            let all = view::<T>(&mut memory.into, ranks * step.len());
            for (part, theirs) in output.chunks_exact_mut(len).zip(all.chunks_exact(step.len())) {
                part[step.clone()].copy_from_slice(theirs);
            }
        },
    )
}

/// Copies `data` of the call's root to everyone.
pub(crate) fn broadcast<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let (root, ranks) = (session.call.root as c_int, session.context.size);
    let at_root = session.call.root as usize == session.context.rank;
    let width = size_of::<T>() as c_int;
    carry_out(
        session,
        (data.len(), chunk::<T>(ranks)),
        data,
        |data, step, memory| {
            let copy = view::<T>(&mut memory.into, step.len());
            if at_root {
                copy.copy_from_slice(&data[step]);
            }
        },
        |Start { into, count, comm, request, .. }| {
            // SAFETY: `fill` has made room for `count` numbers, and the loan keeps it.
            unsafe { ffi::MPI_Ibcast(into, count * width, ffi::RSMPI_UINT8_T, root, comm, request) }
        },
        |data, step, memory| {
            if !at_root {
                data[step.clone()].copy_from_slice(view(&mut memory.into, step.len()));
            }
        },
    )
}

/// The part of everyone's `input` that is for this rank, into its parts of `output`; all are `len` long.
pub(crate) fn all_to_all<T: Element>(
    session: &mut Session<'_>,
    len: usize,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let ranks = session.context.size;
    let width = size_of::<T>() as c_int;
    carry_out(
        session,
        (len, block::<T>(ranks)),
        output,
        |_, step, memory| {
            let from = view::<T>(&mut memory.from, ranks * step.len());
            for (copy, part) in from.chunks_exact_mut(step.len()).zip(input.chunks_exact(len)) {
                copy.copy_from_slice(&part[step.clone()]);
            }
            view::<T>(&mut memory.into, ranks * step.len());
        },
        |Start { from, into, count, comm, request }| {
            // SAFETY: `fill` has given both sides `count` numbers for each rank, and the loan keeps them.
            unsafe {
                let bytes = ffi::RSMPI_UINT8_T;
                ffi::MPI_Ialltoall(from, count * width, bytes, into, count * width, bytes, comm, request)
            }
        },
        |output, step, memory| {
            let all = view::<T>(&mut memory.into, ranks * step.len());
            for (part, theirs) in output.chunks_exact_mut(len).zip(all.chunks_exact(step.len())) {
                part[step.clone()].copy_from_slice(theirs);
            }
        },
    )
}

/// Returns when all ranks have called it: that is what agreeing takes.
pub(crate) fn barrier(session: &mut Session<'_>) -> Result<()> {
    let nothing = |_: Start<'_>| 0;
    carry_out(session, (0, 1), (), |_, _, _| {}, nothing, |_, _, _| {})
}
