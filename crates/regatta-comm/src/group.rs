//! The only face of communication: a group of ranks and its collective operations.

use crate::algorithm::{Algorithm, Context, select};
use crate::buffer::Buffer;
use crate::element::{Element, ReduceOp};
use crate::engine::{Core, Traffic};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::job::{Job, Link};
use crate::options::Options;
use crate::queue::{Pending, Queue};
use crate::rendezvous::World;
use crate::transport::TransportKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a call that its caller waits for looks for its peers before it sleeps.
const CALLER_PATIENCE: Duration = Duration::from_micros(200);
/// The same on the communication thread, which takes the processor from the caller's computation.
const QUEUE_PATIENCE: Duration = Duration::from_micros(2);

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
    id: u64,
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
        let job = Arc::new(Job::connect(world, options)?);
        let names: Arc<[usize]> = (0..world.size).collect();
        Self::join(job, 0, world.rank, names, (world.local_rank, world.local_size), options)
    }

    /// `size` ranks of this process, one for each thread that is to be one.
    pub fn threads(size: usize) -> Vec<Self> {
        Self::threads_with(size, &Options::default())
    }

    /// As [`threads`](Self::threads), with options; the transport is always `thread`.
    pub fn threads_with(size: usize, options: &Options) -> Vec<Self> {
        let names: Arc<[usize]> = (0..size).collect();
        let options = Options { transport: None, ..options.clone() };
        let join = |(rank, job)| Self::join(Arc::new(job), 0, rank, names.clone(), (rank, size), &options);
        Job::threads(size)
            .into_iter()
            .enumerate()
            .map(|rank_and_job| join(rank_and_job).expect("memory of this process needs no peer"))
            .collect()
    }

    /// A group of one: every operation is local.
    pub fn solo() -> Self {
        let joined = Self::join(Arc::new(Job::solo()), 0, 0, [0].into(), (0, 1), &Options::default());
        joined.expect("a group of one needs no peer")
    }

    fn join(
        job: Arc<Job>,
        id: u64,
        rank: usize,
        names: Arc<[usize]>,
        local: (usize, usize),
        options: &Options,
    ) -> Result<Self> {
        let health = job.health.clone();
        let context = Context { rank, size: names.len(), names, health, deadline: options.deadline };
        let linked = job.link(id, &context, options).and_then(|link| {
            let algorithm = select(link.transport.kind(), options.algorithm)?;
            Ok((link, algorithm))
        });
        let (Link { transport, memory }, algorithm) =
            linked.inspect_err(|error| job.abort(&error.to_string()))?;
        let core = Core::new(job, context, options.clone(), transport, memory, algorithm);
        let inner =
            Inner { queue: Queue::default(), core: Arc::new(core), local, splits: AtomicU64::new(0), id };
        Ok(Self { inner: Arc::new(inner) })
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

    /// How its collective operations are carried out.
    pub fn algorithm(&self) -> Algorithm {
        self.core().algorithm
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
        let id = [number + 1, color].iter().fold(self.inner.id ^ 0xcbf2_9ce4_8422_2325, |id, word| {
            word.to_le_bytes()
                .iter()
                .fold(id, |id, byte| (id ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
        });
        let core = self.core();
        Self::join(core.job.clone(), id, rank, names, self.inner.local, &core.options).map(Some)
    }

    /// Ends the job: pending and future calls of all ranks return an error with this rank and `reason`.
    pub fn abort(&self, reason: &str) {
        self.core().job.abort(reason);
    }

    /// `len` zeros in memory that the transport reduces in place where it has such, else on the heap.
    ///
    /// # Errors
    /// None so far: where registered memory is exhausted, the buffer is on the heap.
    pub fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        #[cfg(target_os = "linux")]
        if let Some(piece) =
            self.core().memory.as_ref().and_then(|memory| memory.allocate(len * size_of::<T>()))
        {
            return Ok(Buffer::registered(piece, len));
        }
        Ok(Buffer::heap(len))
    }

    /// Leaves the reduction of all ranks' `data` by `op` in everyone's: the same bits on every rank.
    ///
    /// # Errors
    /// A rank that died, stalled or called something else.
    pub fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        self.inner.queue.drain();
        self.core().all_reduce(data, op, CALLER_PATIENCE)
    }

    /// Leaves the reduction of everyone's `rank`-th part of `input` in `output`. `input` has `size()` parts as
    /// long as `output`.
    ///
    /// # Errors
    /// Lengths that do not fit; else as [`all_reduce`](Self::all_reduce).
    pub fn reduce_scatter<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        self.inner.queue.drain();
        self.core().reduce_scatter(input, output, op, CALLER_PATIENCE)
    }

    /// Gathers everyone's `input` into everyone's `output`, in the order of ranks. `output` is `size()` times as
    /// long as `input`.
    ///
    /// # Errors
    /// Lengths that do not fit; else as [`all_reduce`](Self::all_reduce).
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.inner.queue.drain();
        self.core().all_gather(input, output, CALLER_PATIENCE)
    }

    /// Copies `data` of rank `root` to everyone.
    ///
    /// # Errors
    /// A root that is no rank; else as [`all_reduce`](Self::all_reduce).
    pub fn broadcast<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        self.inner.queue.drain();
        self.core().broadcast(data, root, CALLER_PATIENCE)
    }

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&self) -> Result<()> {
        self.inner.queue.drain();
        self.core().barrier(CALLER_PATIENCE)
    }

    /// Sends `data` to rank `to`, which receives it by [`recv`](Self::recv) with the same type and length.
    ///
    /// # Errors
    /// A rank that is none or oneself; else as [`all_reduce`](Self::all_reduce).
    pub fn send<T: Element>(&self, data: &[T], to: usize) -> Result<()> {
        self.inner.queue.drain();
        self.core().send(data, to, CALLER_PATIENCE)
    }

    /// Receives `data` from rank `from`.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn recv<T: Element>(&self, data: &mut [T], from: usize) -> Result<()> {
        self.inner.queue.drain();
        self.core().recv(data, from, CALLER_PATIENCE)
    }

    /// [`all_reduce`](Self::all_reduce) that goes on while the caller computes.
    pub fn all_reduce_async<T: Element>(&self, mut data: Buffer<T>, op: ReduceOp) -> Pending<Buffer<T>> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || core.all_reduce(&mut data, op, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`reduce_scatter`](Self::reduce_scatter) that goes on while the caller computes.
    pub fn reduce_scatter_async<T: Element>(
        &self,
        input: Buffer<T>,
        mut output: Buffer<T>,
        op: ReduceOp,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || {
            core.reduce_scatter(&input, &mut output, op, QUEUE_PATIENCE).map(|()| (input, output))
        })
    }

    /// [`all_gather`](Self::all_gather) that goes on while the caller computes.
    pub fn all_gather_async<T: Element>(
        &self,
        input: Buffer<T>,
        mut output: Buffer<T>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        let core = self.inner.core.clone();
        self.inner
            .queue
            .submit(move || core.all_gather(&input, &mut output, QUEUE_PATIENCE).map(|()| (input, output)))
    }

    /// [`broadcast`](Self::broadcast) that goes on while the caller computes.
    pub fn broadcast_async<T: Element>(&self, mut data: Buffer<T>, root: usize) -> Pending<Buffer<T>> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || core.broadcast(&mut data, root, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`barrier`](Self::barrier) that goes on while the caller computes.
    pub fn barrier_async(&self) -> Pending<()> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || core.barrier(QUEUE_PATIENCE))
    }

    /// [`send`](Self::send) that goes on while the caller computes.
    pub fn send_async<T: Element>(&self, data: Buffer<T>, to: usize) -> Pending<Buffer<T>> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || core.send(&data, to, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`recv`](Self::recv) that goes on while the caller computes.
    pub fn recv_async<T: Element>(&self, mut data: Buffer<T>, from: usize) -> Pending<Buffer<T>> {
        let core = self.inner.core.clone();
        self.inner.queue.submit(move || core.recv(&mut data, from, QUEUE_PATIENCE).map(|()| data))
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
