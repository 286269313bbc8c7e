//! Shared memory inside each host, messages between hosts.
//!
//! All-reduce of B bytes on h hosts of m ranks: the ranks of a host reduce in shared memory, each its m-th part; the
//! ranks with the same part reduce it across hosts by a ring (or by doubling where it is short), all m of them at
//! once; then a host's ranks gather. Each rank sends 2(h-1)/h * B/m bytes over the network, where a flat ring sends
//! 2(hm-1)/hm * B over the link between two hosts. Where hosts have different numbers of ranks, m is the smallest.
//!
//! 16-bit floats are rounded once in each host, and once in the end. For a mean, integers and f16 are summed in a type
//! that holds every sum.

use super::parts::Parts;
use super::schedule::part;
use super::session::with_wider;
use super::streams;
use super::{Algorithm, direct};
use crate::algorithm::session::Session;
use crate::error::{Error, Result};
use crate::member::call::{Call, Kind};
use crate::member::context::Context;
use crate::numbers::element::{DType, Element, ReduceOp};
use crate::numbers::kernel;
use crate::transport::Among;

/// Bytes up to which ranks across hosts reduce by doubling.
const SHORT: usize = 16 << 10;

fn no_memory() -> Error {
    Error::Internal("the hierarchical algorithm has no memory that the ranks of a host share".into())
}

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    // Of bf16 the range is that of f32.
    if !streams::outgrows::<T>(session.call.op) || T::DTYPE == DType::BF16 {
        return all_reduce_exactly(session, data);
    }
    with_wider::<T::Exact>(session, data.len(), |session, exact| {
        kernel::to_exact(exact, data);
        let outcome = all_reduce_exactly(session, exact);
        kernel::from_exact(data, exact);
        outcome
    })
}

fn all_reduce_exactly<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let context = session.context;
    let call = session.call;
    // Summed here, divided by all in the end.
    let summing = match call.op {
        ReduceOp::Mean => Call { op: ReduceOp::Sum, ..call },
        _ => call,
    };
    let here = context.host_of(context.rank);
    let place = here.iter().position(|&rank| rank == context.rank).unwrap_or(0);
    let shards = context.hosts.iter().map(Vec::len).min().unwrap_or(1);
    let counts: Vec<usize> = (0..here.len())
        .map(|index| if index < shards { part(data.len(), shards, index).len() } else { 0 })
        .collect();
    let parts = Parts::of(&counts);
    let own = parts.get(place);
    let mut shard = vec![T::zeroed(); own.len()];
    let (whole, width) = (size_of_val(data), size_of_val(&*shard));
    for kind in [Kind::ReduceScatter, Kind::AllGather] {
        *session.sent += direct::sent(kind, false, here.len(), whole, width);
    }
    let shared = session.transport.shared().ok_or_else(no_memory)?;
    shared.enter();
    direct::reduce_scatter(shared, None, summing, &parts, (data, &mut shard))?;
    if place < shards && context.hosts.len() > 1 {
        let ranks: Vec<usize> = context.hosts.iter().map(|host| host[place]).collect();
        across(session, &ranks, summing, |session| {
            let algorithm = if size_of_val(&*shard) <= SHORT { Algorithm::Doubling } else { Algorithm::Ring };
            streams::all_reduce(session, algorithm, &mut shard)
        })?;
    }
    if call.op == ReduceOp::Mean {
        kernel::divide(&mut shard, context.size);
    }
    data[own].copy_from_slice(&shard);
    let shared = session.transport.shared().ok_or_else(no_memory)?;
    shared.enter();
    direct::all_gather(shared, None, call, &parts, (None, data))
}

/// Copies `data` of the call's root to everyone: across hosts first, then in each.
pub(crate) fn broadcast<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let context = session.context;
    let call = session.call;
    let root = call.root as usize;
    let here = context.host_of(context.rank);
    // The root speaks for its host, the first rank for any other.
    let leader = |host: &[usize]| if host.contains(&root) { root } else { host[0] };
    let leaders: Vec<usize> = context.hosts.iter().map(|host| leader(host)).collect();
    if leader(here) == context.rank && leaders.len() > 1 {
        let from = leaders.iter().position(|&rank| rank == root).unwrap_or(0);
        across(session, &leaders, call.root(from), |session| {
            streams::broadcast(session, Algorithm::Tree, data)
        })?;
    }
    let from = here.iter().position(|&rank| rank == leader(here)).unwrap_or(0);
    let leads = leader(here) == context.rank;
    *session.sent += direct::sent(Kind::Broadcast, leads, here.len(), size_of_val(data), 0);
    let shared = session.transport.shared().ok_or_else(no_memory)?;
    shared.enter();
    direct::broadcast(shared, None, call.root(from), data)
}

/// Does `operation` among `ranks`, one of each host.
fn across(
    session: &mut Session<'_>,
    ranks: &[usize],
    call: Call,
    operation: impl FnOnce(&mut Session<'_>) -> Result<()>,
) -> Result<()> {
    let context: Context = session.context.among(ranks);
    let mut transport = Among { transport: &mut *session.transport, ranks };
    let chunk = session.chunk;
    let (pool, sent) = (&mut *session.pool, &mut *session.sent);
    let mut session = Session { transport: &mut transport, context: &context, call, pool, sent, chunk };
    operation(&mut session)
}
