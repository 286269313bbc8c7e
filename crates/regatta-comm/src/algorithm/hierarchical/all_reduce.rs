//! All-reduce of B bytes on h hosts of m ranks: the ranks of a host reduce in shared memory, each its m-th part; the
//! ranks with the same part reduce it across hosts by a ring (or by doubling where it is short), all m of them at
//! once; then a host's ranks gather. Each rank sends 2(h-1)/h * B/m bytes over the network, where a flat ring sends
//! 2(hm-1)/hm * B over the link between two hosts.

use super::SHORT;
use super::courier::split;
use super::pipeline::{pipeline, sized};
use super::plan::{Plan, pieces};
use super::rounding::{exactly, summing};
use crate::algorithm::direct::{self, gather_spans, reduce_spans};
use crate::algorithm::session::{Session, with_wider};
use crate::algorithm::{Algorithm, streams};
use crate::error::Result;
use crate::member::call::Kind;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    if !exactly::<T>(session.call.op) {
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
    let (context, call) = (session.context, session.call);
    let (hosts, len, bytes) = (context.hosts.len(), data.len(), size_of_val(data));
    // Short shards go by doubling, in which numbers are combined in another order than in a ring.
    let long = |couriers: usize| len / couriers * size_of::<T>() > SHORT;
    let plan = &Plan::whole(context, len, |couriers| if long(couriers) { pieces(hosts, bytes) } else { 1 });
    for kind in [Kind::ReduceScatter, Kind::AllGather] {
        *session.sent += direct::sent(kind, false, plan.here, bytes, plan.carried() * size_of::<T>());
    }
    let spans: Vec<_> = (0..plan.pieces).map(|index| plan.piece(index)).collect();
    let (shared, mut courier) = split(session, plan.ranks(context))?;
    let before = |(shared, data): &mut (&mut _, &mut [T]), index: usize, memory| {
        let mut piece = sized(memory, spans[index][plan.place].len());
        reduce_spans(shared, summing(call), &spans[index], (data, &mut piece))?;
        Ok(piece)
    };
    let carry = |index, mut piece: Vec<T>| {
        let short = plan.pieces == 1 && size_of_val(&piece[..]) <= SHORT;
        let algorithm = if short { Algorithm::Doubling } else { Algorithm::Ring };
        let segments = plan.segments(index);
        courier.across(summing(call), |session| {
            streams::all_reduce_segments(session, algorithm, &|host| segments.get(host), &mut piece)
        })?;
        if call.op == ReduceOp::Mean {
            kernel::divide(&mut piece, context.size);
        }
        Ok(piece)
    };
    let after = |(shared, data): &mut (&mut _, &mut [T]), index: usize, piece: Vec<T>| {
        gather_spans(shared, call, &spans[index], (&piece, data))?;
        Ok(piece)
    };
    pipeline(plan.pieces, &mut (shared, data), before, carry, after)
}
