//! Reductions over shared memory.

use super::{SMALL, Sources, clip, no_such_memory, peers};
use crate::algorithm::backend::Start;
use crate::algorithm::parts::Parts;
use crate::algorithm::schedule::part;
use crate::error::{Error, Result};
use crate::member::call::Call;
use crate::numbers::element::Element;
use crate::numbers::kernel;
use crate::transport::registered::Registered;
use crate::transport::shared::{Counter, LITTLE, PRIVATE, Shared};
use std::ops::Range;

/// Bytes reduced at a time in registered memory: stays in the first-level cache.
const BLOCK: usize = 16 << 10;
/// Bytes reduced at a time where the sum is copied at once.
const COPIED: usize = 32 << 10;
/// Ranks whose parts of a small reduction are listed on the stack.
const FEW: usize = 8;
/// Bytes from which starting threads for the lanes pays.
const WORTH_LANES: usize = 2 << 20;

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    start: &Start<'_>,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    if size_of_val(data) <= SMALL {
        return small(shared, start, call, data);
    }
    if !shared.lanes.is_empty() && size_of_val(data) >= WORTH_LANES {
        return in_lanes(shared, registered, call, data);
    }
    large(shared, registered, call, data)
}

/// In slices: each rank reduces one.
fn large<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    // One round to learn whether everyone's data is registered; every rank sees the same answer.
    let own = registered.and_then(|memory| memory.place(bytemuck::cast_slice(data))).unwrap_or(PRIVATE);
    let round = shared.begin(call)?;
    shared.stage(round, call, own);
    let mut places = vec![own; shared.size()];
    for peer in peers(shared) {
        places[peer] = shared.await_staged(peer, round, call)?;
    }
    shared.agree(round, size_of_val(data));
    match registered {
        Some(memory) if !places.contains(&PRIVATE) => in_place(shared, memory, &places, round, call, data)?,
        _ => {
            shared.publish(Counter::Done, round);
            return chunked(shared, call, None, data);
        }
    }
    shared.publish(Counter::Done, round);
    Ok(())
}

/// Each lane does a part, in a thread of its own.
fn in_lanes<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    let mut lanes = std::mem::take(&mut shared.lanes);
    let (all, len) = (lanes.len() + 1, data.len());
    let outcome = std::thread::scope(|scope| {
        let (own, mut rest) = data.split_at_mut(part(len, all, 0).len());
        let mut threads = vec![];
        for (index, lane) in lanes.iter_mut().enumerate() {
            let (piece, more) = rest.split_at_mut(part(len, all, index + 1).len());
            rest = more;
            let spawned =
                std::thread::Builder::new().spawn_scoped(scope, move || large(lane, registered, call, piece));
            threads.push(spawned.map_err(Error::system("start a thread for a lane of shared memory"))?);
        }
        let mut outcome = large(shared, registered, call, own);
        for thread in threads {
            // A panic in a lane (of the user's `on_late`, say) is one of the operation.
            let lane = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(lane);
        }
        outcome
    });
    shared.lanes = lanes;
    outcome
}

/// Every rank reduces everything.
fn small<T: Element>(shared: &mut Shared, start: &Start<'_>, call: Call, data: &mut [T]) -> Result<()> {
    let round = shared.begin(call)?;
    let bytes = size_of_val(data);
    let little = bytes <= LITTLE;
    if little {
        shared.stage_little(round, call, bytemuck::cast_slice(data));
    } else {
        shared.staging(round)[..bytes].copy_from_slice(bytemuck::cast_slice(data));
        shared.stage_soon(round, call);
    }
    start.now();
    for peer in peers(shared) {
        shared.await_staged(peer, round, call)?;
    }
    let size = shared.size();
    let part = |rank| {
        let shown =
            if little { shared.little(rank, round, bytes) } else { &shared.staged(rank, round)[..bytes] };
        bytemuck::cast_slice(shown)
    };
    combine(data, size, (0..size).map(part), call);
    shared.publish(Counter::Done, round);
    start.brief.set(!shared.has_waited());
    Ok(())
}

/// Reduces the parts of `size` ranks. Few of them are listed on the stack: memory from the heap would take a good part of
/// the time.
fn combine<'a, T: Element>(data: &mut [T], size: usize, parts: impl Iterator<Item = &'a [T]>, call: Call) {
    if size > FEW {
        return kernel::reduce(data, &parts.collect::<Vec<_>>(), call.op);
    }
    let mut few: [&[T]; FEW] = [&[]; FEW];
    for (place, part) in few.iter_mut().zip(parts) {
        *place = part;
    }
    kernel::reduce(data, &few[..size], call.op);
}

/// Leaves the reduction of all ranks' `data` in that of the call's root; the others keep theirs.
pub(crate) fn reduce<T: Element>(shared: &mut Shared, call: Call, data: &mut [T]) -> Result<()> {
    chunked(shared, call, Some(call.root as usize), data)
}

