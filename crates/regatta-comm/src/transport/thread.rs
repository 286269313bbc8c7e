//! Ranks as threads of one process: for tests, and for programs that want no processes.

use super::shared::{Region, Shared, Waker};
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::member::directory::{Directory, Heard, Invitation, Note, Round};
use crate::member::health::Health;
use crate::member::rounds::Rounds;
use crate::member::waits::Waits;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Where the threads of a job find the memory of their groups, and leave each other word.
#[derive(Default)]
pub(crate) struct Hub {
    regions: Mutex<HashMap<u64, Weak<Heap>>>,
    word: Mutex<Word>,
    changed: Condvar,
    health: Arc<Health>,
}

/// What ranks have said.
#[derive(Default)]
struct Word {
    waits: Waits,
    rounds: Rounds,
}

impl Hub {
    /// The health of the job, which the ranks share.
    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    fn word(&self) -> MutexGuard<'_, Word> {
        self.word.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory of group `id` with `size` ranks.
    ///
    /// # Errors
    /// More ranks than can share memory, or none to share.
    pub(crate) fn region(&self, id: u64, size: usize, lanes: usize) -> Result<Arc<Heap>> {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = regions.get(&id).and_then(Weak::upgrade) {
            return Ok(region);
        }
        let region = Arc::new(Heap::new(Shared::bytes_with_lanes(size, lanes)?)?);
        regions.insert(id, Arc::downgrade(&region));
        Ok(region)
    }
}

impl Directory for Hub {
    fn say(&self, group: u64, note: &Note, seen: u64) -> Result<Heard> {
        Ok(self.word().waits.say(group, note, seen))
    }

    fn unsay(&self, group: u64, rank: usize) -> Result<()> {
        self.word().waits.unsay(group, rank);
        Ok(())
    }

    fn culprit(&self, group: u64, rank: usize, peer: usize) -> Result<usize> {
        Ok(self.word().waits.culprit(group, rank, peer))
    }

    fn join(&self, round: Round, sequence: u32) -> Result<usize> {
        let joined = self.word().rounds.join(round, sequence);
        self.health.joined(round.token, sequence);
        Ok(joined)
    }

    fn joined(&self, token: u64) -> Result<Vec<usize>> {
        Ok(self.word().rounds.joined(token))
    }

    fn invite(&self, round: Round, sequence: u32, invitation: Invitation) -> Result<()> {
        self.word().rounds.invite(round, sequence, invitation);
        self.changed.notify_all();
        Ok(())
    }

    fn invited(&self, round: Round, sequence: u32, until: Instant) -> Result<Option<Invitation>> {
        let mut word = self.word();
        loop {
            let invitation = word.rounds.invited(round, sequence);
            let left = until.saturating_duration_since(Instant::now());
            if invitation.is_some() || left.is_zero() {
                return Ok(invitation);
            }
            word = self.changed.wait_timeout(word, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lost(&self) -> Option<Option<usize>> {
        None
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
    fn new(len: usize) -> Result<Self> {
        let fail = |reason: &str| Error::System {
            action: format!("allocate {len} bytes for threads to share"),
            reason: reason.into(),
        };
        let layout = Layout::from_size_align(len, 4096).map_err(|error| fail(&error.to_string()))?;
        if len == 0 {
            return Err(fail("nothing would be shared"));
        }
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).ok_or_else(|| fail("there is not so much memory"))?;
        Ok(Self { start, layout, sleepers: Sleepers::default() })
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

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        Ok(self.0.try_send(to, parts))
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        Ok(self.0.try_recv(from, parts))
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        self.0.wait(to, from, timeout);
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.0.set_patience(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        Some(&mut self.0)
    }
}
