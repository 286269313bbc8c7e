//! Operations over shared memory that move numbers without reducing them.

use super::{Round, Sources, agree_once, clip, peers, rounds, staged};
use crate::algorithm::parts::Parts;
use crate::error::Result;
use crate::member::call::Call;
use crate::numbers::element::Element;
use crate::transport::registered::Registered;
use crate::transport::shared::{Counter, Shared};

/// Gathers everyone's part into everyone's `output`, where this rank's own part already is: `input`.
pub(crate) fn all_gather<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    parts: &Parts,
    (input, output): (Option<&[T]>, &mut [T]),
) -> Result<()> {
    let (rank, longest) = (shared.rank(), parts.longest());
    let mut sources = match input {
        Some(input) => Sources::new(registered, shared, input),
        None => Sources::new::<T>(None, shared, &[]),
    };
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let mut count = (shared.slot_bytes(round) / size_of::<T>()).min(longest - at);
        if !sources.is_registered(rank) {
            let own = clip(parts.get(rank), at, count);
            bytemuck::cast_slice_mut::<u8, T>(shared.staging(round))[..own.len()]
                .copy_from_slice(&output[own]);
        }
        shared.stage(round, call, sources.places[rank]);
        for peer in peers(shared) {
            sources.places[peer] = shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, (longest - at - count) * size_of::<T>());
        if sources.all_registered() {
            count = longest - at;
        }
        for peer in peers(shared) {
            let whole = parts.get(peer);
            let theirs = clip(whole.clone(), at, count);
            // A peer's registered data is its part alone.
            sources.len = whole.len();
            let read = sources.read(shared, (peer, round), (theirs.start - whole.start, 0), theirs.len())?;
            output[theirs].copy_from_slice(read);
        }
        shared.publish(Counter::Done, round);
        at += count;
        if at == longest {
            return sources.finish(shared, round, call);
        }
    }
}

/// Copies `data` of rank `root` to everyone; `call` is what ranks compare.
pub(crate) fn broadcast<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    root: usize,
    data: &mut [T],
) -> Result<()> {
    let rank = shared.rank();
    let mut sources = Sources::new(registered, shared, data);
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let mut count = (shared.slot_bytes(round) / size_of::<T>()).min(data.len() - at);
        if rank == root && !sources.is_registered(root) {
            bytemuck::cast_slice_mut::<u8, T>(shared.staging(round))[..count]
                .copy_from_slice(&data[at..at + count]);
        }
        shared.stage(round, call, sources.places[rank]);
        if rank != root {
            sources.places[root] = shared.await_staged(root, round, call)?;
        } else if at == 0 {
            // Else a rank that takes itself for the root, too, would go unnoticed.
            for peer in peers(shared) {
                shared.await_staged(peer, round, call)?;
            }
        }
        if at == 0 {
            agree_once(shared, (round, call), size_of_val(data))?;
        }
        if sources.is_registered(root) {
            count = data.len() - at;
        }
        if rank != root {
            let theirs = sources.read(shared, (root, round), (at, 0), count)?;
            data[at..at + count].copy_from_slice(theirs);
        }
        shared.publish(Counter::Done, round);
        at += count;
        if at == data.len() {
            return if rank == root { sources.finish(shared, round, call) } else { Ok(()) };
        }
    }
}

/// Gathers everyone's `input` into the parts of the root's `output`.
pub(crate) fn gather<T: Element>(
    shared: &mut Shared,
    call: Call,
    parts: &Parts,
    (input, output): (&[T], &mut [T]),
) -> Result<()> {
    let (rank, root) = (shared.rank(), call.root as usize);
    if rank == root {
        output[parts.get(root)].copy_from_slice(input);
    }
    let stage = |slot: &mut [T], Round { at, count, .. }| {
        if rank != root {
            let own = clip(0..input.len(), at, count);
            slot[..own.len()].copy_from_slice(&input[own]);
        }
    };
    let read = |shared: &mut Shared, round, Round { at, count, .. }| {
        for peer in peers(shared).filter(|_| rank == root) {
            let theirs = clip(parts.get(peer), at, count);
            let slot = staged::<T>(shared, peer, round, call)?;
            output[theirs.clone()].copy_from_slice(&slot[..theirs.len()]);
        }
        Ok(())
    };
    rounds(shared, call, (parts.longest(), 1), stage, read)
}

/// Copies the parts of the root's `input` to everyone's `output`.
pub(crate) fn scatter<T: Element>(
    shared: &mut Shared,
    call: Call,
    parts: &Parts,
    (input, output): (&[T], &mut [T]),
) -> Result<()> {
    let (rank, size, root) = (shared.rank(), shared.size(), call.root as usize);
    if rank == root {
        output.copy_from_slice(&input[parts.get(root)]);
    }
    let stage = |slot: &mut [T], Round { at, count, chunk }| {
        for peer in (0..size).filter(|&peer| rank == root && peer != root) {
            let theirs = clip(parts.get(peer), at, count);
            slot[peer * chunk..][..theirs.len()].copy_from_slice(&input[theirs]);
        }
    };
    let read = |shared: &mut Shared, round, Round { at, count, chunk }| {
        if rank != root {
            let own = clip(0..output.len(), at, count);
            let slot = staged::<T>(shared, root, round, call)?;
            output[own.clone()].copy_from_slice(&slot[rank * chunk..][..own.len()]);
        }
        Ok(())
    };
    rounds(shared, call, (parts.longest(), size), stage, read)
}

/// `block` numbers from everyone's `input` to everyone's `output`.
pub(crate) fn all_to_all<T: Element>(
    shared: &mut Shared,
    call: Call,
    block: usize,
    (input, output): (&[T], &mut [T]),
) -> Result<()> {
    let (rank, size) = (shared.rank(), shared.size());
    output[rank * block..][..block].copy_from_slice(&input[rank * block..][..block]);
    let stage = |slot: &mut [T], Round { at, count, chunk }| {
        for peer in (0..size).filter(|&peer| peer != rank) {
            slot[peer * chunk..][..count].copy_from_slice(&input[peer * block + at..][..count]);
        }
    };
    let read = |shared: &mut Shared, round, Round { at, count, chunk }| {
        for peer in peers(shared) {
            let slot = staged::<T>(shared, peer, round, call)?;
            output[peer * block + at..][..count].copy_from_slice(&slot[rank * chunk..][..count]);
        }
        Ok(())
    };
    rounds(shared, call, (block, size), stage, read)
}
