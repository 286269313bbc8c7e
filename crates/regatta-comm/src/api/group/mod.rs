//! The only face of communication: a group of ranks and its collective operations.

mod collectives;
mod fused;
mod generation;
mod handles;
mod join;
mod raw;
#[cfg(all(test, target_os = "linux"))]
mod tests;

use crate::algorithm::Algorithm;
use crate::algorithm::backend::Wanted;
use crate::algorithm::messages::Messages;
use crate::api::buffer::Buffer;
use crate::api::mailbox::Mailbox;
use crate::error::{Error, Result};
use crate::execution::engine::Core;
use crate::execution::queue::Queue;
use crate::execution::traffic::Traffic;
use crate::job::options::Options;
use crate::job::{Job, Link, Reached};
use crate::member::call::{Kind, digest};
use crate::member::context::Context;
use crate::member::joining::Joining;
use crate::member::notes::Notes;
use crate::numbers::element::Element;
use crate::rendezvous::World;
use crate::transport::TransportKind;
use crate::transport::shared::Shared;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A group of ranks. Cloning is cheap and gives the same group.
///
/// All ranks must make the same calls in the same order; calls with a handle count in the order of submission.
/// After an error other than [`Error::Usage`] the group is unusable, and so is the job: all its ranks get an
/// error that names the first failure.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    /// Declared before the core: its thread ends first.
    queue: Queue,
    core: Arc<Core>,
    local: (usize, usize),
    splits: AtomicU64,
    /// Subgroups made so far, by their members.
    subgroups: Mutex<HashMap<Vec<usize>, u64>>,
    /// Rounds of joining that have ended.
    joinings: AtomicU64,
}

impl Group {
    /// Joins the job that this process was started in ([`World::from_env`]); a group of one where no launcher
    /// started it.
    ///
    /// # Errors
    /// Contradicting variables, or ranks that do not come in time.
    pub fn from_env(options: &Options) -> Result<Self> {
        match World::from_env()? {
            Some(world) => Self::connect(&world, options),
            None => Ok(Self::solo()),
        }
    }

    /// Joins the job that `world` describes.
    ///
    /// # Errors
    /// Ranks that do not come within `options.join`, or no transport between them.
    pub fn connect(world: &World, options: &Options) -> Result<Self> {
        Self::assemble(world, options, Reached::new(world, options)?)
    }

    /// As [`connect`](Self::connect), once the job's store is reached.
    pub(crate) fn assemble(world: &World, options: &Options, reached: Reached) -> Result<Self> {
        let job = Arc::new(Job::assemble(world, options, reached)?);
        let names: Arc<[usize]> = (0..world.size).collect();
        Self::enter(job, 0, world.rank, names, (world.local_rank, world.local_size), options)
    }

