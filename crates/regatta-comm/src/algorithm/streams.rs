//! The operations over streams of bytes: prepares the numbers, and executes the schedule of the chosen algorithm.
//!
//! 16-bit floats are summed in f32 all the way and rounded once in the end, and for a mean integers are summed in a type
//! in which no sum wraps around. Where that pays, each rank sends its numbers as they are to the [owner](super::owners) of each
//! part; elsewhere partial sums travel, and in the wider type.

use super::owners::Owners;
use super::parts::Parts;
use super::run::{Numbers, run_with};
use super::schedule::part;
use super::session::with_wider;
use super::{
    Algorithm, adasum, bruck, dissemination, doubling, halving_doubling, linear, pairwise, ring, tree,
};
use crate::algorithm::session::Session;
use crate::error::Result;
use crate::member::call::Call;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;
use std::ops::Range;

/// Whether partial results of `op` would be rounded in `T`.
fn rounds<T: Element>(op: ReduceOp) -> bool {
    size_of::<T>() != size_of::<T::Wide>()
        && matches!(op, ReduceOp::Sum | ReduceOp::Mean | ReduceOp::Product | ReduceOp::Adasum)
}

/// Whether sums for a mean need more room than `T` has.
pub(crate) fn outgrows<T: Element>(op: ReduceOp) -> bool {
    size_of::<T>() != size_of::<T::Exact>() && op == ReduceOp::Mean
}

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    data: &mut [T],
) -> Result<()> {
    let (len, size) = (data.len(), session.context.size);
    all_reduce_segments(session, algorithm, &|index| part(len, size, index), data)
}

/// As [`all_reduce`], where a ring goes around with these segments of `data`, one for each rank.
pub(crate) fn all_reduce_segments<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    segment: &dyn Fn(usize) -> Range<usize>,
    data: &mut [T],
) -> Result<()> {
    let (op, size, bytes) = (session.call.op, session.context.size, size_of_val(data));
    if outgrows::<T>(op) {
        let widths = (kernel::to_exact::<T> as _, kernel::from_exact::<T> as _);
        if let Some(owners) = Owners::<T, T::Exact>::instead_of(algorithm, size, bytes, widths) {
            return owners.all_reduce(session, segment, data);
        }
        return with_wider::<T::Exact>(session, data.len(), |session, exact| {
            kernel::to_exact(exact, data);
            let outcome = all_reduce_exactly(session, algorithm, segment, exact);
            kernel::from_exact(data, exact);
            outcome
        });
    }
    if rounds::<T>(op) {
        let widths = (kernel::widen::<T> as _, kernel::narrow::<T> as _);
        if op != ReduceOp::Adasum
            && let Some(owners) = Owners::<T, T::Wide>::instead_of(algorithm, size, bytes, widths)
        {
            return owners.all_reduce(session, segment, data);
        }
        return with_wider::<T::Wide>(session, data.len(), |session, wide| {
            kernel::widen(wide, data);
            let outcome = all_reduce_exactly(session, algorithm, segment, wide);
            kernel::narrow(data, wide);
            outcome
        });
    }
    all_reduce_exactly(session, algorithm, segment, data)
}

fn all_reduce_exactly<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    segment: &dyn Fn(usize) -> Range<usize>,
    data: &mut [T],
) -> Result<()> {
    if session.call.op == ReduceOp::Adasum {
        return adasum::all_reduce(session, data);
    }
    let block = session.place::<T>().chunk * halving_doubling::BLOCK;
    if algorithm == Algorithm::HalvingDoubling && data.len() > block {
        return data.chunks_mut(block).try_for_each(|data| {
            let (len, size) = (data.len(), session.context.size);
            all_reduce_at_once(session, algorithm, &|index| part(len, size, index), data)
        });
    }
    all_reduce_at_once(session, algorithm, segment, data)
}

fn all_reduce_at_once<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    segment: &dyn Fn(usize) -> Range<usize>,
    data: &mut [T],
) -> Result<()> {
    let (place, len) = (session.place::<T>(), data.len());
    let schedule = match algorithm {
        Algorithm::Tree => tree::all_reduce(place, len),
        Algorithm::HalvingDoubling => halving_doubling::all_reduce(place, segment),
        Algorithm::Doubling => doubling::all_reduce(place, len),
        _ => ring::all_reduce(place, segment),
    };
    session.run(&schedule, Numbers { input: &[], working: data })
}

/// Leaves the reduction of all ranks' `data` in that of the call's root; the others keep theirs.
pub(crate) fn reduce<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    data: &mut [T],
) -> Result<()> {
    let (op, at_root) = (session.call.op, session.call.root as usize == session.context.rank);
    if outgrows::<T>(op) {
        return with_wider::<T::Exact>(session, data.len(), |session, exact| {
            kernel::to_exact(exact, data);
            let outcome = reduce_exactly(session, algorithm, exact);
            if at_root {
                kernel::from_exact(data, exact);
            }
            outcome
        });
    }
    if rounds::<T>(op) {
        return with_wider::<T::Wide>(session, data.len(), |session, wide| {
            kernel::widen(wide, data);
            let outcome = reduce_exactly(session, algorithm, wide);
            if at_root {
                kernel::narrow(data, wide);
            }
            outcome
        });
    }
    if at_root {
        return reduce_exactly(session, algorithm, data);
    }
    with_wider::<T>(session, data.len(), |session, partial| {
        partial.copy_from_slice(data);
        reduce_exactly(session, algorithm, partial)
    })
}

