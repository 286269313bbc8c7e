//! All-gather of B bytes on h hosts of m ranks: the ranks in the same place of each host gather their parts across hosts by
//! a ring (or by doubling where they are short), all m of them at once, and a host's ranks copy from each other what has
//! come. Each rank sends (h-1)/h * B/m bytes over the network: every byte comes to each other host once. Where hosts differ
//! in ranks, or ranks in what they have, the ranks of a host first divide what it has evenly.

use super::SHORT;
use super::courier::split;
use super::pipeline::{pipeline, sized};
use super::plan::Plan;
use crate::algorithm::direct::{exchange, gather_spans};
use crate::algorithm::parts::Parts;
use crate::algorithm::session::Session;
use crate::algorithm::{Algorithm, streams};
use crate::error::Result;
use crate::numbers::element::Element;

/// Gathers everyone's part into everyone's `output`, where this rank's own part already is.
pub(crate) fn all_gather<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    output: &mut [T],
) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let plan = &Plan::parted(context, parts, size_of::<T>());
    let short = plan.pieces == 1 && size_of_val(output) <= SHORT;
    let here = context.host_of(context.rank);
    let collected = if plan.owned { 0 } else { parts.get(context.rank).len() };
    *session.sent += (((plan.here - 1) * plan.carried() + collected) * size_of::<T>()) as u64;
    let (shared, mut courier) = split(session, plan.ranks(context))?;
    if !plan.owned {
        let own = output[parts.get(context.rank)].to_vec();
        let longest = here.iter().map(|&rank| parts.get(rank).len()).max().unwrap_or(0);
        let moves = plan.collected(here.iter().map(|&rank| parts.get(rank).start));
        exchange(shared, call, (&own, longest), &moves, output)?;
    }
    let before = |(_, output): &mut (&mut _, &mut [T]), index, memory| {
        let segments = plan.segments(index);
        let mut piece = sized(memory, segments.total());
        let (segment, spans) = plan.own(index);
        let own = &mut piece[segment];
        for step in spans.moves() {
            own[step.from..][..step.to.len()].copy_from_slice(&output[step.to]);
        }
        Ok(piece)
    };
    let carry = |index, mut piece: Vec<T>| {
        let algorithm = if short { Algorithm::HalvingDoubling } else { Algorithm::Ring };
        let segments = plan.segments(index);
        courier.across(call, |session| streams::all_gather(session, algorithm, &segments, &mut piece))?;
        Ok(piece)
    };
    let after = |(shared, output): &mut (&mut _, &mut [T]), index, piece: &[T]| {
        gather_spans(shared, call, &plan.piece(index), (piece, output))
    };
    pipeline(plan.pieces, &mut (shared, output), before, carry, after)
}
