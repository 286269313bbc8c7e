//! All-gather of B bytes on h hosts of m ranks: the ranks in the same place of each host exchange their parts, all m of them
//! at once, and a host's ranks copy from each other what has come. Each rank sends (h-1)/h * B/m bytes over the network:
//! every byte comes to each other host once. Where hosts differ in ranks, or ranks in what they have, the ranks of a host
//! first divide what it has evenly.
//!
//! Long data goes to each other host in turn, straight from the output into the output. Short data goes by doubling, in
//! few steps.

use super::SHORT;
use super::courier::{Courier, split};
use super::pipeline::pipeline;
use super::plan::Plan;
use crate::algorithm::direct::{Spans, exchange, gather_slices, gather_spans};
use crate::algorithm::parts::Parts;
use crate::algorithm::run::Numbers;
use crate::algorithm::schedule::What;
use crate::algorithm::session::Session;
use crate::algorithm::{Algorithm, streams};
use crate::error::Result;
use crate::member::call::Call;
use crate::numbers::element::Element;
use crate::transport::shared::Shared;

/// Gathers everyone's part into everyone's `output`, where this rank's own part already is.
pub(crate) fn all_gather<T: Element>(
    session: &mut Session<'_>,
    parts: &Parts,
    output: &mut [T],
) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let plan = Plan::parted(context, parts, size_of::<T>());
    let here = context.host_of(context.rank);
    let collected = if plan.owned { 0 } else { parts.get(context.rank).len() };
    *session.sent += (((plan.here - 1) * plan.carried() + collected) * size_of::<T>()) as u64;
    let (shared, courier) = split(session, plan.ranks(context))?;
    if !plan.owned {
        let own = output[parts.get(context.rank)].to_vec();
        let longest = here.iter().map(|&rank| parts.get(rank).len()).max().unwrap_or(0);
        let moves = plan.collected(here.iter().map(|&rank| parts.get(rank).start));
        exchange(shared, call, (&own, longest), &moves, output)?;
    }
    let gather = if size_of_val(output) <= SHORT { at_once } else { in_place };
    gather(shared, courier, call, &plan, output)
}

/// In one piece beside the output.
fn at_once<T: Element>(
    shared: &mut Shared,
    mut courier: Courier<'_>,
    call: Call,
    plan: &Plan,
    output: &mut [T],
) -> Result<()> {
    let segments = plan.segments(0);
    let mut piece = vec![T::zeroed(); segments.total()];
    let own = &mut piece[segments.get(plan.host)];
    for step in plan.strip(plan.host, plan.place, 0).moves() {
        own[step.from..][..step.to.len()].copy_from_slice(&output[step.to]);
    }
    courier.across(call, |session| {
        streams::all_gather(session, Algorithm::HalvingDoubling, &segments, &mut piece)
    })?;
    gather_spans(shared, call, &plan.piece(0), (&piece, output))
}

/// Where a slice of the output belongs: its piece, the place of the courier that has it, and its host.
type Key = (usize, usize, usize);

/// The output in slices, in the order of their keys.
fn slices<'a, T>(plan: &Plan, mut output: &'a mut [T]) -> Vec<(Key, &'a mut [T])> {
    let mut ranges = vec![];
    for index in 0..plan.pieces {
        for place in 0..plan.here {
            for host in 0..plan.hosts() {
                let moves = plan.strip(host, place, index).moves().into_iter();
                ranges.extend(moves.map(|step| (step.to, (index, place, host))));
            }
        }
    }
    ranges.sort_unstable_by_key(|(range, _)| range.start);
    let (mut end, mut slices) = (0, vec![]);
    for (range, key) in ranges {
        let (slice, rest) = output.split_at_mut(range.start - end).1.split_at_mut(range.len());
        slices.push((key, slice));
        (output, end) = (rest, range.end);
    }
    // Slices of one key stay in their order.
    slices.sort_by_key(|(key, _)| *key);
    slices
}

/// Slices of the output by the host that they come from, in order.
type ByHost<'a, T> = Vec<Vec<&'a mut [T]>>;

/// What this rank works with in its host.
struct Home<'a, 's, T> {
    shared: &'s mut Shared,
    /// What it carries, by piece.
    own: Vec<ByHost<'a, T>>,
    /// What the others of its host carry, by piece and place.
    others: Vec<Vec<Vec<&'a mut [T]>>>,
}

impl<'a, T> Home<'a, '_, T> {
    /// What is to be carried next.
    fn next(&mut self, index: usize, _: ByHost<'a, T>) -> Result<ByHost<'a, T>> {
        Ok(std::mem::take(&mut self.own[index]))
    }
}

/// In pieces within the output.
fn in_place<T: Element>(
    shared: &mut Shared,
    mut courier: Courier<'_>,
    call: Call,
    plan: &Plan,
    output: &mut [T],
) -> Result<()> {
    let empty = |count: usize| (0..plan.pieces).map(|_| (0..count).map(|_| vec![]).collect()).collect();
    let mut home = Home { shared, own: empty(plan.hosts()), others: empty(plan.here) };
    for ((index, place, host), slice) in slices(plan, output) {
        match place == plan.place {
            true => home.own[index][host].push(slice),
            false => home.others[index][place].push(slice),
        }
    }
    let carry = |_, mut slices| {
        courier.across(call, |session| send_around(session, plan.host, &mut slices))?;
        Ok(slices)
    };
    let after = |home: &mut Home<'_, '_, T>, index: usize, slices: ByHost<'_, T>| {
        let own: Vec<&mut [T]> = slices.into_iter().flatten().collect();
        let longest = plan.piece(index).iter().map(Spans::len).max().unwrap_or(0);
        gather_slices(home.shared, call, (&own, longest), &mut home.others[index])?;
        Ok(vec![])
    };
    pipeline(plan.pieces, &mut home, Home::next, carry, after)
}

/// Exchanges slices with the couriers of the other hosts, one after the other.
fn send_around<T: Element>(session: &mut Session<'_>, host: usize, slices: &mut ByHost<'_, T>) -> Result<()> {
    let hosts = slices.len();
    let own = std::mem::take(&mut slices[host]);
    for step in 1..hosts {
        let (to, from) = ((host + step) % hosts, (host + hosts - step) % hosts);
        // Where a host has nothing, its call goes.
        let (sent, received) = (own.len().max(1), slices[from].len().max(1));
        for index in 0..sent.max(received) {
            let mut schedule = session.place::<T>().schedule();
            let input: &[T] = own.get(index).map_or(&[], |slice| slice);
            let working: &mut [T] = slices[from].get_mut(index).map_or(&mut [], |slice| slice);
            if index < sent {
                schedule.add(to, What::SendInput, 0..input.len(), None);
            }
            if index < received {
                schedule.add(from, What::Copy, 0..working.len(), None);
            }
            session.run(&schedule, Numbers { input, working })?;
        }
    }
    slices[host] = own;
    Ok(())
}
