//! The memory itself, as the transports provide it.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

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

    /// Where large slot `index` (0 or 1) of `owner` lies: room for [`LARGE`](super::LARGE) bytes, of which those that were reserved
    /// may be used.
    fn large(&self, _owner: usize, _index: usize) -> Option<NonNull<u8>> {
        None
    }
}

/// The part of a region that one lane uses.
pub(crate) struct Window {
    pub(super) region: Arc<dyn Region>,
    pub(super) offset: usize,
    pub(super) len: usize,
    /// The region's owner of large slots that is rank 0 in this window.
    pub(super) owner: usize,
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
