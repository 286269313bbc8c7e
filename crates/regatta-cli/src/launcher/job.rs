//! A job for the launcher.

use regatta_comm::TransportKind;
use std::ffi::OsString;
use std::path::PathBuf;

/// What the launcher starts.
pub struct Job {
    /// The program of every rank.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Number of ranks.
    pub workers: usize,
    /// Threads that each rank computes with.
    pub threads: usize,
    /// Their transport; `None` stands for the fastest that works.
    pub transport: Option<TransportKind>,
    /// Additional environment variables of the ranks.
    pub environment: Vec<(OsString, OsString)>,
    /// The last of them that only serve the others, and need no cores of their own.
    pub servers: usize,
    /// Ranks whose death the others survive.
    pub spared: std::ops::Range<usize>,
    /// Whether the ranks run this program: rank 0 then writes directly to the terminal, for its progress bar, and every
    /// rank reports to the launcher why it fails.
    pub own: bool,
}
