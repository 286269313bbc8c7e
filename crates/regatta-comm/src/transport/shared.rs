//! Memory that all ranks of a group see: the portable core of the `thread` and `shm` transports.
//!
//! Every rank has a control block with three counters that only it writes: `staged`, `reduced` and `done`.
//! Collective operations proceed in rounds, numbered without end; a counter at `r` says that the rank has
//! staged its data of round `r`, reduced its part, or read all that it wants of it. Data is staged in one of
//! two slots in turn, so a slot is free again when all have `done` the round before the last. A slot also holds
//! what the rank calls, so that peers notice when it is something else than they do.
//!
//! Slots are small, so that what is staged stays in the cache. That needs all ranks on their processors at once:
//! where other programs want the processors, too, each round costs a turn of the scheduler. So a rank that has
//! waited long within an operation says so in the header of its next slot, and the ranks go on with large slots,
//! in which each gets far before it needs the others. Every rank reads the same headers, so all decide alike.

use super::lateness::{LESSON, Lateness};
use super::patience::Patience;
use crate::error::{Error, Result};
use crate::member::call::Call;
use crate::member::context::Context;
use crate::member::health::SLICE;
use crate::member::wait::Wait;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

/// Bytes of a small slot.
pub(crate) const SLOT: usize = 256 << 10;
/// Most bytes of a large slot.
pub(crate) const LARGE: usize = 32 << 20;
/// Most bytes of all channels, as far as a channel may be smaller.
const CHANNELS: usize = 8 << 20;
const LINE: usize = 64;
const HEADER: usize = 4096;
/// Bytes of a channel between two of `size` ranks: a power of two. There are size^2 of them, so they are smaller in
/// large groups.
fn channel_bytes(size: usize) -> usize {
    (1 << (CHANNELS / (size * size)).max(1).ilog2()).clamp(4 << 10, 64 << 10)
}

/// Most ranks that share memory: each pair has a channel.
const MOST_RANKS: usize = 1024;

/// Says in a slot that the data is not in registered memory.
pub(crate) const PRIVATE: u64 = u64::MAX;

/// How a rank sleeps until another changes a word, and wakes others.
pub(crate) trait Waker: Send + Sync {
    /// Sleeps while `word` is `expected`, at most `timeout`; may wake early.
    fn sleep(&self, word: &AtomicU32, expected: u32, timeout: Duration);
    /// Wakes all that sleep on `word`.
    fn wake(&self, word: &AtomicU32);
}

/// The memory, and how to sleep on it.
pub(crate) trait Region: Send + Sync {
    fn start(&self) -> NonNull<u8>;
    /// Bytes of the region.
    fn bytes(&self) -> usize;
    fn waker(&self) -> &dyn Waker;

    /// Gives both large slots of `owner` memory, up to `bytes` each; returns how many bytes each has.
    fn reserve(&self, _owner: usize, _bytes: usize) -> usize {
        0
    }

    /// Where large slot `index` (0 or 1) of `owner` lies: room for [`LARGE`] bytes, of which those that were reserved
    /// may be used.
    fn large(&self, _owner: usize, _index: usize) -> Option<NonNull<u8>> {
        None
    }
}

/// The part of a region that one lane uses.
pub(crate) struct Window {
    region: Arc<dyn Region>,
    offset: usize,
    len: usize,
    /// The region's owner of large slots that is rank 0 in this window.
    owner: usize,
}

impl Region for Window {
    fn start(&self) -> NonNull<u8> {
        // SAFETY: within the region, as `lanes` has cut it.
        unsafe { self.region.start().add(self.offset) }
    }

    fn bytes(&self) -> usize {
        self.len
    }

    fn waker(&self) -> &dyn Waker {
        self.region.waker()
    }

    fn reserve(&self, owner: usize, bytes: usize) -> usize {
        self.region.reserve(self.owner + owner, bytes)
    }

