//! Ranks as threads of one process: for tests, and for programs that want no processes.

use super::shared::{Region, Shared, Waker};
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::member::directory::{Directory, Heard, Invitation, Note, Round};
use crate::member::health::{Health, SLICE, gone_on};
use crate::member::rounds::Rounds;
use crate::member::timer::Timer;
use crate::member::waits::Waits;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, BTreeSet, HashMap};
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
}

/// What ranks have said.
#[derive(Default)]
struct Word {
    waits: Waits,
    rounds: Rounds,
    generations: BTreeMap<u64, Generation>,
}

/// One generation of the job.
#[derive(Default)]
struct Generation {
    /// None where nobody has named them yet.
    members: Vec<usize>,
    /// Members that have come.
    here: BTreeSet<usize>,
    health: Arc<Health>,
}

impl Hub {
    /// For a job of `size` ranks, which all are in generation 0; and the health of that, which they share.
    pub(crate) fn new(size: usize) -> (Arc<Self>, Arc<Health>) {
        let hub = Self::default();
        let members: Vec<usize> = (0..size).collect();
        let first = Generation { here: members.iter().copied().collect(), members, ..Generation::default() };
        let health = first.health.clone();
        hub.word().generations.insert(0, first);
        (Arc::new(hub), health)
    }

    /// Rank `rank` goes on from generation `now` to another one, and waits until all its members have come.
    ///
    /// # Errors
    /// A member names others, does not come in time, or has given up.
    pub(crate) fn begin(
        &self,
        rank: usize,
        now: u64,
        generation: u64,
        members: &[usize],
        timer: &Timer,
    ) -> Result<Arc<Health>> {
        let mut word = self.word();
        let begun = word.generations.entry(generation).or_default();
        if begun.members.is_empty() {
            begun.members = members.to_vec();
        }
        if begun.members != members {
            let known = &begun.members;
            let error = Error::Rendezvous(format!(
                "generation {generation} has the members {known:?}, and rank {rank} names {members:?}: all must name the same"
            ));
            begun.health.end(Some(rank), &error.to_string());
            return Err(error);
        }
        begun.here.insert(rank);
        let health = begun.health.clone();
        if let Some(earlier) = word.generations.get_mut(&now) {
            // The others of that generation hear what it means for them: this rank makes no more calls there.
            earlier.here.remove(&rank);
            earlier.health.left(rank);
            if earlier.here.is_empty() {
                earlier.health.end(None, &gone_on(generation));
                word.generations.remove(&now);
            }
        }
        self.changed.notify_all();
        loop {
            health.check()?;
            let missing = word
                .generations
                .get(&generation)
                .and_then(|begun| members.iter().find(|member| !begun.here.contains(member)).copied());
            let Some(missing) = missing else { return Ok(health) };
            if timer.is_over() {
                let error = Error::Rendezvous(format!(
                    "generation {generation}: rank {missing} did not come within {:.1} s",
                    timer.used().as_secs_f64()
                ));
                health.end(Some(rank), &error.to_string());
                return Err(error);
            }
            word = self.changed.wait_timeout(word, SLICE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A rank makes no more calls at all.
    pub(crate) fn leave(&self, rank: usize) {
        let word = self.word();
        for generation in word.generations.values().filter(|generation| generation.members.contains(&rank)) {
            generation.health.left(rank);
        }
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

    fn chain_end(&self, group: u64, rank: usize, peer: usize) -> Result<usize> {
        Ok(self.word().waits.chain_end(group, rank, peer))
    }

    fn join(&self, round: Round, sequence: u32) -> Result<usize> {
        let mut word = self.word();
        let joined = word.rounds.join(round, sequence);
        word.generations.values().for_each(|generation| generation.health.joined(round.token, sequence));
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
