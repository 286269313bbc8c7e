//! Broadcast: across hosts first, to one rank of each, then in each host.

use super::courier::split;
use crate::algorithm::session::Session;
use crate::algorithm::{Algorithm, direct, streams};
use crate::error::Result;
use crate::member::call::Kind;
use crate::numbers::element::Element;

/// Copies `data` of the call's root to everyone.
pub(crate) fn broadcast<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let (context, call) = (session.context, session.call);
    let root = call.root as usize;
    let here = context.host_of(context.rank);
    // The root speaks for its host, the first rank for any other.
    let leader = |host: &[usize]| if host.contains(&root) { root } else { host[0] };
    let leaders: Vec<usize> = context.hosts.iter().map(|host| leader(host)).collect();
    let leads = leader(here) == context.rank;
    *session.sent += direct::sent(Kind::Broadcast, leads, here.len(), size_of_val(data), 0);
    let from = leaders.iter().position(|&rank| rank == root).unwrap_or(0);
    let (shared, mut courier) = split(session, if leads { leaders } else { vec![] })?;
    // What ranks compare is the group's call.
    courier.across(call, |session| streams::broadcast(session, Algorithm::Tree, from, data))?;
    let from = here.iter().position(|&rank| rank == leader(here)).unwrap_or(0);
    shared.enter();
    direct::broadcast(shared, None, call, from, data)
}
