//! All-to-all among hosts: ranks of a host put what they have for a rank of another host into one message.
//!
//! Sent to each rank by each, every byte crosses to the other host once already, so there is nothing to gain but messages:
//! with m ranks to a host a rank receives one from each other host and not m. A byte is copied twice more for that, so it
//! pays for short blocks; long ones go in pairs. So do blocks of different lengths: no rank knows those of the other
//! ranks, and all would have to agree on the way before they take it, which costs as much as is gained.

use super::courier::split;
use crate::algorithm::direct::{Move, exchange};
use crate::algorithm::parts::Parts;
use crate::algorithm::run::Numbers;
use crate::algorithm::schedule::What;
use crate::algorithm::session::Session;
use crate::algorithm::{Algorithm, streams};
use crate::error::Result;
use crate::numbers::element::Element;

/// Bytes of a block up to which a message for each costs more than copies: at 8 KiB both took the same, on loopback.
const SHORT: usize = 4 << 10;

/// The part of everyone's `input` that is for this rank, into its parts of `output`.
pub(crate) fn all_to_all<T: Element>(
    session: &mut Session<'_>,
    (sent, received): (&Parts, Option<&Parts>),
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let block = sent.longest();
    if received.is_some() || block * size_of::<T>() > SHORT {
        let parts = (sent, received.unwrap_or(sent));
        return streams::all_to_all(session, Algorithm::Pairwise, parts, input, output);
    }
    together(session, block, input, output)
}

/// `block` numbers from everyone's `input` to everyone's `output`.
fn together<T: Element>(
    session: &mut Session<'_>,
    block: usize,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let (rank, here) = (context.rank, context.host_of(context.rank));
    let place = here.iter().position(|&other| other == rank).unwrap_or(0);
    let away = || context.hosts.iter().filter(|host| !host.contains(&rank));
    // Who in `from` packs for the rank in this place of another host.
    let packer = |from: &[usize], place: usize| place % from.len();
    let packs = |host: &[usize]| -> Vec<usize> {
        let mine = |(at, &rank): (usize, &usize)| (packer(here, at) == place).then_some(rank);
        host.iter().enumerate().filter_map(mine).collect()
    };
    let to: Vec<usize> = away().flat_map(|host| packs(host)).collect();
    // What has come to this rank first, then the messages; in each of them a block of every rank here, in order.
    let message = here.len() * block;
    let mut packed = vec![T::zeroed(); message * (1 + to.len())];
    let read = |from: usize| {
        let targets = [rank].into_iter().chain(to.iter().copied()).enumerate();
        let step = |(index, target): (usize, usize)| {
            let at = index * message + from * block;
            Move { from: target * block, to: at..at + block }
        };
        targets.map(step).collect::<Vec<_>>()
    };
    let moves: Vec<_> = (0..here.len()).map(read).collect();
    *session.sent += (size_of_val(input) - (1 + to.len()) * block * size_of::<T>()) as u64;
    exchange(split(session, vec![])?.0, call, (input, input.len()), &moves, &mut packed)?;
    for (from, block) in here.iter().zip(packed.chunks(block.max(1))) {
        output[from * block.len()..][..block.len()].copy_from_slice(block);
    }
    let mut schedule = session.place::<T>().schedule();
    for (index, &to) in to.iter().enumerate() {
        schedule.add(to, What::SendInput, (index + 1) * message..(index + 2) * message, None);
    }
    let mut came = vec![T::zeroed(); (context.size - here.len()) * block];
    let mut at = 0;
    for host in away() {
        schedule.add(host[packer(host, place)], What::Copy, at..at + host.len() * block, None);
        at += host.len() * block;
    }
    session.run(&schedule, Numbers { input: &packed, working: &mut came })?;
    for (from, block) in away().flatten().zip(came.chunks(block.max(1))) {
        output[from * block.len()..][..block.len()].copy_from_slice(block);
    }
    Ok(())
}
