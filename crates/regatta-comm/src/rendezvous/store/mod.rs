//! The job's directory: a small key/value store over TCP, run by the launcher or by rank 0.
//!
//! Every rank keeps two connections: one for requests, one to *watch*. The watch connection is how the death of
//! a process is noticed at once: when it closes without a goodbye, the server tells all others. Whatever fails
//! first is what every rank reports.
//!
//! A rank is present from the moment at which it has said that it knows: the server answers its greeting, and the rank
//! confirms. A rank that gave up in between leaves nothing behind and may try again.

mod at_exit;
mod client;
mod connected;
mod entries;
mod generations;
mod protocol;
mod reach;
mod server;
mod state;
#[cfg(test)]
mod tests;
mod unidentified;

pub(crate) use client::StoreClient;
#[cfg(fuzzing)]
pub(crate) use entries::ENTRY;
#[cfg(fuzzing)]
pub(crate) use protocol::{Answer, MAGIC, Request};
pub(crate) use reach::Reach;
#[cfg(any(test, fuzzing))]
pub(crate) use server::Bare;
pub use server::{StoreServer, StoreTraffic};
use std::time::Duration;

/// How long an unknown client may take to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long a rank's host may be silent until it counts as gone, at most.
const SILENCE: Duration = Duration::from_secs(10);
/// The ranks that are present are under these keys, with the process that each is.
pub(crate) const PRESENT: &str = "present/";
/// What the server has to say to those who wait in vain.
pub(crate) const TROUBLE: &str = "trouble";