/// In chunks through the slots; for all ranks, or for one.
fn chunked<T: Element>(shared: &mut Shared, call: Call, root: Option<usize>, data: &mut [T]) -> Result<()> {
    let (rank, size) = (shared.rank(), shared.size());
    let receives = root.is_none_or(|root| root == rank);
    // What is yet to be staged.
    let mut rest = 0..data.len();
    let stage = |shared: &mut Shared, rest: &mut Range<usize>, data: &[T]| -> Result<(u32, Range<usize>)> {
        let round = shared.begin(call)?;
        let len = rest.len().min(shared.slot_bytes(round) / size_of::<T>());
        let range = rest.start..rest.start + len;
        rest.start = range.end;
        let piece = &data[range.clone()];
        let staging = bytemuck::cast_slice_mut::<u8, T>(shared.staging(round));
        // Our own slice is reduced from where it is; its place in the slot is for the sums.
        let own = part(len, size, rank);
        staging[..own.start].copy_from_slice(&piece[..own.start]);
        staging[own.end..len].copy_from_slice(&piece[own.end..]);
        shared.stage(round, call, PRIVATE);
        Ok((round, range))
    };
    let mut staged = Some(stage(shared, &mut rest, data)?);
    while let Some((round, range)) = staged.take() {
        if !rest.is_empty() {
            staged = Some(stage(shared, &mut rest, data)?);
        }
        for peer in peers(shared) {
            shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, size_of::<T>() * rest.len());
        let piece = &mut data[range];
        let len = piece.len();
        let own = part(len, size, rank);
        let sums = &mut bytemuck::cast_slice_mut::<u8, T>(shared.staging(round))[own.clone()];
        // SAFETY: this part of the slot is this rank's to write until it says `Reduced`, and no reference into the slots
        // that are read below overlaps it.
        let sums: &mut [T] = unsafe { std::slice::from_raw_parts_mut(sums.as_mut_ptr(), own.len()) };
        // In blocks, so that the copy reads what the cache has just got.
        let block = COPIED / size_of::<T>();
        for at in (0..own.len()).step_by(block) {
            let sums = &mut sums[at..own.len().min(at + block)];
            let here = own.start + at..own.start + at + sums.len();
            let parts: Vec<&[T]> = (0..size)
                .map(|peer| match peer == rank {
                    true => &piece[here.clone()],
                    false => &bytemuck::cast_slice(shared.staged(peer, round))[here.clone()],
                })
                .collect();
            kernel::reduce(sums, &parts, call.op);
            drop(parts);
            if receives {
                piece[here].copy_from_slice(sums);
            }
        }
        shared.publish(Counter::Reduced, round);
        if receives {
            for peer in peers(shared) {
                shared.await_counter(peer, Counter::Reduced, round, call)?;
                let theirs = part(len, size, peer);
                let slot = bytemuck::cast_slice::<u8, T>(shared.staged(peer, round));
                piece[theirs.clone()].copy_from_slice(&slot[theirs]);
            }
        }
        shared.publish(Counter::Done, round);
    }
    Ok(())
}

fn in_place<T: Element>(
    shared: &mut Shared,
    memory: &dyn Registered,
    places: &[u64],
    round: u32,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    let (rank, size) = (shared.rank(), shared.size());
    let bytes = size_of_val(data);
    let starts: Option<Vec<*mut T>> =
        (0..size).map(|peer| Some(memory.at(peer, places[peer], bytes)?.cast::<T>())).collect();
    let Some(starts) = starts else {
        return Err(no_such_memory());
    };
    let own = part(data.len(), size, rank);
    let block = BLOCK / size_of::<T>();
    let mut sums = vec![T::zeroed(); block];
    let mut at = own.start;
    while at < own.end {
        let len = block.min(own.end - at);
        let sums = &mut sums[..len];
        // SAFETY: `at` checked the bounds; all ranks have staged, so none writes this slice but its owner, us.
        let parts: Vec<&[T]> =
            starts.iter().map(|start| unsafe { std::slice::from_raw_parts(start.add(at), len) }).collect();
        kernel::reduce(sums, &parts, call.op);
        drop(parts);
        for start in &starts {
            // SAFETY: as above; no reference to the slice is alive.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), start.add(at), len) };
        }
        at += len;
    }
    shared.publish(Counter::Reduced, round);
    for peer in peers(shared) {
        shared.await_counter(peer, Counter::Reduced, round, call)?;
    }
    Ok(())
}

/// Leaves the reduction of everyone's `rank`-th part of `input` in `output`.
pub(crate) fn reduce_scatter<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    parts: &Parts,
    (input, output): (&[T], &mut [T]),
) -> Result<()> {
    let (rank, size, longest) = (shared.rank(), shared.size(), parts.longest());
    let own = parts.get(rank);
    let mut sources = Sources::new(registered, shared, input);
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let chunk = shared.slot_bytes(round) / size_of::<T>() / size;
        let mut count = chunk.min(longest - at);
        if !sources.is_registered(rank) {
            let staging = bytemuck::cast_slice_mut::<u8, T>(shared.staging(round));
            for peer in (0..size).filter(|&peer| peer != rank) {
                let theirs = clip(parts.get(peer), at, count);
                staging[peer * chunk..][..theirs.len()].copy_from_slice(&input[theirs]);
            }
        }
        shared.stage(round, call, sources.places[rank]);
        for peer in peers(shared) {
            sources.places[peer] = shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, (longest - at - count) * size_of::<T>() * size);
        if sources.all_registered() {
            count = longest - at;
        }
        let mine = clip(own.clone(), at, count);
        let mut all = Vec::with_capacity(size);
        for peer in 0..size {
            all.push(match peer == rank {
                true => &input[mine.clone()],
                false => sources.read(shared, (peer, round), (mine.start, rank * chunk), mine.len())?,
            });
        }
        kernel::reduce(&mut output[mine.start - own.start..mine.end - own.start], &all, call.op);
        shared.publish(Counter::Done, round);
        at += count;
        if at == longest {
            return sources.finish(shared, round, call);
        }
    }
}
