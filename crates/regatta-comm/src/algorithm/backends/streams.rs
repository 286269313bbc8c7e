//! Schedules of messages over any transport.

use crate::algorithm::backend::{Backend, Offer, Task, Turn, Wanted, numbers};
use crate::algorithm::{Algorithm, streams};
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::numbers::element::{Element, Typed};
use crate::numbers::memory::Space;

pub(crate) struct Streams;

impl Backend for Streams {
    fn offers(&self, algorithm: Algorithm, wanted: &Wanted) -> Offer {
        use Kind::{
            AllGather, AllReduce, AllToAll, Barrier, Broadcast, Gather, Reduce, ReduceScatter, Scatter, Send,
        };
        if wanted.space != Space::Host {
            return Offer::No;
        }
        match (algorithm, wanted.kind) {
            (Algorithm::Ring, AllReduce | ReduceScatter | AllGather)
            | (Algorithm::Tree, Broadcast | Reduce)
            | (Algorithm::Linear, Gather | Scatter)
            | (Algorithm::Pairwise, AllToAll | Send)
            | (Algorithm::Dissemination, Barrier) => Offer::Usual,
            (Algorithm::Ring, Broadcast | Reduce)
            | (Algorithm::Tree | Algorithm::Doubling, AllReduce)
            | (Algorithm::HalvingDoubling, AllReduce | ReduceScatter | AllGather) => Offer::Able,
            (Algorithm::Bruck, AllToAll) if !wanted.uneven => Offer::Able,
            _ => Offer::No,
        }
    }

    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()> {
        turn.session.call.dtype.with(Run(turn, task))
    }
}

struct Run<'a, 'b, 'c>(&'a mut Turn<'b>, &'a mut Task<'c>);

impl Typed for Run<'_, '_, '_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let Self(Turn { session, algorithm, .. }, task) = self;
        let Task { input, output, parts, received, message, .. } = task;
        let (input, output) = numbers::<T>(*input, output.as_mut())?;
        let input = input.unwrap_or_default();
        let (session, algorithm) = (session, *algorithm);
        match session.call.kind {
            Kind::AllReduce => streams::all_reduce(session, algorithm, output),
            Kind::Reduce => streams::reduce(session, algorithm, output),
            Kind::ReduceScatter => streams::reduce_scatter(session, algorithm, parts, input, output),
            Kind::AllGather => streams::all_gather(session, algorithm, parts, output),
            Kind::Gather => streams::gather(session, parts, input, output),
            Kind::Scatter => streams::scatter(session, parts, input, output),
            Kind::Broadcast => streams::broadcast(session, algorithm, session.call.root as usize, output),
            Kind::AllToAll => {
                let parts = (&*parts, received.as_ref().unwrap_or(parts));
                streams::all_to_all(session, algorithm, parts, input, output)
            }
            Kind::Barrier => streams::barrier(session),
            Kind::Send | Kind::Join => match *message {
                Some((to, true)) => session.exchange(to, Some(input), None),
                Some((from, false)) => session.exchange(from, None, Some(output)),
                None => Err(Error::Internal(format!("{} is not a message", session.call))),
            },
        }
    }
}
