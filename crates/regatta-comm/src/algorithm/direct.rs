//! Direct algorithms over shared memory: each rank reduces its own slice straight from its peers' memory.
//!
//! Cost of an all-reduce of B bytes on n ranks, per rank: data in private memory is staged in chunks that stay
//! in the cache, (n-1)/n * B bytes copied out, B read and reduced, (n-1)/n * B copied in, two waits a chunk,
//! where staging the next chunk hides one. Registered data is not staged: B bytes read, B written, two waits in
//! all. A small message is staged whole and every rank reduces all of it: one wait. Reduce-scatter, all-gather
//! and broadcast read registered data where it lies, too.
//!
//! All ranks combine in the order of ranks and slices are reduced by one rank each, so results are the same bits
//! on every rank and in every run. 16-bit floats are accumulated in f32 and rounded once.

use super::ring::part;
use crate::call::Call;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::kernel;
use crate::transport::shared::{Counter, PRIVATE, SLOT, Shared};

/// Up to here every rank reduces everything, in bytes: reading n small messages costs less than a second wait.
const SMALL: usize = 16 << 10;
/// Bytes reduced at a time in registered memory: stays in the first-level cache.
const BLOCK: usize = 16 << 10;

/// Registered memory as this rank sees it: where its own data lies, and where a peer's does.
pub(crate) trait Registered {
    /// The place of `data` in this rank's registered memory, if it lies there.
    fn place(&self, data: &[u8]) -> Option<u64>;
    /// `len` bytes at `place` of `rank`'s registered memory.
    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8>;
}

fn peers(shared: &Shared) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (shared.rank(), shared.size());
    // Each rank begins with its right neighbour, so that not all read from the same one at once.
    (1..size).map(move |distance| (rank + distance) % size)
}

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    if size_of_val(data) <= SMALL {
        return small(shared, call, data);
    }
    // One round to learn whether everyone's data is registered; every rank sees the same answer.
    let own = registered.and_then(|memory| memory.place(bytemuck::cast_slice(data))).unwrap_or(PRIVATE);
    let round = shared.begin(call)?;
    shared.stage(round, call, own);
    let mut places = vec![own; shared.size()];
    for peer in peers(shared) {
        places[peer] = shared.await_staged(peer, round, call)?;
    }
    match registered {
        Some(memory) if !places.contains(&PRIVATE) => in_place(shared, memory, &places, round, call, data)?,
        _ => {
            shared.publish(Counter::Done, round);
            return chunked(shared, call, data);
        }
    }
    shared.publish(Counter::Done, round);
    Ok(())
}

fn small<T: Element>(shared: &mut Shared, call: Call, data: &mut [T]) -> Result<()> {
    let round = shared.begin(call)?;
    let bytes = size_of_val(data);
    shared.staging(round)[..bytes].copy_from_slice(bytemuck::cast_slice(data));
    shared.stage(round, call, PRIVATE);
    for peer in peers(shared) {
        shared.await_staged(peer, round, call)?;
    }
    let parts: Vec<&[T]> =
        (0..shared.size()).map(|rank| bytemuck::cast_slice(&shared.staged(rank, round)[..bytes])).collect();
    kernel::reduce(data, &parts, call.op);
    shared.publish(Counter::Done, round);
    Ok(())
}

