//! Ranks as threads of one process: for tests, and for programs that want no processes.

use super::shared::{Region, Shared, Waker};
use super::{Transport, TransportKind};
use crate::error::Result;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

/// Where the threads of a job find the memory of their groups.
#[derive(Default)]
pub(crate) struct Hub {
    regions: Mutex<HashMap<u64, Weak<Heap>>>,
}

impl Hub {
    /// The memory of group `id` with `size` ranks.
    pub(crate) fn region(&self, id: u64, size: usize) -> Arc<Heap> {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = regions.get(&id).and_then(Weak::upgrade) {
            return region;
        }
        let region = Arc::new(Heap::new(Shared::bytes(size)));
        regions.insert(id, Arc::downgrade(&region));
        region
    }
}

/// A region on the heap. Sleeping goes through one condition variable, as every system has.
pub(crate) struct Heap {
    start: NonNull<u8>,
    layout: Layout,
    sleepers: Sleepers,
}

#[derive(Default)]
struct Sleepers {
    lock: Mutex<()>,
    changed: Condvar,
}

// SAFETY: the memory is only reached through `Shared`, which synchronises.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 4096).expect("a region under isize::MAX bytes");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout, sleepers: Sleepers::default() }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Waker for Sleepers {
    fn sleep(&self, word: &AtomicU32, expected: u32, timeout: Duration) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if word.load(Ordering::SeqCst) == expected {
            // A time-out is as good as a wake: the caller looks again.
            let _ = self.changed.wait_timeout(guard, timeout);
        }
    }

    fn wake(&self, _: &AtomicU32) {
        // The lock makes a sleeper either see the new value or hear the call.
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

impl Region for Heap {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn bytes(&self) -> usize {
        self.layout.size()
    }

    fn waker(&self) -> &dyn Waker {
        &self.sleepers
    }
}

/// The endpoint of one thread.
pub(crate) struct ThreadTransport(pub(crate) Shared);

impl Transport for ThreadTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Thread
    }

    fn try_send(&mut self, to: usize, bytes: &[u8]) -> Result<usize> {
        Ok(self.0.try_send(to, bytes))
    }

    fn try_recv(&mut self, from: usize, buffer: &mut [u8]) -> Result<usize> {
        Ok(self.0.try_recv(from, buffer))
    }

    fn wait(&mut self, to: Option<usize>, from: Option<usize>, timeout: Duration) -> Result<()> {
        self.0.wait(to, from, timeout);
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.0.patience.set(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        Some(&mut self.0)
    }
}