    fn large(&self, owner: usize, index: usize) -> Option<NonNull<u8>> {
        self.region.large(self.owner + owner, index)
    }
}

/// A counter of a control block.
#[derive(Clone, Copy)]
pub(crate) enum Counter {
    Staged = 0,
    Reduced = 1,
    Done = 2,
}

/// Written by one rank, read by all.
#[repr(C, align(64))]
struct Control {
    counters: [AtomicU32; 3],
    _pad0: [u32; 13],
    /// Ranks asleep on one of the counters.
    sleepers: AtomicU32,
    _pad1: [u32; 15],
    /// Grows with every change of a channel that concerns this rank; written by its peers.
    event: AtomicU32,
    /// Whether this rank is asleep on `event`.
    asleep: AtomicU32,
    _pad2: [u32; 14],
    /// What is called in each of the two slots: call (four words), place of registered data, and twice the bytes of
    /// the rank's large slots, plus one where it has waited long.
    slots: [[AtomicU64; 8]; 2],
}

/// A byte queue from one rank to another.
#[repr(C, align(64))]
struct Channel {
    /// Bytes ever written.
    head: AtomicU32,
    _pad0: [u32; 15],
    /// Bytes ever read.
    tail: AtomicU32,
    _pad1: [u32; 15],
}

/// One rank's view of the shared memory.
pub(crate) struct Shared {
    region: Arc<dyn Region>,
    rank: usize,
    size: usize,
    /// The ranks that share the memory.
    context: Context,
    /// How long to look before sleeping.
    pub(crate) patience: Patience,
    /// The last round.
    round: u32,
    /// Bytes of the slots of the last even and of the last odd round.
    slot_bytes: [usize; 2],
    /// Bytes of the slots of rounds to come.
    next_bytes: usize,
    /// Bytes of each of this rank's large slots.
    reserved: usize,
    /// Operations to come for which large slots are wanted.
    lesson: u32,
    /// All ranks have come to the present operation, so a long wait shows a rank that is kept from its processor.
    inside: bool,
    lateness: Lateness,
    /// Views of memory of their own, for threads that share the work of one operation.
    pub(crate) lanes: Vec<Shared>,
}

// SAFETY: all access to the region goes through atomics or follows the protocol of rounds.
unsafe impl Send for Shared {}

impl Shared {
    /// Bytes that `size` ranks with so many lanes need, without registered memory and large slots.
    ///
    /// # Errors
    /// More ranks than can share memory.
    pub(crate) fn bytes_with_lanes(size: usize, lanes: usize) -> Result<usize> {
        if size > MOST_RANKS {
            return Err(Error::Usage(format!("{size} ranks cannot share memory: at most {MOST_RANKS} can")));
        }
        Ok(Self::bytes(size.max(1)) * lanes)
    }

    /// Bytes that `size` ranks need in one lane.
    fn bytes(size: usize) -> usize {
        let channels = size * size * (size_of::<Channel>() + channel_bytes(size));
        HEADER + size * size_of::<Control>() + channels + size * 2 * SLOT
    }

    /// The view of rank `context.rank`.
    pub(crate) fn new(region: Arc<dyn Region>, context: Context) -> Self {
        let (rank, size) = (context.rank, context.size);
        assert!(region.bytes() >= Self::bytes(size), "the region is too small for {size} ranks");
        Self {
            region,
            rank,
            size,
            context,
            patience: Patience::new(size),
            round: 0,
            slot_bytes: [SLOT; 2],
            next_bytes: SLOT,
            reserved: 0,
            lesson: 0,
            inside: false,
            lateness: Lateness::new(size),
            lanes: vec![],
        }
    }

