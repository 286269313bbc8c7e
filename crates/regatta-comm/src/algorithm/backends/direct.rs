//! Ranks that share memory read and write each other's.

use crate::algorithm::backend::{Backend, Offer, Task, Turn, Wanted, numbers};
use crate::algorithm::{Algorithm, direct};
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::numbers::element::{Element, ReduceOp, Typed};
use crate::numbers::memory::Space;
use crate::transport::TransportKind;

pub(crate) struct Direct;

impl Backend for Direct {
    fn offers(&self, _: Algorithm, wanted: &Wanted) -> Offer {
        let shared = matches!(wanted.link, TransportKind::Thread | TransportKind::Shm);
        let offers = match wanted.kind {
            Kind::AllToAll => !wanted.uneven,
            Kind::Send | Kind::Join => false,
            // Adasum is not done element by element.
            _ => wanted.op != ReduceOp::Adasum,
        };
        if shared && offers && wanted.space == Space::Host { Offer::Best } else { Offer::No }
    }

    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()> {
        turn.session.call.dtype.with(Run(turn, task))
    }

    fn starts_itself(&self, task: &Task<'_>) -> bool {
        matches!(task.call.kind, Kind::AllReduce | Kind::Barrier) && task.bytes <= direct::SMALL
    }
}

struct Run<'a, 'b, 'c>(&'a mut Turn<'b>, &'a mut Task<'c>);

impl Typed for Run<'_, '_, '_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let Self(Turn { session, registered, start, .. }, Task { input, output, parts, bytes, own, .. }) =
            self;
        let (call, registered) = (session.call, *registered);
        let root = call.root as usize == session.context.rank;
        *session.sent += direct::sent(call.kind, root, session.context.size, *bytes, *own);
        let shared = session.transport.shared();
        let shared =
            shared.ok_or_else(|| Error::Internal("the direct algorithm has no shared memory".into()))?;
        shared.enter();
        let (input, output) = numbers::<T>(*input, output.as_mut())?;
        let both = (input.unwrap_or_default(), output);
        match call.kind {
            Kind::AllReduce => direct::all_reduce(shared, registered, start, call, both.1),
            Kind::Reduce => direct::reduce(shared, call, both.1),
            Kind::ReduceScatter => direct::reduce_scatter(shared, registered, call, parts, both),
            Kind::AllGather => direct::all_gather(shared, registered, call, parts, (input, both.1)),
            Kind::Gather => direct::gather(shared, call, parts, both),
            Kind::Scatter => direct::scatter(shared, call, parts, both),
            Kind::Broadcast => direct::broadcast(shared, registered, call, call.root as usize, both.1),
            Kind::AllToAll => direct::all_to_all(shared, call, parts.longest(), both),
            Kind::Barrier => direct::barrier(shared, start, call),
            Kind::Send | Kind::Join => Err(Error::Internal(format!("{call} over shared memory"))),
        }
    }
}
