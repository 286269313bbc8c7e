//! A group's part of the segment: the memory in which its ranks meet.
//!
//! The group's first rank on the host gives the part, from address space of its own. A count in the part says how many
//! ranks hold it: a slow rank may still read what others wrote before they dropped the group. The last rank that drops the
//! part gives its memory back to the system, and the giver finds the addresses free when it looks next. A part that a rank has died with stays until the job ends.

use super::layout::{PAGE, PartSize};
use super::ranges::Ranges;
use super::segment::Segment;
use crate::error::{Error, Result};
use crate::transport::shared::{HEADER, LARGE, Region, SLOT, Waker};
use rustix::io::Errno;
use rustix::thread::futex;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The beginning of a part, which the rounds of the group leave alone.
#[repr(C)]
struct Head {
    /// Ranks that hold the part, or [`LEAVING`].
    users: AtomicU32,
    /// Whether there are large slots.
    large: AtomicU32,
    /// The file system could not take the memory back.
    kept: AtomicU32,
}

/// The last rank is giving the memory back.
const LEAVING: u32 = u32::MAX;

const _: () = assert!(size_of::<Head>() <= HEADER && HEADER.is_multiple_of(PAGE));

/// The parts that one rank gives.
pub(super) struct Parts {
    segment: Arc<Segment>,
    ledger: Mutex<Ledger>,
}

struct Ledger {
    /// Address space that no part needs.
    free: Ranges,
    /// Parts that somebody may still hold.
    given: Vec<Range<usize>>,
    /// What was used before is not zeros, since the file system cannot take memory back.
    keeps: bool,
}

impl Parts {
    /// What `rank`, of the job's ranks on this host, gives.
    pub(super) fn new(segment: Arc<Segment>, rank: usize) -> Self {
        let mut free = Ranges::default();
        free.give(segment.layout.parts(rank));
        Self { segment, ledger: Mutex::new(Ledger { free, given: vec![], keeps: false }) }
    }

    /// A part for a group with `ranks` ranks on this host, of which this is one.
    ///
    /// # Errors
    /// No room for it.
    pub(super) fn give(&self, ranks: usize) -> Result<Part> {
        let size = PartSize::new(ranks, self.segment.lanes)?;
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        self.reap(&mut ledger);
        let no_room = |error| self.segment.no_room(size.fixed, error);
        // Where address space is short, the group goes without large slots.
        let found = [size.large, 0].into_iter().find_map(|large| {
            let len = size.fixed + large;
            ledger.free.take(len).map(|start| start..start + len)
        });
        let range = found.ok_or_else(|| no_room(Errno::NOSPC))?;
        let fixed = range.start..range.start + size.fixed;
        if let Err(error) = self.segment.reserve(fixed) {
            ledger.free.give(range);
            return Err(no_room(error));
        }
        if ledger.keeps {
            // SAFETY: the range is free, so nobody else uses it, and it is reserved.
            unsafe { std::ptr::write_bytes(self.segment.at(range.start).as_ptr(), 0, size.fixed) };
        }
        let head = head(&self.segment, range.start);
        head.large.store(u32::from(range.len() > size.fixed), Ordering::Relaxed);
        head.users.store(ranks as u32, Ordering::Release);
        let place = range.start;
        ledger.given.push(range);
        drop(ledger);
        Part::at(self.segment.clone(), place, ranks)
    }

    /// Takes back the address space of the parts that nobody holds any longer.
    fn reap(&self, ledger: &mut Ledger) {
        let left = |range: &mut Range<usize>| {
            let head = head(&self.segment, range.start);
            if head.users.load(Ordering::Acquire) > 0 {
                return false;
            }
            let kept = head.kept.load(Ordering::Relaxed) == 1;
            ledger.keeps |= self.segment.release(range.start..range.start + HEADER).is_err() || kept;
            true
        };
        for range in ledger.given.extract_if(.., left) {
            ledger.free.give(range);
        }
    }
}