fn chunked<T: Element>(shared: &mut Shared, call: Call, data: &mut [T]) -> Result<()> {
    let (rank, size) = (shared.rank(), shared.size());
    let chunk = SLOT / size_of::<T>();
    let chunks = data.len().div_ceil(chunk);
    let range = |index: usize| index * chunk..data.len().min((index + 1) * chunk);
    let ranges: Vec<_> = (0..chunks).map(range).collect();
    let mut staged = vec![0; chunks];
    let stage = |shared: &mut Shared, index: usize, data: &[T]| -> Result<u32> {
        let round = shared.begin(call)?;
        let piece = &data[ranges[index].clone()];
        let staging = bytemuck::cast_slice_mut::<u8, T>(shared.staging(round));
        // Our own slice is reduced from where it is.
        let own = part(piece.len(), size, rank);
        staging[..own.start].copy_from_slice(&piece[..own.start]);
        staging[own.end..piece.len()].copy_from_slice(&piece[own.end..]);
        shared.stage(round, call, PRIVATE);
        Ok(round)
    };
    staged[0] = stage(shared, 0, data)?;
    let mut own_copy = vec![T::zeroed(); chunk.div_ceil(size)];
    for index in 0..chunks {
        if index + 1 < chunks {
            staged[index + 1] = stage(shared, index + 1, data)?;
        }
        let round = staged[index];
        let piece = &mut data[ranges[index].clone()];
        let len = piece.len();
        let own = part(len, size, rank);
        for peer in peers(shared) {
            shared.await_staged(peer, round, call)?;
        }
        let own_copy = &mut own_copy[..own.len()];
        own_copy.copy_from_slice(&piece[own.clone()]);
        let parts: Vec<&[T]> = (0..size)
            .map(|peer| match peer == rank {
                true => &*own_copy,
                false => &bytemuck::cast_slice(shared.staged(peer, round))[own.clone()],
            })
            .collect();
        kernel::reduce(&mut piece[own.clone()], &parts, call.op);
        shared.results(round)[..size_of_val(&piece[own.clone()])]
            .copy_from_slice(bytemuck::cast_slice(&piece[own.clone()]));
        shared.publish(Counter::Reduced, round);
        for peer in peers(shared) {
            shared.await_counter(peer, Counter::Reduced, round, call)?;
            let theirs = part(len, size, peer);
            let results = bytemuck::cast_slice::<u8, T>(shared.reduced(peer, round));
            piece[theirs.clone()].copy_from_slice(&results[..theirs.len()]);
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
        return Err(crate::error::Error::Usage(
            "a peer named registered memory that it does not have".into(),
        ));
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

/// What a rank reads in one round: a peer's registered data where it lies, or what the peer has staged.
struct Sources<'a> {
    memory: Option<&'a dyn Registered>,
    /// Each rank's place of registered data, or [`PRIVATE`].
    places: Vec<u64>,
    /// Elements of the whole registered data of a rank.
    len: usize,
}

impl<'a> Sources<'a> {
    fn new<T: Element>(memory: Option<&'a dyn Registered>, shared: &Shared, data: &[T]) -> Self {
        let mut places = vec![PRIVATE; shared.size()];
        // Little is staged in less time than peers take to say that they have read it.
        if size_of_val(data) > SMALL {
            let own = memory.and_then(|memory| memory.place(bytemuck::cast_slice(data)));
            places[shared.rank()] = own.unwrap_or(PRIVATE);
        }
        Self { memory, places, len: data.len() }
    }

    fn is_registered(&self, rank: usize) -> bool {
        self.places[rank] != PRIVATE
    }

    fn all_registered(&self) -> bool {
        !self.places.contains(&PRIVATE)
    }

    /// `count` elements of `peer`: from `whole` on of its registered data, or from `staged` on of its slot.
    fn read<'s, T: Element>(
        &self,
        shared: &'s Shared,
        (peer, round): (usize, u32),
        (whole, staged): (usize, usize),
        count: usize,
    ) -> Result<&'s [T]> {
        let (Some(memory), true) = (self.memory, self.is_registered(peer)) else {
            return Ok(&bytemuck::cast_slice(shared.staged(peer, round))[staged..][..count]);
        };
        assert!(whole + count <= self.len);
        let start =
            memory.at(peer, self.places[peer], self.len * size_of::<T>()).ok_or_else(no_such_memory)?;
        // SAFETY: `at` checked the bounds, pieces are page-aligned, and the peer waits in `finish` before it lets
        // its caller write the data again.
        Ok(unsafe { std::slice::from_raw_parts(start.cast::<T>().add(whole), count) })
    }

    /// Waits until all peers have read this rank's registered data.
    fn finish(&self, shared: &Shared, round: u32, call: Call) -> Result<()> {
        if self.is_registered(shared.rank()) {
            peers(shared).try_for_each(|peer| shared.await_counter(peer, Counter::Done, round, call))?;
        }
        Ok(())
    }
}

