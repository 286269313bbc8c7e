//! Reduce-scatter of B bytes on h hosts of m ranks: the ranks of a host reduce in shared memory what they have for each
//! host, each of them an m-th; the ranks with the same m-th reduce and scatter it across hosts by a ring (or by halving
//! where it is short). Where that m-th is not the part that the rank is to have, a host's ranks exchange what they have.
//! Each rank sends (h-1)/h * B/m bytes over the network: one number for each host and not for each rank.

use super::SHORT;
use super::courier::split;
use super::pipeline::{pipeline, sized};
use super::plan::Plan;
use super::rounding::{exactly, summing};
use crate::algorithm::direct::{exchange, reduce_spans};
use crate::algorithm::parts::Parts;
use crate::algorithm::schedule::part;
use crate::algorithm::session::{Session, with_wider};
use crate::algorithm::{Algorithm, streams};
use crate::error::Result;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;

/// Leaves the reduction of everyone's `rank`-th part of `input` in `output`.
pub(crate) fn reduce_scatter<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    if !exactly::<T>(session.call.op) {
        return reduce_scatter_exactly(session, parts, input, output);
    }
    with_wider::<T::Exact>(session, input.len() + output.len(), |session, exact| {
        let (whole, own) = exact.split_at_mut(input.len());
        kernel::to_exact(whole, input);
        let outcome = reduce_scatter_exactly(session, parts, whole, own);
        kernel::from_exact(output, own);
        outcome
    })
}

fn reduce_scatter_exactly<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let plan = &Plan::parted(context, parts, size_of::<T>());
    let short = plan.pieces == 1 && size_of_val(input) <= SHORT;
    let delivered = if plan.owned { 0 } else { plan.shard() };
    *session.sent += ((input.len() - plan.carried() + delivered) * size_of::<T>()) as u64;
    let (shared, mut courier) = split(session, plan.ranks(context))?;
    let before = |(shared, _): &mut (&mut _, &mut [T]), index, memory| {
        let spans = plan.piece(index);
        let mut piece = sized(memory, spans[plan.place].len());
        reduce_spans(shared, summing(call), &spans, (input, &mut piece))?;
        Ok(piece)
    };
    let carry = |index, mut piece: Vec<T>| {
        let algorithm = if short { Algorithm::HalvingDoubling } else { Algorithm::Ring };
        let (segments, own) = (plan.segments(index), plan.own(index).0);
        let mut reduced = vec![T::zeroed(); own.len()];
        courier.across(summing(call), |session| {
            streams::reduce_scatter(session, algorithm, &segments, &piece, &mut reduced)
        })?;
        piece = reduced;
        if call.op == ReduceOp::Mean {
            kernel::divide(&mut piece, context.size);
        }
        Ok(piece)
    };
    let after = |(_, shard): &mut (&mut _, &mut [T]), index, piece: Vec<T>| {
        let here = part(shard.len(), plan.pieces, index);
        shard[here].copy_from_slice(&piece);
        Ok(piece)
    };
    if plan.owned {
        return pipeline(plan.pieces, &mut (shared, output), before, carry, after);
    }
    let mut shard = vec![T::zeroed(); plan.shard()];
    pipeline(plan.pieces, &mut (&mut *shared, &mut shard[..]), before, carry, after)?;
    exchange(shared, call, (&shard, plan.longest()), &plan.delivered(), output)
}
