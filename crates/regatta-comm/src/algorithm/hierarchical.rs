//! Shared memory inside each host, messages between hosts.
//!
//! All-reduce of B bytes on h hosts of m ranks: the ranks of a host reduce in shared memory, each its m-th part; the
//! ranks with the same part reduce it across hosts by a ring (or by doubling where it is short), all m of them at
//! once; then a host's ranks gather. Each rank sends 2(h-1)/h * B/m bytes over the network, where a flat ring sends
//! 2(hm-1)/hm * B over the link between two hosts. Where hosts have different numbers of ranks, m is the smallest.
//! Large data goes in pieces: a thread of its own takes one across hosts while the ranks of the host reduce the next
//! one and gather the one before, so the time is that of the slower of the two.
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
use crate::transport::shared::Shared;
use std::ops::Range;
use std::sync::mpsc::channel;

/// Bytes of a piece, over all ranks of a host, with few hosts: a piece has a strip for each host.
const PIECE: usize = 4 << 20;
/// Least bytes of a strip.
const STRIP: usize = 256 << 10;
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

/// What a rank does in an all-reduce.
struct Plan {
    /// Hosts, and elements of each shard. Every shard is reduced across hosts by one rank of each.
    hosts: usize,
    shards: Vec<Range<usize>>,
    /// This rank's shard.
    place: usize,
    pieces: usize,
}

impl Plan {
    /// Where piece `index` lies. More than one piece: a strip of each segment that a ring across hosts has, so that all
    /// numbers are combined in the same order as in one piece.
    fn strips(&self, index: usize) -> Vec<Parts> {
        if self.pieces == 1 {
            return vec![Parts::at(self.shards.iter().cloned())];
        }
        let within = |whole: &Range<usize>, parts, index| {
            let part = part(whole.len(), parts, index);
            whole.start + part.start..whole.start + part.end
        };
        let strip = |shard, host| within(&within(shard, self.hosts, host), self.pieces, index);
        (0..self.hosts).map(|host| Parts::at(self.shards.iter().map(|shard| strip(shard, host)))).collect()
    }

    /// This rank's elements of each of `strips`, one after the other.
    fn segments(&self, strips: &[Parts]) -> Parts {
        Parts::of(&strips.iter().map(|strip| strip.get(self.place).len()).collect::<Vec<_>>())
    }
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
    let hosts = context.hosts.len();
    let count = context.hosts.iter().map(Vec::len).min().unwrap_or(1);
    let shard = |index| if index < count { part(data.len(), count, index) } else { data.len()..data.len() };
    // Short shards go by doubling, in which numbers are combined in another order than in a ring.
    let long = data.len() / count * size_of::<T>() > SHORT;
    let pieces = if hosts > 1 && long { size_of_val(data).div_ceil(PIECE.max(hosts * STRIP)) } else { 1 };
    let plan = Plan { hosts, shards: (0..here.len()).map(shard).collect(), place, pieces };
    let (whole, width) = (size_of_val(data), plan.shards[place].len() * size_of::<T>());
    for kind in [Kind::ReduceScatter, Kind::AllGather] {
        *session.sent += direct::sent(kind, false, here.len(), whole, width);
    }
    let ranks: Vec<usize> = match place < count && hosts > 1 {
        true => context.hosts.iter().map(|host| host[place]).collect(),
        // What this rank has is reduced.
        false => vec![],
    };
    let chunk = session.chunk;
    let (pool, sent) = (&mut *session.pool, &mut *session.sent);
    let (shared, transport) = session.transport.split().ok_or_else(no_memory)?;
    // Takes the pieces of this rank's shard across hosts.
    let mut carry = |strips: &[Parts], piece: &mut [T]| -> Result<()> {
        if !ranks.is_empty() {
            let context = context.among(&ranks);
            let mut transport = Among { transport: &mut *transport, ranks: &ranks };
            let (transport, pool, sent) = (&mut transport, &mut *pool, &mut *sent);
            let mut session = Session { transport, context: &context, call: summing, pool, sent, chunk };
            if strips.len() > 1 {
                let segments = plan.segments(strips);
                let segment = |host| segments.get(host);
                streams::all_reduce_segments(&mut session, Algorithm::Ring, &segment, piece)?;
            } else {
                let algorithm =
                    if size_of_val(piece) <= SHORT { Algorithm::Doubling } else { Algorithm::Ring };
                streams::all_reduce(&mut session, algorithm, piece)?;
            }
        }
        if call.op == ReduceOp::Mean {
            kernel::divide(piece, context.size);
        }
        Ok(())
    };
    if pieces == 1 {
        let strips = plan.strips(0);
        let mut piece = scatter(shared, summing, &plan, &strips, data)?;
        carry(&strips, &mut piece)?;
        return gather(shared, call, &plan, (&strips, &piece), data);
    }
    std::thread::scope(|scope| {
        let (reduced, to_carry) = channel::<Vec<T>>();
        let (carried, to_gather) = channel::<Vec<T>>();
        let plan = &plan;
        let courier = move || -> Result<()> {
            for (index, mut piece) in to_carry.into_iter().enumerate() {
                carry(&plan.strips(index), &mut piece)?;
                // Where this rank has failed meanwhile, nobody gathers.
                let _ = carried.send(piece);
            }
            Ok(())
        };
        let spawned = std::thread::Builder::new().spawn_scoped(scope, courier);
        let thread = spawned.map_err(Error::system("start a thread that exchanges data with other hosts"))?;
        let mut outcome = Ok(());
        // The order of what ranks do in shared memory is the same on all of a host.
        for index in 0..=pieces {
            if index < pieces {
                match scatter(shared, summing, plan, &plan.strips(index), data) {
                    Ok(piece) => drop(reduced.send(piece)),
                    Err(error) => outcome = Err(error),
                }
            }
            if outcome.is_err() {
                break;
            }
            if index == 0 {
                continue;
            }
            // Where the thread has failed, it says why below.
            let Ok(piece) = to_gather.recv() else { break };
            outcome = gather(shared, call, plan, (&plan.strips(index - 1), &piece), data);
        }
        drop(reduced);
        let across = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.and(across)
    })
}

/// Reduces a piece within the host; this rank's part of it.
fn scatter<T: Element>(
    shared: &mut Shared,
    call: Call,
    plan: &Plan,
    strips: &[Parts],
    data: &[T],
) -> Result<Vec<T>> {
    let segments = plan.segments(strips);
    let mut piece = vec![T::zeroed(); segments.get(strips.len() - 1).end];
    shared.enter();
    for (index, strip) in strips.iter().enumerate() {
        direct::reduce_scatter(shared, None, call, strip, (data, &mut piece[segments.get(index)]))?;
    }
    Ok(piece)
}

/// Gathers a piece, of which this rank has `own`.
fn gather<T: Element>(
    shared: &mut Shared,
    call: Call,
    plan: &Plan,
    (strips, own): (&[Parts], &[T]),
    data: &mut [T],
) -> Result<()> {
    let segments = plan.segments(strips);
    shared.enter();
    for (index, strip) in strips.iter().enumerate() {
        data[strip.get(plan.place)].copy_from_slice(&own[segments.get(index)]);
        direct::all_gather(shared, None, call, strip, (None, data))?;
    }
    Ok(())
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
