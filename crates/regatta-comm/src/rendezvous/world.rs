//! A process's place in its job.

use crate::error::{Error, Result};
use std::path::PathBuf;

/// Where the job's store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreAt {
    /// Somebody else runs it, at `host:port`.
    Elsewhere(String),
    /// Rank 0 runs it.
    Rank0 {
        /// Rank 0's host.
        host: String,
        /// The port that the environment gives.
        port: u16,
        /// The port itself is taken by the launcher: use one of the 32 that follow.
        beside: bool,
    },
    /// Rank 0 runs it on a free port and writes the address into this file; all ranks are on one host.
    File(PathBuf),
}

/// A process's place in its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// Rank, 0 to `size - 1`.
    pub rank: usize,
    /// Ranks in the job.
    pub size: usize,
    /// Rank among those on this host.
    pub local_rank: usize,
    /// Ranks on this host.
    pub local_size: usize,
    /// How ranks find each other.
    pub store: StoreAt,
    /// Tells this job from others that might use the same port.
    pub job: String,
    /// What ranks on one host have in common: [`host_identity`](crate::host_identity).
    pub host: String,
}

/// Ports that are tried after one that is taken.
pub(crate) const BESIDE: u16 = 32;

impl World {
    /// Most ranks of a job.
    pub(crate) const MOST_RANKS: usize = 1 << 16;

    /// Whether the numbers go together.
    ///
    /// # Errors
    /// Which of them do not.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { rank, size, local_rank, local_size, .. } = *self;
        let problem = if !(1..=Self::MOST_RANKS).contains(&size) {
            format!("a job of {size} ranks: give 1 to {}", Self::MOST_RANKS)
        } else if rank >= size {
            format!("rank {rank} in a job of {size} ranks: they are numbered from 0 to {}", size - 1)
        } else if local_rank >= local_size {
            format!("local rank {local_rank} of {local_size} ranks on this host")
        } else {
            return Ok(());
        };
        Err(Error::Usage(problem))
    }

    /// A rank of a job on this host, whose store is at `address`.
    pub fn local(rank: usize, size: usize, address: &str) -> Self {
        let store = StoreAt::Elsewhere(address.into());
        let (local_rank, local_size) = (rank, size);
        Self {
            rank,
            size,
            local_rank,
            local_size,
            store,
            job: String::new(),
            host: crate::host::host_identity(),
        }
    }
}
