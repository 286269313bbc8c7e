//! Shared memory inside each host, messages between hosts.

use crate::algorithm::backend::{Backend, Offer, Task, Turn, Wanted, numbers};
use crate::algorithm::{Algorithm, hierarchical};
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::numbers::element::{Element, ReduceOp, Typed};
use crate::numbers::memory::Space;
use crate::transport::TransportKind;

pub(crate) struct Hierarchical;

impl Backend for Hierarchical {
    fn offers(&self, _: Algorithm, wanted: &Wanted) -> Offer {
        use Kind::{AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter};
        let kind = matches!(wanted.kind, AllReduce | Broadcast | AllGather | ReduceScatter | AllToAll);
        let place = wanted.link == TransportKind::Mixed && wanted.space == Space::Host;
        if kind && place && wanted.op != ReduceOp::Adasum { Offer::Able } else { Offer::No }
    }

    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()> {
        turn.session.call.dtype.with(Run(turn, task))
    }
}

struct Run<'a, 'b, 'c>(&'a mut Turn<'b>, &'a mut Task<'c>);

impl Typed for Run<'_, '_, '_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let session = &mut self.0.session;
        let Task { input, output, parts, received, .. } = self.1;
        let (input, output) = numbers::<T>(*input, output.as_mut())?;
        let input = input.unwrap_or_default();
        match session.call.kind {
            Kind::AllReduce => hierarchical::all_reduce(session, output),
            Kind::Broadcast => hierarchical::broadcast(session, output),
            Kind::AllGather => hierarchical::all_gather(session, parts, output),
            Kind::ReduceScatter => hierarchical::reduce_scatter(session, parts, input, output),
            Kind::AllToAll => hierarchical::all_to_all(session, (parts, received.as_ref()), input, output),
            _ => Err(Error::Internal(format!("{} by the hierarchical algorithm", session.call))),
        }
    }
}
