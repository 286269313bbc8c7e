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

mod movements;
mod reductions;
mod spans;
#[cfg(all(test, target_os = "linux"))]
mod tests;
mod volume;

pub(crate) use movements::{all_gather, all_to_all, broadcast, gather, scatter};
pub(crate) use reductions::{all_reduce, reduce, reduce_scatter};
pub(crate) use spans::{Move, Spans, exchange, gather_slices, gather_spans, reduce_spans};
pub(crate) use volume::sent;

use crate::algorithm::backend::Start;
use crate::error::{Error, Result};
use crate::member::call::Call;
use crate::numbers::element::Element;
use crate::transport::registered::Registered;
use crate::transport::shared::{Counter, PRIVATE, SLOT, Shared};
use std::ops::Range;

/// Up to here every rank reduces everything, in bytes: reading n small messages costs less than a second wait.
pub(crate) const SMALL: usize = 16 << 10;

fn peers(shared: &Shared) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (shared.rank(), shared.size());
    // Each rank begins with its right neighbour, so that not all read from the same one at once.
    (rank + 1..size).chain(0..rank)
}

/// The elements `at..at + count` of a part of a whole, as far as it goes.
fn clip(part: Range<usize>, at: usize, count: usize) -> Range<usize> {
    part.end.min(part.start + at)..part.end.min(part.start + at + count)
}

/// The elements of a round in every part.
#[derive(Clone, Copy)]
struct Round {
    at: usize,
    count: usize,
    /// Most elements of a part that a slot has room for.
    chunk: usize,
}

/// Goes through parts of at most `longest` elements, `parts` of them in a slot, in rounds: in each, `stage` fills this
/// rank's slot and `read` takes from those of the peers that it waits for.
fn rounds<T: Element>(
    shared: &mut Shared,
    call: Call,
    (longest, parts): (usize, usize),
    mut stage: impl FnMut(&mut [T], Round),
    mut read: impl FnMut(&mut Shared, u32, Round) -> Result<()>,
) -> Result<()> {
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let chunk = shared.slot_bytes(round) / size_of::<T>() / parts;
        let count = chunk.min(longest - at);
        let elements = Round { at, count, chunk };
        stage(bytemuck::cast_slice_mut(shared.staging(round)), elements);
        shared.stage(round, call, PRIVATE);
        if at == 0 {
            agree_once(shared, (round, call), longest * parts * size_of::<T>())?;
        }
        read(shared, round, elements)?;
        shared.publish(Counter::Done, round);
        at += count;
        if at == longest {
            return Ok(());
        }
    }
}

/// Decides about the slots of an operation with so many bytes where not all ranks wait for all others: here they do, in
/// the first round. Not for little data, which is through in that round.
fn agree_once(shared: &mut Shared, (round, call): (u32, Call), bytes: usize) -> Result<()> {
    if bytes > SLOT {
        for peer in peers(shared) {
            shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, bytes);
    }
    Ok(())
}

/// What `peer` has staged in `round`, once it has.
fn staged<T: Element>(shared: &mut Shared, peer: usize, round: u32, call: Call) -> Result<&[T]> {
    shared.await_staged(peer, round, call)?;
    Ok(bytemuck::cast_slice(shared.staged(peer, round)))
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
    Error::Internal("a peer named registered memory that it does not have".into())
}

/// Returns when all ranks have called it.
pub(crate) fn barrier(shared: &mut Shared, start: &Start<'_>, call: Call) -> Result<()> {
    let round = shared.begin(call)?;
    shared.stage_little(round, call, &[]);
    start.now();
    for peer in peers(shared) {
        shared.await_staged(peer, round, call)?;
    }
    shared.publish(Counter::Done, round);
    start.brief.set(!shared.has_waited());
    Ok(())
}