fn no_such_memory() -> Error {
    Error::Usage("a peer named registered memory that it does not have".into())
}

/// Leaves the reduction of everyone's `rank`-th part of `input` in `output`.
pub(crate) fn reduce_scatter<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (rank, size, len) = (shared.rank(), shared.size(), output.len());
    let chunk = SLOT / size_of::<T>() / size;
    let mut sources = Sources::new(registered, shared, input);
    let mut at = 0;
    loop {
        let mut count = chunk.min(len - at);
        let round = shared.begin(call)?;
        if !sources.is_registered(rank) {
            let staging = bytemuck::cast_slice_mut::<u8, T>(shared.staging(round));
            for peer in (0..size).filter(|&peer| peer != rank) {
                staging[peer * chunk..][..count].copy_from_slice(&input[peer * len + at..][..count]);
            }
        }
        shared.stage(round, call, sources.places[rank]);
        for peer in peers(shared) {
            sources.places[peer] = shared.await_staged(peer, round, call)?;
        }
        if sources.all_registered() {
            count = len - at;
        }
        let mut parts = Vec::with_capacity(size);
        for peer in 0..size {
            parts.push(match peer == rank {
                true => &input[rank * len + at..][..count],
                false => sources.read(shared, (peer, round), (rank * len + at, rank * chunk), count)?,
            });
        }
        kernel::reduce(&mut output[at..at + count], &parts, call.op);
        shared.publish(Counter::Done, round);
        at += count;
        if at == len {
            return sources.finish(shared, round, call);
        }
    }
}

/// Gathers everyone's `input` into everyone's `output`, in the order of ranks.
pub(crate) fn all_gather<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (rank, len) = (shared.rank(), input.len());
    let chunk = SLOT / size_of::<T>();
    let mut sources = Sources::new(registered, shared, input);
    output[rank * len..][..len].copy_from_slice(input);
    let mut at = 0;
    loop {
        let mut count = chunk.min(len - at);
        let round = shared.begin(call)?;
        if !sources.is_registered(rank) {
            bytemuck::cast_slice_mut::<u8, T>(shared.staging(round))[..count]
                .copy_from_slice(&input[at..at + count]);
        }
        shared.stage(round, call, sources.places[rank]);
        for peer in peers(shared) {
            sources.places[peer] = shared.await_staged(peer, round, call)?;
        }
        if sources.all_registered() {
            count = len - at;
        }
        for peer in peers(shared) {
            let theirs = sources.read(shared, (peer, round), (at, 0), count)?;
            output[peer * len + at..][..count].copy_from_slice(theirs);
        }
        shared.publish(Counter::Done, round);
        at += count;
        if at == len {
            return sources.finish(shared, round, call);
        }
    }
}

/// Copies `data` of the call's root to everyone.
pub(crate) fn broadcast<T: Element>(
    shared: &mut Shared,
    registered: Option<&dyn Registered>,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    let (rank, root) = (shared.rank(), call.root as usize);
    let chunk = SLOT / size_of::<T>();
    let mut sources = Sources::new(registered, shared, data);
    let mut at = 0;
    loop {
        let mut count = chunk.min(data.len() - at);
        let round = shared.begin(call)?;
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

/// Returns when all ranks have called it.
pub(crate) fn barrier(shared: &mut Shared, call: Call) -> Result<()> {
    let round = shared.begin(call)?;
    shared.stage(round, call, PRIVATE);
    for peer in peers(shared) {
        shared.await_staged(peer, round, call)?;
    }
    shared.publish(Counter::Done, round);
    Ok(())
}