/// The head of the part that begins at `start`.
fn head(segment: &Segment, start: usize) -> &Head {
    // SAFETY: the callers know a page-aligned part to begin there; its head consists of atomics.
    unsafe { segment.at(start).cast::<Head>().as_ref() }
}

/// One rank's hold on a group's part.
pub(crate) struct Part {
    segment: Arc<Segment>,
    /// Where it begins in the segment, and in this process.
    place: usize,
    start: NonNull<u8>,
    size: PartSize,
}

// SAFETY: the memory is reached through `Shared`, which synchronises.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

impl Part {
    /// The part that the group's first rank gives at `place`; the group has `ranks` ranks on this host.
    ///
    /// # Errors
    /// No part can be there.
    pub(super) fn at(segment: Arc<Segment>, place: usize, ranks: usize) -> Result<Self> {
        let mut size = PartSize::new(ranks, segment.lanes)?;
        let room = segment.len().checked_sub(place).filter(|_| place.is_multiple_of(PAGE));
        let fits = |bytes| room.is_some_and(|room| bytes <= room);
        if fits(size.fixed) && head(&segment, place).large.load(Ordering::Relaxed) == 0 {
            size.large = 0;
        }
        if !fits(size.fixed + size.large) {
            return Err(Error::Internal(format!("no group can have its part at {place} of shared memory")));
        }
        let start = segment.at(place);
        Ok(Self { segment, place, start, size })
    }

    /// Where the others find it.
    pub(crate) fn place(&self) -> usize {
        self.place
    }

    /// Drops the part of a group that does not come about: no other rank has come to it.
    pub(crate) fn withdraw(self) {
        head(&self.segment, self.place).users.store(1, Ordering::Relaxed);
    }

    /// Where large slot `index` of `owner` begins in the segment.
    fn large_offset(&self, owner: usize, index: usize) -> usize {
        let offset = (owner * 2 + index) * LARGE;
        assert!(index < 2 && offset + LARGE <= self.size.large, "there is no owner {owner} of large slots");
        self.place + self.size.fixed + offset
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let head = head(&self.segment, self.place);
        let leave = |users: u32| Some(if users == 1 { LEAVING } else { users.saturating_sub(1) });
        if head.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, leave) != Ok(1) {
            return;
        }
        // But for the head: a read of it would need memory again, of which there may be none.
        let rest = self.place + HEADER..self.place + self.size.fixed + self.size.large;
        head.kept.store(self.segment.release(rest).is_err().into(), Ordering::Relaxed);
        head.users.store(0, Ordering::Release);
    }
}

impl Region for Part {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn bytes(&self) -> usize {
        self.size.fixed
    }

    fn waker(&self) -> &dyn Waker {
        &Futex
    }

    fn reserve(&self, owner: usize, bytes: usize) -> usize {
        let mut bytes = bytes.min(self.size.large.min(LARGE)).next_multiple_of(PAGE);
        while bytes > SLOT {
            // Half of what is free is left to others: for them this may be all the memory there is.
            let enough = self.segment.room() / 2 >= 2 * bytes as u64;
            let slot = |index| {
                let at = self.large_offset(owner, index);
                self.segment.reserve(at..at + bytes)
            };
            if enough && slot(0).and_then(|()| slot(1)).is_ok() {
                return bytes;
            }
            bytes = bytes / 2 / PAGE * PAGE;
        }
        0
    }

    fn large(&self, owner: usize, index: usize) -> Option<NonNull<u8>> {
        (self.size.large > 0).then(|| self.segment.at(self.large_offset(owner, index)))
    }
}

struct Futex;

impl Waker for Futex {
    fn sleep(&self, word: &AtomicU32, expected: u32, timeout: Duration) {
        let timeout = futex::Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // Woken, timed out, or the word had changed: the caller looks again in any case.
        let _ = futex::wait(word, futex::Flags::empty(), expected, Some(&timeout));
    }

