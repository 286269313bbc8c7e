//! Ranks that an MPI library connects: streams made of its messages, and its own collective operations.
//!
//! Nothing here blocks in MPI but the making of a group's communicator, which is watched from outside: a rank that
//! dies must not take the others with it.

mod library;
mod native;

pub(crate) use native::Native;
pub(crate) use native::{all_gather, all_reduce, all_to_all, barrier, broadcast, reduce, reduce_scatter};

use super::patience::Patience;
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::member::context::Context;
use crate::member::health::{Health, SLICE};
use crate::member::timer::Timer;
use crate::rendezvous::store::StoreClient;
use ::mpi::ffi;
use library::{Library, Loan, OPEN, finalized, library};
use std::collections::VecDeque;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Bytes of a message at most.
const MESSAGE: usize = 64 << 10;
/// Messages under way to a peer, and from it.
const WINDOW: usize = 8;
/// Memory of messages that is kept for more.
const SPARE: usize = 4 * WINDOW;
/// The tag of all messages: they come in their order.
const TAG: c_int = 0;
/// MPI has nothing to sleep on: the first sleep between two looks, and the longest.
const NAPS: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(200)];

/// A group's communicator.
struct Comm {
    library: &'static Library,
    handle: ffi::MPI_Comm,
}

// SAFETY: MPI lets any thread use a communicator.
unsafe impl Send for Comm {}

impl Comm {
    /// The communicator of these ranks of the world. All of them call it.
    fn new(library: &'static Library, ranks: &[c_int], tag: c_int) -> Result<Self> {
        // SAFETY: the handles are MPI's own, or made by the calls before; `ranks` are ranks of the world.
        unsafe {
            let (mut world, mut group) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
            let mut handle = ffi::RSMPI_COMM_NULL;
            let action = || format!("make a communicator of {} ranks", ranks.len());
            let call = |call: &mut dyn FnMut() -> c_int| library.call(format_args!("{}", action()), call);
            call(&mut || ffi::MPI_Comm_group(ffi::RSMPI_COMM_WORLD, &mut world))?;
            call(&mut || ffi::MPI_Group_incl(world, ranks.len() as c_int, ranks.as_ptr(), &mut group))?;
            call(&mut || ffi::MPI_Comm_create_group(ffi::RSMPI_COMM_WORLD, group, tag, &mut handle))?;
            call(&mut || ffi::MPI_Group_free(&mut group))?;
            call(&mut || ffi::MPI_Group_free(&mut world))?;
            call(&mut || ffi::MPI_Comm_set_errhandler(handle, ffi::RSMPI_ERRORS_RETURN))?;
            Ok(Self { library, handle })
        }
    }

    fn send(&self, to: usize, name: usize, bytes: Vec<u8>) -> Result<Loan<Vec<u8>>> {
        Loan::new(self.library, format_args!("send to rank {name} through MPI"), bytes, |bytes, request| {
            let (start, len) = (bytes.as_ptr().cast(), bytes.len() as c_int);
            // SAFETY: the loan keeps the bytes until the request is done.
            unsafe { ffi::MPI_Isend(start, len, ffi::RSMPI_UINT8_T, to as c_int, TAG, self.handle, request) }
        })
    }

    /// Begins to receive the next message from `from`, if there is one; `memory` gives its memory.
    fn receive(
        &self,
        from: usize,
        name: usize,
        memory: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<Loan<Vec<u8>>>> {
        let (mut there, mut len) = (0, 0);
        let mut status = MaybeUninit::uninit();
        // SAFETY: only read.
        let mut message = unsafe { ffi::RSMPI_MESSAGE_NULL };
        let action = || format!("receive from rank {name} through MPI");
        self.library.call(format_args!("receive through MPI"), || {
            // SAFETY: the communicator exists; all other arguments are only written.
            unsafe {
                ffi::MPI_Improbe(
                    from as c_int,
                    TAG,
                    self.handle,
                    &mut there,
                    &mut message,
                    status.as_mut_ptr(),
                )
            }
        })?;
        if there == 0 {
            return Ok(None);
        }
        self.library.call(format_args!("{}", action()), || {
            // SAFETY: a message was found, so the probe has written its status.
            unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut len) }
        })?;
        let mut bytes = memory();
        bytes.resize(len.max(0) as usize, 0);
        let start = |bytes: &mut Vec<u8>, request: &mut ffi::MPI_Request| {
            let start = bytes.as_mut_ptr().cast();
            // SAFETY: the message was found and is received once; the loan keeps the memory until the request is
            // done.
            unsafe { ffi::MPI_Imrecv(start, len, ffi::RSMPI_UINT8_T, &mut message, request) }
        };
        Loan::new(self.library, format_args!("{}", action()), bytes, start).map(Some)
    }
}