    /// The view of rank `context.rank`, with as many lanes as the region has room for up to `lanes`.
    pub(crate) fn with_lanes(region: Arc<dyn Region>, context: Context, lanes: usize) -> Self {
        let len = Self::bytes(context.size);
        let window = |lane: usize| Window {
            region: region.clone(),
            offset: lane * len,
            len,
            owner: lane * context.size,
        };
        let room = region.bytes() / len;
        let more = (1..lanes.min(room)).map(|lane| Self::new(Arc::new(window(lane)), context.clone()));
        Self { lanes: more.collect(), ..Self::new(Arc::new(window(0)), context.clone()) }
    }

    /// Sets how long to look before sleeping.
    pub(crate) fn set_patience(&mut self, patience: Duration) {
        self.patience.set(patience);
        self.lanes.iter_mut().for_each(|lane| lane.patience.set(patience));
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.region.bytes());
        // SAFETY: every offset is computed from the layout that `bytes` adds up.
        unsafe { self.region.start().as_ptr().add(offset) }
    }

    fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.size);
        // SAFETY: in bounds and aligned; a control block consists of atomics and was zeroed memory.
        unsafe { &*self.at(HEADER + rank * size_of::<Control>()).cast::<Control>() }
    }

    fn channel(&self, from: usize, to: usize) -> (&Channel, *mut u8) {
        assert!(from < self.size && to < self.size);
        let index = from * self.size + to;
        let base = HEADER + self.size * size_of::<Control>();
        let start = self.at(base + index * (size_of::<Channel>() + channel_bytes(self.size)));
        // SAFETY: as for `control`; the channel's bytes follow its counters.
        unsafe { (&*start.cast::<Channel>(), start.add(size_of::<Channel>())) }
    }

    fn slot(&self, rank: usize, round: u32) -> *mut u8 {
        assert!(rank < self.size);
        let index = (round % 2) as usize;
        if self.slot_bytes[index] > SLOT
            && let Some(large) = self.region.large(rank, index)
        {
            return large.as_ptr();
        }
        let base = HEADER
            + self.size * size_of::<Control>()
            + self.size * self.size * (size_of::<Channel>() + channel_bytes(self.size));
        self.at(base + (rank * 2 + index) * SLOT)
    }

    /// Bytes of the slots of `round`.
    pub(crate) fn slot_bytes(&self, round: u32) -> usize {
        self.slot_bytes[(round % 2) as usize]
    }

    /// An operation begins: its peers may come to it at any time.
    pub(crate) fn enter(&mut self) {
        self.inside = false;
        self.lanes.iter_mut().for_each(Self::enter);
    }

    /// As if this rank had waited long for a peer.
    #[cfg(test)]
    pub(crate) fn pretend_late(&mut self) {
        self.lateness.pretend();
    }

    /// No peer is ever late.
    #[cfg(test)]
    pub(crate) fn never_late(&mut self) {
        self.lateness.never();
    }

    /// Rounds so far.
    #[cfg(test)]
    pub(crate) fn rounds(&self) -> u32 {
        self.round
    }

    /// Decides about the slots of the rounds to come, by what all ranks have said in `round`, of an operation with
    /// `left` bytes more to stage. For rounds in which every rank has waited for every other to stage, and has not
    /// been done yet: so all decide alike.
    pub(crate) fn agree(&mut self, round: u32, left: usize) {
        if !std::mem::replace(&mut self.inside, true) {
            self.lesson = self.lesson.saturating_sub(1);
            self.lateness.forgive(left);
        }
        let said = |rank: usize| self.control(rank).slots[(round % 2) as usize][5].load(Ordering::Relaxed);
        let (mut late, mut least) = (false, LARGE);
        for rank in 0..self.size {
            late |= said(rank) & 1 == 1;
            least = least.min((said(rank) / 2) as usize);
        }
        if said(self.rank) & 1 == 1 {
            self.lateness.clear();
        }
        if late {
            self.lesson = LESSON;
        }
        let wanted = left.min(LARGE);
        if self.lesson > 0 && wanted > self.reserved.max(SLOT) {
            self.reserved = self.region.reserve(self.rank, wanted).max(self.reserved);
        }
        self.next_bytes = if self.lesson > 0 { least.max(SLOT) } else { SLOT };
    }

    /// Begins the next round: waits until its slot is free, and returns its number.
    pub(crate) fn begin(&mut self, call: Call) -> Result<u32> {
        let round = self.round.wrapping_add(1);
        for peer in 0..self.size {
            self.await_counter(peer, Counter::Done, round.wrapping_sub(2), call)?;
        }
        self.round = round;
        self.slot_bytes[(round % 2) as usize] = self.next_bytes;
        Ok(round)
    }

    /// This rank's place for data of `round`, to write before it is staged.
    pub(crate) fn staging(&mut self, round: u32) -> &mut [u8] {
        // SAFETY: `begin` saw that no peer reads the slot any longer, and only this rank writes it.
        unsafe { std::slice::from_raw_parts_mut(self.slot(self.rank, round), self.slot_bytes(round)) }
    }

    /// Says that this rank has staged its data of `round`, and what it is calling.
    pub(crate) fn stage(&mut self, round: u32, call: Call, place: u64) {
        let slot = &self.control(self.rank).slots[(round % 2) as usize];
        let said = 2 * self.reserved as u64 + u64::from(self.lateness.is_too_late());
        for (word, value) in slot.iter().zip(call.encode().into_iter().chain([place, said])) {
            word.store(value, Ordering::Relaxed);
        }
        self.publish(Counter::Staged, round);
    }

    /// Waits until `peer` has staged `round`, checks that it calls the same, and returns the place of its
    /// registered data.
    pub(crate) fn await_staged(&mut self, peer: usize, round: u32, call: Call) -> Result<u64> {
        self.await_counter(peer, Counter::Staged, round, call)?;
        let slot = &self.control(peer).slots[(round % 2) as usize];
        let theirs = [0, 1, 2, 3].map(|i| slot[i].load(Ordering::Relaxed));
        if theirs == call.encode() {
            return Ok(slot[4].load(Ordering::Relaxed));
        }
        Err(self.context.mismatch(call, peer, Call::decode(theirs)))
    }

    /// The slot of `peer` in `round`: what it has staged there, and what it has reduced.
    pub(crate) fn staged(&self, peer: usize, round: u32) -> &[u8] {
        // SAFETY: the peer does not write again what it has said to be there before this rank is done with the round.
        unsafe { std::slice::from_raw_parts(self.slot(peer, round), self.slot_bytes(round)) }
    }

    /// Sets one of this rank's counters and wakes those who wait for it.
    pub(crate) fn publish(&self, counter: Counter, round: u32) {
        let control = self.control(self.rank);
        let word = &control.counters[counter as usize];
        word.store(round, Ordering::Release);
        // Pairs with the fence in `await_counter`: either we see the sleeper, or it sees the new value.
        fence(Ordering::SeqCst);
        if control.sleepers.load(Ordering::Relaxed) > 0 {
            self.region.waker().wake(word);
        }
    }

    /// Waits until `peer`'s counter has come to `round`.
    pub(crate) fn await_counter(&self, peer: usize, counter: Counter, round: u32, call: Call) -> Result<()> {
        let control = self.control(peer);
        let word = &control.counters[counter as usize];
        let reached = |value: u32| value.wrapping_sub(round).cast_signed() >= 0;
        if reached(word.load(Ordering::Acquire))
            || self.patience.look(|| reached(word.load(Ordering::Acquire)))
        {
            return Ok(());
        }
        let mut wait = Wait::new(&self.context);
        // In a large slot each rank takes long by itself.
        let begun = (self.inside && self.next_bytes == SLOT).then(Instant::now);
        control.sleepers.fetch_add(1, Ordering::SeqCst);
        let outcome = loop {
            fence(Ordering::SeqCst);
            let value = word.load(Ordering::Acquire);
            if reached(value) {
                break Ok(());
            }
            if let Err(error) = wait.check(peer, call) {
                break Err(error);
            }
            self.region.waker().sleep(word, value, SLICE);
        };
        control.sleepers.fetch_sub(1, Ordering::SeqCst);
        if let Some(begun) = begun {
            self.lateness.add(begun.elapsed());
        }
        outcome
    }

    /// Tells `peer` that a channel of its has changed.
    fn ring(&self, peer: usize) {
        let control = self.control(peer);
        control.event.fetch_add(1, Ordering::SeqCst);
        if control.asleep.load(Ordering::SeqCst) > 0 {
            self.region.waker().wake(&control.event);
        }
    }

    pub(crate) fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> usize {
        let capacity = channel_bytes(self.size);
        let (channel, data) = self.channel(self.rank, to);
        let head = channel.head.load(Ordering::Relaxed);
        let used = head.wrapping_sub(channel.tail.load(Ordering::Acquire)) as usize;
        let mut room = capacity.saturating_sub(used);
        let mut end = head;
        for part in parts {
            let count = part.len().min(room);
            let at = end as usize % capacity;
            let first = count.min(capacity - at);
            // SAFETY: in bounds; the reader stays behind `tail`, so these bytes are the writer's.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), data.add(at), first);
                std::ptr::copy_nonoverlapping(part.as_ptr().add(first), data, count - first);
            }
            room -= count;
            end = end.wrapping_add(count as u32);
        }
        if end != head {
            channel.head.store(end, Ordering::Release);
            self.ring(to);
        }
        end.wrapping_sub(head) as usize
    }

    pub(crate) fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> usize {
        let capacity = channel_bytes(self.size);
        let (channel, data) = self.channel(from, self.rank);
        let tail = channel.tail.load(Ordering::Relaxed);
        let mut ready = (channel.head.load(Ordering::Acquire).wrapping_sub(tail) as usize).min(capacity);
        let mut end = tail;
        for part in parts {
            let count = part.len().min(ready);
            let at = end as usize % capacity;
            let first = count.min(capacity - at);
            // SAFETY: in bounds; the writer stays before `head`, so these bytes are the reader's.
            unsafe {
                std::ptr::copy_nonoverlapping(data.add(at), part.as_mut_ptr(), first);
                std::ptr::copy_nonoverlapping(data, part.as_mut_ptr().add(first), count - first);
            }
            ready -= count;
            end = end.wrapping_add(count as u32);
        }
        if end != tail {
            channel.tail.store(end, Ordering::Release);
            self.ring(from);
        }
        end.wrapping_sub(tail) as usize
    }

    /// Whether a byte can be sent to one of `to` or received from one of `from`.
    pub(crate) fn is_ready(&self, to: &[usize], from: &[usize]) -> bool {
        let readable = |&from: &usize| {
            let channel = self.channel(from, self.rank).0;
            channel.head.load(Ordering::Acquire) != channel.tail.load(Ordering::Relaxed)
        };
        let writable = |&to: &usize| {
            let channel = self.channel(self.rank, to).0;
            let used =
                channel.head.load(Ordering::Relaxed).wrapping_sub(channel.tail.load(Ordering::Acquire));
            (used as usize) < channel_bytes(self.size)
        };
        from.iter().any(readable) || to.iter().any(writable)
    }

    /// Sleeps until a channel may be ready.
    pub(crate) fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) {
        let ready = || self.is_ready(to, from);
        if self.patience.look(ready) {
            return;
        }
        let control = self.control(self.rank);
        let event = control.event.load(Ordering::SeqCst);
        control.asleep.store(1, Ordering::SeqCst);
        if !ready() {
            self.region.waker().sleep(&control.event, event, timeout);
        }
        control.asleep.store(0, Ordering::SeqCst);
    }
}

const _: () = assert!(size_of::<Control>().is_multiple_of(LINE) && size_of::<Channel>() == 2 * LINE);
const _: () = assert!(SLOT.is_multiple_of(LINE));
