//! A queue of bytes from each rank to each other one, for algorithms that send messages.
//!
//! The writer alone moves `head`, the reader alone moves `tail`: both only grow. Whoever has moved one of them rings the
//! other rank's `event`, so that it sleeps on one word whatever it waits for.

use super::{Control, HEADER, Shared};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Most bytes of all channels, as far as a channel may be smaller.
const CHANNELS: usize = 8 << 20;

/// Bytes of a channel between two of `size` ranks: a power of two. There are size^2 of them, so they are smaller in
/// large groups.
fn channel_bytes(size: usize) -> usize {
    (1 << (CHANNELS / (size * size)).max(1).ilog2()).clamp(4 << 10, 64 << 10)
}

/// Bytes of all channels between `size` ranks.
pub(super) fn channels_bytes(size: usize) -> usize {
    size * size * (size_of::<Channel>() + channel_bytes(size))
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

impl Shared {
    fn channel(&self, from: usize, to: usize) -> (&Channel, *mut u8) {
        assert!(from < self.size && to < self.size);
        let index = from * self.size + to;
        let base = HEADER + self.size * size_of::<Control>();
        let start = self.at(base + index * (size_of::<Channel>() + channel_bytes(self.size)));
        // SAFETY: as for `control`; the channel's bytes follow its counters.
        unsafe { (&*start.cast::<Channel>(), start.add(size_of::<Channel>())) }
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

const _: () = assert!(size_of::<Channel>() == 128);