fn reduce_exactly<T: Element>(session: &mut Session<'_>, algorithm: Algorithm, data: &mut [T]) -> Result<()> {
    let (place, root) = (session.place::<T>(), session.call.root as usize);
    let schedule = match algorithm {
        Algorithm::Ring => ring::reduce(place, root, data.len()),
        _ => tree::reduce(place, root, data.len()),
    };
    session.run(&schedule, Numbers { input: &[], working: data })
}

/// Leaves the reduction of everyone's `rank`-th part of `input` in `output`.
pub(crate) fn reduce_scatter<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    parts: &Parts,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (op, own) = (session.call.op, parts.get(session.context.rank));
    let (size, bytes) = (session.context.size, size_of_val(input));
    if outgrows::<T>(op) {
        let widths = (kernel::to_exact::<T> as _, kernel::from_exact::<T> as _);
        if let Some(owners) = Owners::<T, T::Exact>::instead_of(algorithm, size, bytes, widths) {
            return owners.reduce_scatter(session, parts, input, output);
        }
        return with_wider::<T::Exact>(session, input.len(), |session, exact| {
            kernel::to_exact(exact, input);
            let outcome = reduce_scatter_exactly(session, algorithm, parts, exact);
            kernel::from_exact(output, &exact[own]);
            outcome
        });
    }
    if rounds::<T>(op) {
        let widths = (kernel::widen::<T> as _, kernel::narrow::<T> as _);
        if let Some(owners) = Owners::<T, T::Wide>::instead_of(algorithm, size, bytes, widths) {
            return owners.reduce_scatter(session, parts, input, output);
        }
        return with_wider::<T::Wide>(session, input.len(), |session, wide| {
            kernel::widen(wide, input);
            let outcome = reduce_scatter_exactly(session, algorithm, parts, wide);
            kernel::narrow(output, &wide[own]);
            outcome
        });
    }
    with_wider::<T>(session, input.len(), |session, sums| {
        sums.copy_from_slice(input);
        let outcome = reduce_scatter_exactly(session, algorithm, parts, sums);
        output.copy_from_slice(&sums[own]);
        outcome
    })
}

fn reduce_scatter_exactly<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    parts: &Parts,
    sums: &mut [T],
) -> Result<()> {
    let place = session.place::<T>();
    let segment = |index| parts.get(index);
    let schedule = match algorithm {
        Algorithm::HalvingDoubling => halving_doubling::reduce_scatter(place, &segment),
        _ => ring::reduce_scatter(place, &segment),
    };
    session.run(&schedule, Numbers { input: &[], working: sums })
}

/// Gathers everyone's part into everyone's `output`, where this rank's own part already is.
pub(crate) fn all_gather<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    parts: &Parts,
    output: &mut [T],
) -> Result<()> {
    let place = session.place::<T>();
    let segment = |index| parts.get(index);
    let schedule = match algorithm {
        Algorithm::HalvingDoubling => halving_doubling::all_gather(place, &segment),
        _ => ring::all_gather(place, &segment),
    };
    session.run(&schedule, Numbers { input: &[], working: output })
}

/// Copies `data` of rank `root` to everyone.
pub(crate) fn broadcast<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    root: usize,
    data: &mut [T],
) -> Result<()> {
    let place = session.place::<T>();
    let schedule = match algorithm {
        Algorithm::Ring => ring::broadcast(place, root, data.len()),
        _ => tree::broadcast(place, root, data.len()),
    };
    session.run(&schedule, Numbers { input: &[], working: data })
}

/// Gathers everyone's `input` into the parts of the root's `output`.
pub(crate) fn gather<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (place, root) = (session.place::<T>(), session.call.root as usize);
    if place.rank == root {
        output[parts.get(root)].copy_from_slice(input);
    }
    let schedule = linear::gather(place, root, 0..input.len(), &|index| parts.get(index));
    session.run(&schedule, Numbers { input, working: output })
}

/// Copies the parts of the root's `input` to everyone's `output`.
pub(crate) fn scatter<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (place, root) = (session.place::<T>(), session.call.root as usize);
    if place.rank == root {
        output.copy_from_slice(&input[parts.get(root)]);
    }
    let schedule = linear::scatter(place, root, 0..output.len(), &|index| parts.get(index));
    session.run(&schedule, Numbers { input, working: output })
}

/// The part of everyone's `input` that is for this rank, into its parts of `output`.
pub(crate) fn all_to_all<T: Element>(
    session: &mut Session<'_>,
    algorithm: Algorithm,
    (sent, received): (&Parts, &Parts),
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let place = session.place::<T>();
    if algorithm == Algorithm::Bruck {
        return bruck::all_to_all(session, sent.longest(), input, output);
    }
    output[received.get(place.rank)].copy_from_slice(&input[sent.get(place.rank)]);
    let schedule = pairwise::all_to_all(place, &|index| sent.get(index), &|index| received.get(index));
    // Each pair of ranks agrees on its own length.
    let call = session.call;
    let calls = |peer| {
        let of = |parts: &Parts| Call { len: parts.get(peer).len() as u64, ..call };
        (of(sent), of(received))
    };
    let numbers = Numbers { input, working: output };
    run_with(session, &schedule, numbers, &calls)
}

/// Returns when all ranks have called it.
pub(crate) fn barrier(session: &mut Session<'_>) -> Result<()> {
    let schedule = dissemination::barrier(session.place::<u8>());
    session.run::<u8>(&schedule, Numbers { input: &[], working: &mut [] })
}