    fn wake(&self, word: &AtomicU32) {
        // Only fails on a bad address.
        let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::mapped;
    use super::*;

    /// Whether all of the part is `byte`, but for its head.
    fn is_all(part: &Part, byte: u8) -> bool {
        // SAFETY: the part is that long, and these tests have one thread.
        let bytes = unsafe { std::slice::from_raw_parts(part.start().as_ptr(), part.bytes()) };
        bytes[HEADER..].iter().all(|&other| other == byte)
    }

    fn fill(part: &Part, byte: u8) {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(part.start().as_ptr().add(HEADER), byte, part.bytes() - HEADER) };
    }

    #[test]
    fn a_part_is_given_again_when_all_have_dropped_it_and_is_zeros_then() {
        let mut segments = mapped(2).into_iter().map(Arc::new);
        let [first, second] = [(); 2].map(|()| segments.next().unwrap());
        let parts = Arc::new(Parts::new(first.clone(), 0));
        let before = first.blocks();
        let mine = parts.give(2).unwrap();
        let theirs = Part::at(second.clone(), mine.place(), 2).unwrap();
        let place = mine.place();
        fill(&mine, 1);
        assert!(mine.reserve(1, 1 << 20) == 1 << 20 && theirs.large(1, 1).is_some());
        drop(mine);
        // The peer may still read.
        let other = parts.give(2).unwrap();
        assert!(other.place() >= place + theirs.size.fixed + theirs.size.large);
        assert!(is_all(&theirs, 1));
        drop(theirs);
        drop(other);
        drop(Part::at(second.clone(), parts.ledger.lock().unwrap().given[1].start, 2).unwrap());
        // All of it has gone back to the system, whoever was last.
        assert!(first.blocks() <= before);
        let again = parts.give(2).unwrap();
        assert_eq!(again.place(), place);
        assert!(is_all(&again, 0));
        again.withdraw();
        assert_eq!(parts.give(1).unwrap().place(), place);
    }

    #[test]
    fn zeros_are_written_where_the_file_system_keeps_what_was_used() {
        let segment = Arc::new(mapped(1).remove(0));
        let parts = Parts::new(segment.clone(), 0);
        let part = parts.give(1).unwrap();
        fill(&part, 1);
        // As a drop leaves it there.
        let (place, head) = (part.place(), head(&segment, part.place()));
        std::mem::forget(part);
        head.kept.store(1, Ordering::Relaxed);
        head.users.store(0, Ordering::Release);
        let again = parts.give(1).unwrap();
        assert!(again.place() == place && is_all(&again, 0));
    }

    #[test]
    fn without_address_space_groups_have_no_large_slots_and_then_no_part() {
        let mut segments = mapped(2).into_iter().map(Arc::new);
        let [first, second] = [(); 2].map(|()| segments.next().unwrap());
        let parts = Arc::new(Parts::new(first.clone(), 1));
        let size = PartSize::new(2, 1).unwrap();
        let rest = first.layout.parts(1).len() - size.fixed - size.large;
        let taken = parts.ledger.lock().unwrap().free.take(rest).unwrap();
        let all = parts.give(2).unwrap();
        assert!(all.large(0, 0).is_some());
        parts.ledger.lock().unwrap().free.give(taken..taken + size.fixed);
        let small = parts.give(2).unwrap();
        let theirs = Part::at(second.clone(), small.place(), 2).unwrap();
        for part in [&small, &theirs] {
            assert!(part.large(0, 0).is_none() && part.reserve(0, 1 << 20) == 0);
        }
        let error = parts.give(2).err().unwrap().to_string();
        assert!(error.contains("bytes of shared memory in") && error.contains("--shm-size"), "{error}");
        assert!(Part::at(second.clone(), second.len() - PAGE, 2).is_err());
        assert!(Part::at(second, small.place() + 1, 2).is_err());
    }
}
