//! How bytes get from rank to rank.
//!
//! Every transport carries a stream of bytes between each pair of ranks. Those whose ranks share memory offer
//! that too, for algorithms that reduce straight from a peer's memory.

mod lateness;
pub(crate) mod mixed;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
mod patience;
pub(crate) mod registered;
pub(crate) mod shared;
#[cfg(target_os = "linux")]
pub(crate) mod shm;
#[cfg(any(test, fuzzing))]
pub(crate) mod simulated;
pub(crate) mod tcp;
pub(crate) mod thread;
#[cfg(target_os = "linux")]
mod zero_copy;

use crate::error::{Error, Result};
use shared::Shared;
#[cfg(target_os = "linux")]
pub(crate) use shm::Registry;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A way of communicating.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TransportKind {
    /// Ranks are threads of one process.
    Thread,
    /// Ranks are processes on one host, over shared memory.
    Shm,
    /// Ranks are processes anywhere, over TCP.
    Tcp,
    /// Ranks are processes on several hosts: shared memory inside each, TCP between them.
    Mixed,
    /// Ranks are processes that an MPI library connects (feature `mpi`).
    Mpi,
}

impl TransportKind {
    /// All ways of communicating.
    pub const ALL: &'static [Self] = &[Self::Thread, Self::Shm, Self::Tcp, Self::Mixed, Self::Mpi];

    /// Whether this program was built with it: `mpi` is the one that takes a cargo feature.
    ///
    /// # Errors
    /// It was not; the error says how to build it.
    pub fn check_built(self) -> Result<()> {
        if self != Self::Mpi || cfg!(feature = "mpi") {
            return Ok(());
        }
        Err(Error::Usage(
            "the mpi transport is not in this program: build it against this machine's MPI library, `cargo install \
             --path crates/regatta-cli --features mpi`, or your own program with the feature `mpi` of the crates \
             regatta and regatta-comm (docs/mpi.md)"
                .into(),
        ))
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Thread => "thread",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Mixed => "mixed",
            Self::Mpi => "mpi",
        })
    }
}

impl FromStr for TransportKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|kind| kind.to_string() == text).ok_or_else(|| {
            let known = Self::ALL.iter().map(Self::to_string).collect::<Vec<_>>().join(", ");
            Error::Usage(format!("unknown transport `{text}`; known are {known}"))
        })
    }
}

/// Registered memory, of which there is none here.
#[cfg(not(target_os = "linux"))]
pub(crate) enum Registry {}

#[cfg(not(target_os = "linux"))]
impl registered::Registered for Registry {
    fn place(&self, _: &[u8]) -> Option<u64> {
        match *self {}
    }

    fn at(&self, _: usize, _: u64, _: usize) -> Option<*mut u8> {
        match *self {}
    }
}

/// The endpoint of one rank in one group. Ranks are numbered within the group.
pub(crate) trait Transport {
    fn kind(&self) -> TransportKind;

    /// Sends as many bytes of `parts`, one after the other, to rank `to` as go without waiting.
    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize>;

    /// Receives as many bytes from rank `from` as are there, into `parts`, one after the other.
    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize>;

    /// Sleeps until something may have changed for a send to one of `to` or a receive from one of `from`, at most
    /// `timeout`.
    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()>;

    /// Sends what was taken by `try_send` and has not left yet; the peer of what still has not.
    fn unsent(&mut self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Whether memory may be lent to the transport until [`unsent`](Self::unsent) says that nothing is left: not where
    /// an operation writes numbers that it has sent, before the peer can have received them.
    fn lend(&mut self, _allowed: bool) {}

    /// An operation, or a part of one, with so many bytes begins.
    fn enter(&mut self, _bytes: usize) {}

    /// The peers were in the operation, too, and kept this rank waiting for so long.
    fn has_waited(&mut self, _waited: Duration) {}

    /// How long to look for a change before sleeping.
    fn set_patience(&mut self, patience: Duration);

    /// The memory that this rank shares with those of its host, where they do; ranks are numbered within the host.
    fn shared(&mut self) -> Option<&mut Shared> {
        None
    }

    /// The same memory, and what connects this rank with other hosts: for two threads at once.
    fn split(&mut self) -> Option<(&mut Shared, &mut (dyn Transport + Send))> {
        None
    }

    /// Collective operations that the transport has itself.
    #[cfg(feature = "mpi")]
    fn native(&mut self) -> Option<&mut mpi::Native> {
        None
    }
}

/// Some ranks of a transport, numbered anew.
pub(crate) struct Among<'a> {
    pub transport: &'a mut (dyn Transport + Send),
    /// The transport's rank of each.
    pub ranks: &'a [usize],
}

impl Transport for Among<'_> {
    fn kind(&self) -> TransportKind {
        self.transport.kind()
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        self.transport.try_send(self.ranks[to], parts)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        self.transport.try_recv(self.ranks[from], parts)
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        let ranks = |list: &[usize]| list.iter().map(|&rank| self.ranks[rank]).collect::<Vec<_>>();
        let (to, from) = (ranks(to), ranks(from));
        self.transport.wait(&to, &from, timeout)
    }

    fn unsent(&mut self) -> Result<Option<usize>> {
        let peer = self.transport.unsent()?;
        Ok(peer.map(|peer| self.ranks.iter().position(|&rank| rank == peer).unwrap_or(0)))
    }

    fn lend(&mut self, allowed: bool) {
        self.transport.lend(allowed);
    }

    fn enter(&mut self, bytes: usize) {
        self.transport.enter(bytes);
    }

    fn has_waited(&mut self, waited: Duration) {
        self.transport.has_waited(waited);
    }

    fn set_patience(&mut self, patience: Duration) {
        self.transport.set_patience(patience);
    }
}
