//! Shared memory inside each host, messages between hosts: of every operation only what must goes over the network, and
//! a host's ranks carry it together.
//!
//! Large data goes in pieces: a thread of its own takes one across hosts while the ranks of the host are at the next one
//! and at the one before, so the time is that of the slower of the two.

mod all_gather;
mod all_reduce;
mod all_to_all;
mod broadcast;
mod courier;
mod pipeline;
mod plan;
mod reduce_scatter;
mod rounding;

pub(crate) use all_gather::all_gather;
pub(crate) use all_reduce::all_reduce;
pub(crate) use all_to_all::all_to_all;
pub(crate) use broadcast::broadcast;
pub(crate) use reduce_scatter::reduce_scatter;

/// Bytes up to which couriers take few steps rather than send few bytes.
const SHORT: usize = 16 << 10;
