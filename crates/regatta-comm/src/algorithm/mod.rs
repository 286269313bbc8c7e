//! Algorithms, a file each; [`select`] says which is used where.

pub(crate) mod direct;
pub(crate) mod ring;
pub(crate) mod stream;

use crate::error::{Error, Result};
use crate::health::Health;
use crate::transport::TransportKind;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How a collective operation is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Each rank reduces its own slice straight from its peers' memory.
    Direct,
    /// Reduce-scatter, then all-gather around a ring.
    Ring,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Ring => "ring",
        })
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "direct" => Ok(Self::Direct),
            "ring" => Ok(Self::Ring),
            other => Err(Error::Usage(format!("unknown algorithm `{other}`; known are direct and ring"))),
        }
    }
}

/// The algorithm for a transport: direct where ranks share memory, the ring elsewhere, unless one is wanted.
///
/// # Errors
/// When the wanted one cannot work there.
pub(crate) fn select(transport: TransportKind, wanted: Option<Algorithm>) -> Result<Algorithm> {
    match (transport, wanted) {
        (TransportKind::Tcp, Some(Algorithm::Direct)) => {
            Err(Error::Usage("the direct algorithm needs shared memory; over tcp use ring".into()))
        }
        (_, Some(wanted)) => Ok(wanted),
        (TransportKind::Tcp, None) => Ok(Algorithm::Ring),
        (TransportKind::Thread | TransportKind::Shm, None) => Ok(Algorithm::Direct),
    }
}

/// What an algorithm knows of its group.
#[derive(Clone)]
pub(crate) struct Context {
    pub rank: usize,
    pub size: usize,
    /// Ranks of the world by rank of the group, for errors.
    pub names: Arc<[usize]>,
    pub health: Arc<Health>,
    pub deadline: Duration,
}
