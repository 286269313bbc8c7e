//! The only face of communication: a group of ranks and its collective operations.

use crate::algorithm::{Algorithm, Context, direct, ring, select, stream};
use crate::buffer::Buffer;
use crate::call::{Call, Kind};
use crate::element::{DType, Element, ReduceOp};
use crate::error::{Error, Result};
use crate::job::{Job, Link, Memory};
use crate::options::Options;
use crate::queue::{Pending, Queue};
use crate::rendezvous::World;
use crate::transport::shared::Shared;
use crate::transport::{Transport, TransportKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

/// What operations need, shared with the communication thread.
struct Core {
    context: Context,
    options: Options,
    kind: TransportKind,
    algorithm: Algorithm,
    memory: Option<Arc<dyn Memory>>,
    engine: Mutex<Engine>,
    job: Arc<Job>,
}

struct Engine {
    transport: Box<dyn Transport>,
    failed: Option<Error>,
    traffic: Traffic,
}

/// What a group has done so far on this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations.
    pub operations: u64,
    /// Bytes of their data (of the larger side).
    pub bytes: u64,
    /// Time spent in them.
    pub busy: Duration,
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
        let core = Core {
            context,
            options: options.clone(),
            kind: transport.kind(),
            algorithm,
            memory,
            engine: Mutex::new(Engine { transport, failed: None, traffic: Traffic::default() }),
            job,
        };
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
        self.core().lock().traffic
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
        let options = Options { transport: Some(self.transport()), ..self.core().options.clone() };
        let options = match self.transport() {
            TransportKind::Thread => Options { transport: None, ..options },
            _ => options,
        };
        Self::join(self.core().job.clone(), id, rank, names, self.inner.local, &options).map(Some)
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

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group(rank {} of {} over {})", self.rank(), self.size(), self.transport())
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one operation; after a failure, ends the job.
    fn run(
        &self,
        call: Call,
        bytes: usize,
        patience: Duration,
        operation: impl FnOnce(&mut dyn Transport) -> Result<()>,
    ) -> Result<()> {
        let mut engine = self.lock();
        if let Some(error) = &engine.failed {
            return Err(error.clone());
        }
        let begun = Instant::now();
        engine.transport.set_patience(patience);
        let outcome = self.context.health.check().and_then(|()| match self.context.size {
            1 => Ok(()),
            _ => operation(&mut *engine.transport),
        });
        let Err(error) = outcome else {
            engine.traffic.operations += 1;
            engine.traffic.bytes += bytes as u64;
            engine.traffic.busy += begun.elapsed();
            return Ok(());
        };
        let error = match error {
            Error::PeerDied { rank, .. } => {
                self.context.health.verdict(Error::PeerDied { rank, call: call.to_string() })
            }
            Error::Deadline { rank, call, waited } => {
                // Others may have learnt more meanwhile.
                let rank = self.job.blame(rank);
                self.context.health.check().err().unwrap_or(Error::Deadline { rank, call, waited })
            }
            error => error,
        };
        engine.failed = Some(error.clone());
        drop(engine);
        if !matches!(error, Error::Aborted { .. }) {
            self.job.abort(&error.to_string());
        }
        Err(error)
    }

    /// The shared memory, for the direct algorithms.
    fn shared(transport: &mut dyn Transport) -> Result<&mut Shared> {
        transport.shared().ok_or_else(|| Error::Usage("the direct algorithm needs shared memory".into()))
    }

    fn fits(&self, what: &str, whole: usize, part: usize) -> Result<()> {
        let size = self.context.size;
        if Some(whole) == part.checked_mul(size) {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{what}: {whole} elements are not {size} parts (one for each rank) of {part} elements"
        )))
    }

    fn rank_exists(&self, what: &str, rank: usize) -> Result<()> {
        if rank < self.context.size {
            return Ok(());
        }
        Err(Error::Usage(format!("{what}: there is no rank {rank} in a group of {}", self.context.size)))
    }

    fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp, patience: Duration) -> Result<()> {
        let call = Call::new(Kind::AllReduce, T::DTYPE, data.len()).op(op);
        self.run(call, size_of_val(data), patience, |transport| match self.algorithm {
            Algorithm::Direct => {
                let memory = self.memory.as_ref().map(|memory| &**memory as &dyn direct::Registered);
                direct::all_reduce(Self::shared(transport)?, memory, call, data)
            }
            Algorithm::Ring => ring::all_reduce(transport, &self.context, call, data),
        })
    }

    fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        patience: Duration,
    ) -> Result<()> {
        self.fits("reduce_scatter", input.len(), output.len())?;
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let call = Call::new(Kind::ReduceScatter, T::DTYPE, output.len()).op(op);
        self.run(call, size_of_val(input), patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::reduce_scatter(Self::shared(transport)?, call, input, output),
            Algorithm::Ring => ring::reduce_scatter(transport, &self.context, call, input, output),
        })
    }

    fn all_gather<T: Element>(&self, input: &[T], output: &mut [T], patience: Duration) -> Result<()> {
        self.fits("all_gather", output.len(), input.len())?;
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let call = Call::new(Kind::AllGather, T::DTYPE, input.len());
        self.run(call, size_of_val(output), patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::all_gather(Self::shared(transport)?, call, input, output),
            Algorithm::Ring => ring::all_gather(transport, &self.context, call, input, output),
        })
    }

    fn broadcast<T: Element>(&self, data: &mut [T], root: usize, patience: Duration) -> Result<()> {
        self.rank_exists("broadcast", root)?;
        let call = Call::new(Kind::Broadcast, T::DTYPE, data.len()).root(root);
        self.run(call, size_of_val(data), patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::broadcast(Self::shared(transport)?, call, data),
            Algorithm::Ring => ring::broadcast(transport, &self.context, call, data),
        })
    }

    fn barrier(&self, patience: Duration) -> Result<()> {
        let call = Call::new(Kind::Barrier, DType::U8, 0);
        self.run(call, 0, patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::barrier(Self::shared(transport)?, call),
            Algorithm::Ring => stream::barrier(transport, &self.context, call),
        })
    }

    fn other(&self, what: &str, peer: usize) -> Result<()> {
        self.rank_exists(what, peer)?;
        if peer == self.context.rank {
            return Err(Error::Usage(format!("{what}: rank {peer} is this rank itself")));
        }
        Ok(())
    }

    fn send<T: Element>(&self, data: &[T], to: usize, patience: Duration) -> Result<()> {
        self.other("send", to)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        self.run(call, size_of_val(data), patience, |transport| {
            let mut streams = stream::Streams { transport, context: &self.context, call };
            streams.exchange(Some((to, bytemuck::cast_slice(data))), None)
        })
    }

    fn recv<T: Element>(&self, data: &mut [T], from: usize, patience: Duration) -> Result<()> {
        self.other("recv", from)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        self.run(call, size_of_val(data), patience, |transport| {
            let mut streams = stream::Streams { transport, context: &self.context, call };
            streams.exchange(None, Some((from, bytemuck::cast_slice_mut(data))))
        })
    }
}