    /// `size` ranks of this process, one for each thread that is to be one.
    ///
    /// # Panics
    /// Where [`threads_with`](Self::threads_with) has an error: too many ranks.
    pub fn threads(size: usize) -> Vec<Self> {
        Self::threads_with(size, &Options::default()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`threads`](Self::threads), with options; the transport is always `thread`.
    ///
    /// # Errors
    /// More ranks than can share memory (1024), options out of their ranges, or no memory.
    pub fn threads_with(size: usize, options: &Options) -> Result<Vec<Self>> {
        options.check()?;
        Shared::bytes_with_lanes(size, options.lanes)?;
        let names: Arc<[usize]> = (0..size).collect();
        let options = Options { transport: None, ..options.clone() };
        let join = |(rank, job)| Self::enter(Arc::new(job), 0, rank, names.clone(), (rank, size), &options);
        Job::threads(size, &options).into_iter().enumerate().map(join).collect()
    }

    /// A group of one: every operation is local.
    pub fn solo() -> Self {
        let joined = Self::enter(Arc::new(Job::solo()), 0, 0, [0].into(), (0, 1), &Options::default());
        joined.expect("a group of one needs no peer")
    }

    fn enter(
        job: Arc<Job>,
        id: u64,
        rank: usize,
        names: Arc<[usize]>,
        local: (usize, usize),
        options: &Options,
    ) -> Result<Self> {
        let context = Self::context(&job, id, rank, names, options);
        let linked = job.link(id, &context, options);
        let Link { transport, memory } = linked.inspect_err(|error| job.abort(&error.to_string()))?;
        let core = Core::new(job, id, context, options.clone(), transport, memory);
        let inner = Inner {
            queue: Queue::default(),
            core: Arc::new(core),
            local,
            splits: AtomicU64::new(0),
            subgroups: Mutex::default(),
            joinings: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What this rank is to know of the group `id`.
    fn context(job: &Job, id: u64, rank: usize, names: Arc<[usize]>, options: &Options) -> Context {
        let notes = Notes::new(job.directory(), id, names.len(), names[rank]);
        Context {
            rank,
            size: names.len(),
            generation: job.generation,
            hosts: job.by_host(&names).into(),
            names,
            health: job.health.clone(),
            joining: Arc::new(Joining::new(notes.token(0))),
            notes: Arc::new(notes),
            recorder: Arc::default(),
            deadline: options.deadline,
            warn: options.warn,
            on_late: options.on_late.clone(),
        }
    }

    fn core(&self) -> &Core {
        &self.inner.core
    }

    /// This process's (or thread's) rank in the group, 0 to `size() - 1`.
    pub fn rank(&self) -> usize {
        self.core().context.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.core().context.size
    }

    /// Rank among the job's ranks on this host.
    pub fn local_rank(&self) -> usize {
        self.inner.local.0
    }

    /// The job's ranks on this host.
    pub fn local_size(&self) -> usize {
        self.inner.local.1
    }

    /// How the group communicates.
    pub fn transport(&self) -> TransportKind {
        self.core().kind
    }

    /// How an operation with `bytes` of data (on the larger side of a rank) is carried out.
    pub fn algorithm(&self, kind: Kind, bytes: usize) -> Algorithm {
        let wanted = Wanted::plain(kind, self.transport());
        // Joining is not carried out by an algorithm.
        self.core().choose(&wanted, bytes).unwrap_or(Algorithm::Ring)
    }

    /// After how long a wait for a rank is an error.
    pub fn deadline(&self) -> Duration {
        self.core().options.deadline
    }

    /// The ranks of the job that are in the group, by rank of the group.
    pub fn members(&self) -> &[usize] {
        &self.core().context.names
    }

    /// The ranks of the group by host.
    pub fn hosts(&self) -> &[Vec<usize>] {
        &self.core().context.hosts
    }

    /// What this rank has done in the group so far.
    pub fn traffic(&self) -> Traffic {
        self.core().traffic()
    }

    /// Divides the group: ranks with the same `color` form a new group, ordered by `key` and then by rank. A rank
    /// without a color gets none. All ranks of the group call it.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn split(&self, color: Option<u64>, key: i64) -> Result<Option<Self>> {
        let mine = [i64::from(color.is_some()), color.unwrap_or(0).cast_signed(), key];
        let mut all = vec![0; 3 * self.size()];
        self.all_gather(&mine, &mut all)?;
        // Every rank counts the splits of a group alike, so the id is the same for all.
        let number = self.inner.splits.fetch_add(1, Ordering::Relaxed);
        let Some(color) = color else { return Ok(None) };
        let mut members: Vec<(i64, usize)> = all
            .chunks_exact(3)
            .enumerate()
            .filter(|(_, entry)| entry[0] == 1 && entry[1].cast_unsigned() == color)
            .map(|(rank, entry)| (entry[2], rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank()).unwrap_or(0);
        let names = members.iter().map(|&(_, rank)| self.core().context.names[rank]).collect();
        let id = digest(self.core().id, [1, number, color]);
        let core = self.core();
        Self::enter(core.job.clone(), id, rank, names, self.inner.local, &core.options).map(Some)
    }

    /// The group of these `ranks` of this group, numbered in this order. Only they call it, all with the same list.
    ///
    /// # Errors
    /// A list with a rank twice, an unknown one, or without this one; else a failure of communication.
    pub fn subgroup(&self, ranks: &[usize]) -> Result<Self> {
        let core = self.core();
        for (index, &rank) in ranks.iter().enumerate() {
            core.context.rank_exists("subgroup", rank)?;
            if ranks[..index].contains(&rank) {
                return Err(Error::Usage(format!("subgroup: rank {rank} is in the list twice")));
            }
        }
        let Some(rank) = ranks.iter().position(|&rank| rank == self.rank()) else {
            return Err(Error::Usage(format!("subgroup: rank {} is not in its list", self.rank())));
        };
        let number = {
            let mut made = self.inner.subgroups.lock().unwrap_or_else(PoisonError::into_inner);
            let count = made.entry(ranks.to_vec()).or_default();
            *count += 1;
            *count
        };
        let id = digest(core.id, [2, number].into_iter().chain(ranks.iter().map(|&rank| rank as u64)));
        let names = ranks.iter().map(|&rank| core.context.names[rank]).collect();
        Self::enter(core.job.clone(), id, rank, names, self.inner.local, &core.options)
    }

    /// The same ranks as a group of its own, whose operations `algorithm` carries out where it can; none: what the
    /// tuning table says. All ranks of the group call it.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn with_algorithm(&self, algorithm: Option<Algorithm>) -> Result<Self> {
        let core = self.core();
        let number = self.inner.splits.fetch_add(1, Ordering::Relaxed);
        let id = digest(core.id, [3, number]);
        let options = Options { algorithm, ..core.options.clone() };
        Self::enter(core.job.clone(), id, self.rank(), core.context.names.clone(), self.inner.local, &options)
    }

    /// A way to send messages with tags among the ranks of the group, and to receive them from any rank. All ranks of the
    /// group call it.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn mailbox(&self) -> Result<Mailbox> {
        let core = self.core();
        let number = self.inner.splits.fetch_add(1, Ordering::Relaxed);
        let id = digest(core.id, [4, number]);
        let context = Self::context(&core.job, id, self.rank(), core.context.names.clone(), &core.options);
        let linked = core.job.link(id, &context, &core.options);
        let Link { transport, .. } = linked.inspect_err(|error| core.job.abort(&error.to_string()))?;
        let messages = Messages::new(transport, context.size);
        // A rank may send and leave before the others have come: its messages need them there.
        self.barrier()?;
        Ok(Mailbox::new(core.job.clone(), context, id as u32, messages))
    }

    /// Ends the job: pending and future calls of all ranks return an error with this rank and `reason`.
    pub fn abort(&self, reason: &str) {
        self.core().job.abort(reason);
    }

    /// `len` zeros in memory that the transport reduces in place where it has such, else (also where that is
    /// exhausted) on the heap.
    ///
    /// # Errors
    /// More than this machine's memory holds.
    pub fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        #[cfg(target_os = "linux")]
        if let (Some(memory), Some(bytes)) = (&self.core().memory, len.checked_mul(size_of::<T>()))
            && let Some(piece) = memory.allocate(bytes)
        {
            return Ok(Buffer::registered(piece, len));
        }
        Buffer::heap(len)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The operations under way may need peers that wait for this rank: they must hear of it first.
            self.core.job.abort("it panicked");
        }
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group(rank {} of {} over {})", self.rank(), self.size(), self.transport())
    }
}
