//! The collective operations of the message-passing library beneath.

use crate::algorithm::Algorithm;
use crate::algorithm::backend::{Backend, Offer, Task, Turn, Wanted};
use crate::error::Result;
use crate::member::call::Kind;
use crate::numbers::element::{DType, ReduceOp};
use crate::numbers::memory::Space;
use crate::transport::TransportKind;

pub(crate) struct Native;

/// Whether MPI reduces such numbers as everyone else does.
fn reduces(dtype: DType, op: ReduceOp) -> bool {
    use DType::{BF16, F16, F32, F64, I8, I32, I64, U8};
    if !matches!(dtype, F32 | F64 | F16 | BF16 | I32 | I64 | U8 | I8) {
        return false;
    }
    match op {
        // Its combination is not done element by element.
        ReduceOp::Adasum => false,
        // MPI sums integers in their own type, where the sum for a mean may not fit.
        ReduceOp::Mean => dtype.is_float(),
        _ => true,
    }
}

impl Backend for Native {
    fn offers(&self, _: Algorithm, wanted: &Wanted) -> Offer {
        let &Wanted { kind, link, dtype, op, uneven, space } = wanted;
        let kind = match kind {
            Kind::AllReduce | Kind::Reduce | Kind::ReduceScatter => reduces(dtype, op),
            Kind::Broadcast | Kind::AllGather | Kind::AllToAll | Kind::Barrier => true,
            Kind::Gather | Kind::Scatter | Kind::Send | Kind::Join => false,
        };
        let place = link == TransportKind::Mpi && space == Space::Host;
        if kind && place && !uneven { Offer::Best } else { Offer::No }
    }

    #[cfg(feature = "mpi")]
    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()> {
        turn.session.call.dtype.with(over_mpi::Run(turn, task))
    }

    #[cfg(not(feature = "mpi"))]
    fn run(&self, turn: &mut Turn<'_>, _: &mut Task<'_>) -> Result<()> {
        Err(crate::Error::Internal(format!("{} without MPI", turn.session.call)))
    }
}

#[cfg(feature = "mpi")]
mod over_mpi {
    use super::{Kind, Result, Task, Turn};
    use crate::algorithm::backend::numbers;
    use crate::error::Error;
    use crate::numbers::element::{Element, Typed};
    use crate::transport::mpi;

    pub(super) struct Run<'a, 'b, 'c>(pub &'a mut Turn<'b>, pub &'a mut Task<'c>);

    impl Typed for Run<'_, '_, '_> {
        type Output = Result<()>;

        fn call<T: Element>(self) -> Result<()> {
            let Self(Turn { session, .. }, Task { input, output, parts, .. }) = self;
            let (input, output) = numbers::<T>(*input, output.as_mut())?;
            let input = input.unwrap_or_default();
            match session.call.kind {
                Kind::AllReduce => mpi::all_reduce(session, output),
                Kind::Reduce => mpi::reduce(session, output),
                Kind::ReduceScatter => mpi::reduce_scatter(session, input, output),
                Kind::AllGather => mpi::all_gather(session, output),
                Kind::Broadcast => mpi::broadcast(session, output),
                Kind::AllToAll => mpi::all_to_all(session, parts.longest(), input, output),
                Kind::Barrier => mpi::barrier(session),
                _ => Err(Error::Internal(format!("{} by MPI", session.call))),
            }
        }
    }
}