/// Both directions between this rank and a peer.
#[derive(Default)]
struct Lane {
    sending: VecDeque<Loan<Vec<u8>>>,
    receiving: VecDeque<Loan<Vec<u8>>>,
    /// A message that is here, and how much of it has been handed out.
    here: Vec<u8>,
    taken: usize,
}

/// The endpoint of one process.
pub(crate) struct MpiTransport {
    native: Native,
    lanes: Vec<Lane>,
    names: Arc<[usize]>,
    health: Arc<Health>,
    spare: Vec<Vec<u8>>,
    /// Messages that have not left.
    unsent: usize,
}

impl MpiTransport {
    /// Connects the ranks of the group `id`, who all call it, and meet in the store before they do in MPI.
    pub(crate) fn connect(store: &StoreClient, id: u64, context: &Context, timer: &Timer) -> Result<Self> {
        let in_time = |what: &str| {
            context.health.check()?;
            match timer.is_over() {
                false => Ok(()),
                true => Err(Error::Rendezvous(format!(
                    "{what} has not ended in time: were all ranks started by mpirun or srun, with the same \
                     transport? (the time can be set by REGATTA_JOIN_S)"
                ))),
            }
        };
        OPEN.fetch_add(1, Ordering::AcqRel);
        let library = library(|| in_time("MPI_Init_thread"))?;
        let place = |(rank, size): (usize, usize)| format!("rank {rank} of {size}");
        let prefix = format!("mpi/{id:x}/");
        store.set(&format!("{prefix}{}", context.rank), place(library.world).as_bytes())?;
        for (said, &peer) in store.gather(&prefix, &context.names, timer)?.iter().zip(&*context.names) {
            let said = String::from_utf8_lossy(said);
            if said != place((peer, library.world.1)) {
                return Err(Error::Rendezvous(format!(
                    "rank {peer} is {said} for MPI, which has to know the same ranks: start the program by mpirun or \
                     srun of the MPI library that it was built with"
                )));
            }
        }
        let ranks: Vec<c_int> = context.names.iter().map(|&name| name as c_int).collect();
        // Every MPI library takes tags up to 32767.
        let tag = (id % 32_768) as c_int;
        // It blocks, so a thread does it, which is left to itself where a rank does not come.
        let (sender, made) = channel();
        std::thread::spawn(move || {
            // Nobody may wait for it any longer.
            let _ = sender.send(Comm::new(library, &ranks, tag));
        });
        let comm = loop {
            match made.recv_timeout(SLICE) {
                Ok(comm) => break comm?,
                Err(RecvTimeoutError::Timeout) => in_time("MPI_Comm_create_group")?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Rendezvous("the thread that makes a communicator has ended".into()));
                }
            }
        };
        Ok(Self {
            native: Native::new(comm, context.size),
            lanes: (0..context.size).map(|_| Lane::default()).collect(),
            names: context.names.clone(),
            health: context.health.clone(),
            spare: vec![],
            unsent: 0,
        })
    }

    /// A failure of MPI; the reason for it where others know more.
    fn failed<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| self.health.verdict(error))
    }

    fn keep(&mut self, mut memory: Vec<u8>) {
        if self.spare.len() < SPARE {
            memory.clear();
            self.spare.push(memory);
        }
    }

    /// Takes back the memory of messages to `to` that have left; how many there were.
    fn reclaim(&mut self, to: usize) -> Result<usize> {
        let mut left = 0;
        while let Some(first) = self.lanes[to].sending.front_mut() {
            let Some(memory) = first.reclaim(self.native.comm.library)? else { break };
            self.lanes[to].sending.pop_front();
            self.keep(memory);
            self.unsent -= 1;
            left += 1;
        }
        Ok(left)
    }

    /// Whether there are bytes from `from`. Receives what has come.
    fn has_bytes(&mut self, from: usize) -> Result<bool> {
        while self.lanes[from].receiving.len() < WINDOW {
            let memory = || self.spare.pop().unwrap_or_default();
            let Some(message) = self.native.comm.receive(from, self.names[from], memory)? else { break };
            self.lanes[from].receiving.push_back(message);
        }
        let lane = &mut self.lanes[from];
        if lane.taken < lane.here.len() {
            return Ok(true);
        }
        let Some(first) = lane.receiving.front_mut() else { return Ok(false) };
        let Some(memory) = first.reclaim(self.native.comm.library)? else { return Ok(false) };
        lane.receiving.pop_front();
        let used = std::mem::replace(&mut lane.here, memory);
        lane.taken = 0;
        let any = !lane.here.is_empty();
        self.keep(used);
        Ok(any)
    }

    /// Whether a message to one of `to` has left, or there are bytes from one of `from`.
    fn is_ready(&mut self, to: &[usize], from: &[usize]) -> Result<bool> {
        for &peer in to {
            if self.reclaim(peer)? > 0 || self.lanes[peer].sending.is_empty() {
                return Ok(true);
            }
        }
        for &peer in from {
            if self.has_bytes(peer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn start(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        self.reclaim(to)?;
        let [mut one, mut two] = parts;
        let mut taken = 0;
        while one.len() + two.len() > 0 && self.lanes[to].sending.len() < WINDOW {
            let mut bytes = self.spare.pop().unwrap_or_default();
            for part in [&mut one, &mut two] {
                let (now, later) = part.split_at(part.len().min(MESSAGE - bytes.len()));
                bytes.extend_from_slice(now);
                *part = later;
            }
            taken += bytes.len();
            let message = self.native.comm.send(to, self.names[to], bytes)?;
            self.lanes[to].sending.push_back(message);
            self.unsent += 1;
        }
        Ok(taken)
    }

    fn take(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let mut taken = 0;
        for part in parts {
            let mut rest = part;
            while !rest.is_empty() {
                if !self.has_bytes(from)? {
                    return Ok(taken);
                }
                let lane = &mut self.lanes[from];
                let bytes = &lane.here[lane.taken..];
                let count = bytes.len().min(rest.len());
                rest[..count].copy_from_slice(&bytes[..count]);
                rest = &mut rest[count..];
                lane.taken += count;
                taken += count;
            }
        }
        Ok(taken)
    }
}

/// Looks until `ready` says so; whether it did within `patience` and then `timeout`.
fn look(patience: &Patience, timeout: Duration, mut ready: impl FnMut() -> bool) -> bool {
    if patience.look(&mut ready) {
        return true;
    }
    let until = Instant::now() + timeout;
    let [mut nap, longest] = NAPS;
    while !ready() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(nap);
        nap = longest.min(2 * nap);
    }
    true
}

impl Transport for MpiTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Mpi
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        let outcome = self.start(to, parts);
        self.failed(outcome)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let outcome = self.take(from, parts);
        self.failed(outcome)
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        let patience = std::mem::take(&mut self.native.patience);
        let mut outcome = Ok(true);
        look(&patience, timeout, || {
            outcome = self.is_ready(to, from);
            outcome.as_ref().copied().unwrap_or(true)
        });
        self.native.patience = patience;
        self.failed(outcome).map(|_| ())
    }

    fn unsent(&mut self) -> Result<Option<usize>> {
        if self.unsent == 0 {
            return Ok(None);
        }
        let mut unsent = None;
        for peer in 0..self.lanes.len() {
            let outcome = self.reclaim(peer);
            self.failed(outcome)?;
            if !self.lanes[peer].sending.is_empty() {
                unsent = Some(peer);
            }
        }
        Ok(unsent)
    }

    fn set_patience(&mut self, patience: Duration) {
        self.native.patience.set(patience);
    }

    fn native(&mut self) -> Option<&mut Native> {
        Some(&mut self.native)
    }
}

impl Drop for MpiTransport {
    fn drop(&mut self) {
        let busy = self.lanes.iter().any(|lane| !lane.sending.is_empty() || !lane.receiving.is_empty());
        if busy || self.native.broken || self.health.check().is_err() {
            // Counted as open for ever: after a failure MPI is not finalised.
            return;
        }
        if !finalized() {
            let handle = &mut self.native.comm.handle;
            let free = self.native.comm.library.call(format_args!("free a communicator"), || {
                // SAFETY: no request is left on the communicator, and it is not used again.
                unsafe { ffi::MPI_Comm_free(handle) }
            });
            if free.is_err() {
                return;
            }
        }
        OPEN.fetch_sub(1, Ordering::AcqRel);
    }
}
