//! How bytes get from rank to rank.
//!
//! Every transport carries a stream of bytes between each pair of ranks. Those whose ranks share memory offer
//! that too, for algorithms that reduce straight from a peer's memory.

mod patience;
pub(crate) mod shared;
#[cfg(target_os = "linux")]
pub(crate) mod shm;
pub(crate) mod tcp;
pub(crate) mod thread;

use crate::error::{Error, Result};
use shared::Shared;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A way of communicating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportKind {
    /// Ranks are threads of one process.
    Thread,
    /// Ranks are processes on one host, over shared memory.
    Shm,
    /// Ranks are processes anywhere, over TCP.
    Tcp,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Thread => "thread",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        })
    }
}

impl FromStr for TransportKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "thread" => Ok(Self::Thread),
            "shm" => Ok(Self::Shm),
            "tcp" => Ok(Self::Tcp),
            other => Err(Error::Usage(format!("unknown transport `{other}`; known are thread, shm and tcp"))),
        }
    }
}

/// The endpoint of one rank in one group. Ranks are numbered within the group.
pub(crate) trait Transport: Send {
    fn kind(&self) -> TransportKind;

    /// Sends as many of `bytes` to rank `to` as go without waiting.
    fn try_send(&mut self, to: usize, bytes: &[u8]) -> Result<usize>;

    /// Receives as many bytes from rank `from` as are there.
    fn try_recv(&mut self, from: usize, buffer: &mut [u8]) -> Result<usize>;

    /// Sleeps until something may have changed for a send to `to` or a receive from `from`, at most `timeout`.
    fn wait(&mut self, to: Option<usize>, from: Option<usize>, timeout: Duration) -> Result<()>;

    /// How long to look for a change before sleeping.
    fn set_patience(&mut self, patience: Duration);

    /// The memory that the ranks share, where they do.
    fn shared(&mut self) -> Option<&mut Shared>;
}
