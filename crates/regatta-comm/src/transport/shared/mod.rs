//! Memory that all ranks of a group see: the portable core of the `thread` and `shm` transports.
//!
#![doc = include_str!("shared.md")]

mod channels;
mod region;
mod rounds;

pub(crate) use region::{Region, Waker};

use super::lateness::Lateness;
use super::patience::Patience;
use crate::error::{Error, Result};
use crate::member::context::Context;
use channels::channels_bytes;
use region::Window;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

/// Bytes of a small slot.
pub(crate) const SLOT: usize = 256 << 10;
/// Most bytes of a large slot.
pub(crate) const LARGE: usize = 32 << 20;
/// Bytes at the beginning of each lane that are left to the transport.
pub(crate) const HEADER: usize = 4096;

/// Most ranks that share memory: each pair has a channel.
const MOST_RANKS: usize = 1024;

/// Says in a slot that the data is not in registered memory.
pub(crate) const PRIVATE: u64 = u64::MAX;

/// Words of little data that a rank shows together with its call.
const LITTLE_WORDS: usize = 8;
/// Bytes of little data.
pub(crate) const LITTLE: usize = 8 * LITTLE_WORDS;

/// A counter of a control block.
#[derive(Clone, Copy)]
pub(crate) enum Counter {
    Reduced = 0,
    Done = 1,
}

/// What a rank says of a round, with the data where it is little: its first word is in the line of 64 bytes that readers
/// wait for, the others are in the next one.
#[repr(C, align(128))]
struct Stage {
    /// The last round that was staged here.
    round: AtomicU32,
    /// The last round that the rank had done before.
    done: AtomicU32,
    call: [AtomicU64; 4],
    /// Place of registered data, or [`PRIVATE`].
    place: AtomicU64,
    /// Twice the bytes of the rank's large slots, plus one where it has waited long.
    said: AtomicU64,
    little: [AtomicU64; LITTLE_WORDS],
}

/// Written by one rank, read by all.
#[repr(C, align(128))]
struct Control {
    counters: [AtomicU32; 2],
    _pad0: [u32; 14],
    /// Ranks asleep on one of the counters.
    sleepers: AtomicU32,
    _pad1: [u32; 15],
    /// Grows with every change of a channel that concerns this rank; written by its peers.
    event: AtomicU32,
    /// Whether this rank is asleep on `event`.
    asleep: AtomicU32,
    _pad2: [u32; 30],
    /// Of even and of odd rounds.
    stages: [Stage; 2],
}

/// One rank's view of the shared memory.
pub(crate) struct Shared {
    region: Arc<dyn Region>,
    /// Where the region begins.
    start: NonNull<u8>,
    rank: usize,
    size: usize,
    /// The ranks that share the memory.
    context: Context,
    /// How long to look before sleeping.
    pub(crate) patience: Patience,
    /// The last round.
    round: u32,
    /// The last round that each rank is known to have done.
    known_done: Vec<u32>,
    /// A round that was staged without a look for sleepers.
    unannounced: Cell<Option<u32>>,
    /// A peer was not there at once in this operation.
    has_waited: Cell<bool>,
    /// Bytes of the slots of the last even and of the last odd round.
    slot_bytes: [usize; 2],
    /// Bytes of the slots of rounds to come.
    next_bytes: usize,
    /// Bytes of each of this rank's large slots.
    reserved: usize,
    /// Operations to come for which large slots are wanted.
    deep: u32,
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
        HEADER + size * size_of::<Control>() + channels_bytes(size) + size * 2 * SLOT
    }

    /// The view of rank `context.rank`.
    pub(crate) fn new(region: Arc<dyn Region>, context: Context) -> Self {
        let (rank, size) = (context.rank, context.size);
        assert!(region.bytes() >= Self::bytes(size), "the region is too small for {size} ranks");
        Self {
            start: region.start(),
            region,
            rank,
            size,
            context,
            patience: Patience::new(size),
            round: 0,
            known_done: vec![0; size],
            unannounced: Cell::new(None),
            has_waited: Cell::new(false),
            slot_bytes: [SLOT; 2],
            next_bytes: SLOT,
            reserved: 0,
            deep: 0,
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
        unsafe { self.start.as_ptr().add(offset) }
    }

    fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.size);
        // SAFETY: in bounds and aligned; a control block consists of atomics and was zeroed memory.
        unsafe { &*self.at(HEADER + rank * size_of::<Control>()).cast::<Control>() }
    }

    fn slot(&self, rank: usize, round: u32) -> *mut u8 {
        assert!(rank < self.size);
        let index = (round % 2) as usize;
        if self.slot_bytes[index] > SLOT
            && let Some(large) = self.region.large(rank, index)
        {
            return large.as_ptr();
        }
        let base = HEADER + self.size * size_of::<Control>() + channels_bytes(self.size);
        self.at(base + (rank * 2 + index) * SLOT)
    }
}

const _: () = assert!(size_of::<Control>() == 512 && size_of::<Stage>() == 128);
const _: () = assert!(HEADER.is_multiple_of(align_of::<Control>()));
