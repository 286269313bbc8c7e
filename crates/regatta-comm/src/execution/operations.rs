//! The operations: check their arguments, and hand them to the algorithm whose turn it is.

use crate::algorithm::parts::Parts;
use crate::algorithm::schedule::part;
use crate::algorithm::streams;
use crate::algorithm::{Algorithm, direct, hierarchical};
use crate::error::{Error, Result};
use crate::execution::engine::{Core, Manner};
use crate::member::call::{Call, Kind};
use crate::numbers::element::{DType, Element, ReduceOp, Reduction};
use crate::numbers::kernel;
#[cfg(feature = "mpi")]
use crate::transport::mpi;
use std::time::Duration;

/// More than any memory holds, and few enough to count their bytes.
const MOST_ELEMENTS: usize = usize::MAX >> 8;

/// How the parts of a whole are given.
#[derive(Clone, Copy)]
pub(crate) enum Counts<'a> {
    /// All alike.
    Even,
    /// Elements of each rank's part; the same on all ranks.
    Of(&'a [usize]),
}

impl Counts<'_> {
    fn words(self) -> Vec<u64> {
        match self {
            Self::Even => vec![],
            Self::Of(counts) => counts.iter().map(|&count| count as u64).collect(),
        }
    }

    fn uneven(self) -> bool {
        matches!(self, Self::Of(_))
    }
}

impl Core {
    /// The parts of a whole of `whole` elements, of which this rank's own has `own`.
    fn parts(&self, what: &str, counts: Counts<'_>, whole: Option<usize>, own: usize) -> Result<Parts> {
        let (rank, size) = (self.context.rank, self.context.size);
        let parts = match counts {
            Counts::Even => Parts::even(size, own),
            Counts::Of(counts) if counts.len() != size => {
                let given = counts.len();
                return Err(Error::Usage(format!("{what}: {given} counts for a group of {size} ranks")));
            }
            Counts::Of(counts) => {
                let sum = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
                if sum.is_none_or(|sum| sum > MOST_ELEMENTS) {
                    return Err(Error::Usage(format!(
                        "{what}: the counts add up to more than memory can hold"
                    )));
                }
                Parts::of(counts)
            }
        };
        let expected = parts.get(size - 1).end;
        if let Some(whole) = whole.filter(|&whole| whole != expected) {
            return Err(Error::Usage(match counts {
                Counts::Even => format!(
                    "{what}: {whole} elements are not {size} parts (one for each rank) of {own} elements"
                ),
                Counts::Of(_) => format!("{what}: {whole} elements, but the counts add up to {expected}"),
            }));
        }
        if parts.get(rank).len() != own {
            let count = parts.get(rank).len();
            return Err(Error::Usage(format!("{what}: {own} elements, but rank {rank}'s count is {count}")));
        }
        Ok(parts)
    }

    fn reducible<T: Element>(&self, kind: Kind, reduction: Reduction) -> Result<()> {
        let what = kind.name();
        if !reduction.op.suits(T::DTYPE) {
            return Err(Error::Usage(format!("{what}: {} cannot be reduced by {}", T::DTYPE, reduction.op)));
        }
        if reduction.op == ReduceOp::Adasum && kind != Kind::AllReduce {
            return Err(Error::Usage(format!("{what}: adasum is for all_reduce only")));
        }
        Ok(())
    }

    /// A call of a reduction; the factor after it is part of what ranks agree on.
    fn reducing<T: Element>(kind: Kind, len: usize, reduction: Reduction, more: Vec<u64>) -> Call {
        let after = (reduction.after != 1.0).then(|| reduction.after.to_bits());
        Call::new(kind, T::DTYPE, len).op(reduction.op).detail(after.into_iter().chain(more))
    }

    pub(crate) fn all_reduce<T: Element>(
        &self,
        data: &mut [T],
        reduction: Reduction,
        patience: Duration,
    ) -> Result<()> {
        self.all_reduce_of(data, reduction, vec![], patience)
    }

    /// As [`all_reduce`](Self::all_reduce), of what `parts` says: ranks must agree on it.
    pub(crate) fn all_reduce_of<T: Element>(
        &self,
        data: &mut [T],
        reduction: Reduction,
        parts: Vec<u64>,
        patience: Duration,
    ) -> Result<()> {
        self.reducible::<T>(Kind::AllReduce, reduction)?;
        let call = Self::reducing::<T>(Kind::AllReduce, data.len(), reduction, parts);
        self.scaled(data, reduction, |data| self.all_reduce_call(call, data, patience))
    }

    pub(crate) fn all_reduce_call<T: Element>(
        &self,
        call: Call,
        data: &mut [T],
        patience: Duration,
    ) -> Result<()> {
        let manner = Manner {
            bytes: size_of_val(data),
            own: self.slice(data),
            uneven: false,
            message: None,
            patience,
        };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, registered, call) = turn.direct()?;
                direct::all_reduce(shared, registered, call, data)
            }
            Algorithm::Hierarchical => hierarchical::all_reduce(&mut turn.session, data),
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::all_reduce(&mut turn.session, data),
            algorithm => streams::all_reduce(&mut turn.session, algorithm, data),
        })
    }

    /// Bytes of this rank's slice of `data`, where every rank reduces one.
    fn slice<T: Element>(&self, data: &[T]) -> usize {
        part(data.len(), self.context.size, self.context.rank).len() * size_of::<T>()
    }

    /// Does `operation` between the factors of `reduction`.
    fn scaled<T: Element>(
        &self,
        data: &mut [T],
        reduction: Reduction,
        operation: impl FnOnce(&mut [T]) -> Result<()>,
    ) -> Result<()> {
        if reduction.before != 1.0 {
            kernel::scale(data, reduction.before);
        }
        operation(data)?;
        if reduction.after != 1.0 {
            kernel::scale(data, reduction.after);
        }
        Ok(())
    }

    pub(crate) fn reduce<T: Element>(
        &self,
        data: &mut [T],
        reduction: Reduction,
        root: usize,
        patience: Duration,
    ) -> Result<()> {
        self.rank_exists("reduce", root)?;
        self.reducible::<T>(Kind::Reduce, reduction)?;
        let call = Self::reducing::<T>(Kind::Reduce, data.len(), reduction, vec![]).root(root);
        if root == self.context.rank {
            return self.scaled(data, reduction, |data| self.reduce_call(call, data, patience));
        }
        if reduction.before == 1.0 {
            return self.reduce_call(call, data, patience);
        }
        // The others keep theirs.
        let mut own = data.to_vec();
        kernel::scale(&mut own, reduction.before);
        self.reduce_call(call, &mut own, patience)
    }

    pub(crate) fn reduce_call<T: Element>(
        &self,
        call: Call,
        data: &mut [T],
        patience: Duration,
    ) -> Result<()> {
        let manner = Manner {
            bytes: size_of_val(data),
            own: self.slice(data),
            uneven: false,
            message: None,
            patience,
        };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, _, call) = turn.direct()?;
                direct::reduce(shared, call, data)
            }
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::reduce(&mut turn.session, data),
            algorithm => streams::reduce(&mut turn.session, algorithm, data),
        })
    }

    pub(crate) fn reduce_scatter<T: Element>(
        &self,
        (input, output): (&[T], &mut [T]),
        counts: Counts<'_>,
        reduction: Reduction,
        patience: Duration,
    ) -> Result<()> {
        self.reducible::<T>(Kind::ReduceScatter, reduction)?;
        let parts = self.parts("reduce_scatter", counts, Some(input.len()), output.len())?;
        let len = if counts.uneven() { input.len() } else { output.len() };
        let call = Self::reducing::<T>(Kind::ReduceScatter, len, reduction, counts.words());
        if reduction.before == 1.0 {
            self.reduce_scatter_call(call, &parts, counts.uneven(), (input, output), patience)?;
        } else {
            let mut own = input.to_vec();
            kernel::scale(&mut own, reduction.before);
            self.reduce_scatter_call(call, &parts, counts.uneven(), (&own, output), patience)?;
        }
        if reduction.after != 1.0 {
            kernel::scale(output, reduction.after);
        }
        Ok(())
    }

    pub(crate) fn reduce_scatter_call<T: Element>(
        &self,
        call: Call,
        parts: &Parts,
        uneven: bool,
        (input, output): (&[T], &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let manner =
            Manner { bytes: size_of_val(input), own: size_of_val(&*output), uneven, message: None, patience };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, registered, call) = turn.direct()?;
                direct::reduce_scatter(shared, registered, call, parts, (input, output))
            }
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::reduce_scatter(&mut turn.session, input, output),
            algorithm => streams::reduce_scatter(&mut turn.session, algorithm, parts, input, output),
        })
    }

    pub(crate) fn all_gather<T: Element>(
        &self,
        (input, output): (&[T], &mut [T]),
        counts: Counts<'_>,
        patience: Duration,
    ) -> Result<()> {
        let parts = self.parts("all_gather", counts, Some(output.len()), input.len())?;
        output[parts.get(self.context.rank)].copy_from_slice(input);
        self.all_gather_parts(Some(input), output, &parts, counts, patience)
    }

    /// As [`all_gather`](Self::all_gather), where this rank's own part is already in `output`.
    pub(crate) fn all_gather_in_place<T: Element>(
        &self,
        data: &mut [T],
        counts: Counts<'_>,
        patience: Duration,
    ) -> Result<()> {
        let own = match counts {
            Counts::Even => data.len() / self.context.size,
            Counts::Of(counts) => counts.get(self.context.rank).copied().unwrap_or(0),
        };
        let parts = self.parts("all_gather", counts, Some(data.len()), own)?;
        self.all_gather_parts(None, data, &parts, counts, patience)
    }

    fn all_gather_parts<T: Element>(
        &self,
        input: Option<&[T]>,
        output: &mut [T],
        parts: &Parts,
        counts: Counts<'_>,
        patience: Duration,
    ) -> Result<()> {
        let len = if counts.uneven() { output.len() } else { parts.longest() };
        let call = Call::new(Kind::AllGather, T::DTYPE, len).detail(counts.words());
        self.all_gather_call(call, parts, counts.uneven(), (input, output), patience)
    }

    pub(crate) fn all_gather_call<T: Element>(
        &self,
        call: Call,
        parts: &Parts,
        uneven: bool,
        (input, output): (Option<&[T]>, &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        let manner = Manner {
            bytes: size_of_val(output),
            own: parts.get(self.context.rank).len() * size_of::<T>(),
            uneven,
            message: None,
            patience,
        };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, registered, call) = turn.direct()?;
                direct::all_gather(shared, registered, call, parts, (input, output))
            }
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::all_gather(&mut turn.session, output),
            algorithm => streams::all_gather(&mut turn.session, algorithm, parts, output),
        })
    }

    pub(crate) fn broadcast<T: Element>(
        &self,
        data: &mut [T],
        root: usize,
        parts: Vec<u64>,
        patience: Duration,
    ) -> Result<()> {
        self.rank_exists("broadcast", root)?;
        let call = Call::new(Kind::Broadcast, T::DTYPE, data.len()).root(root).detail(parts);
        self.broadcast_call(call, data, patience)
    }

    pub(crate) fn broadcast_call<T: Element>(
        &self,
        call: Call,
        data: &mut [T],
        patience: Duration,
    ) -> Result<()> {
        let manner = Manner { bytes: size_of_val(data), own: 0, uneven: false, message: None, patience };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, registered, call) = turn.direct()?;
                direct::broadcast(shared, registered, call, data)
            }
            Algorithm::Hierarchical => hierarchical::broadcast(&mut turn.session, data),
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::broadcast(&mut turn.session, data),
            algorithm => streams::broadcast(&mut turn.session, algorithm, data),
        })
    }

    pub(crate) fn gather<T: Element>(
        &self,
        (input, output): (&[T], &mut [T]),
        counts: Counts<'_>,
        root: usize,
        patience: Duration,
    ) -> Result<()> {
        self.rank_exists("gather", root)?;
        let at_root = root == self.context.rank;
        let whole = if at_root { Some(output.len()) } else { None };
        let parts = self.parts("gather", counts, whole, input.len())?;
        let len = if counts.uneven() { parts.get(self.context.size - 1).end } else { input.len() };
        let call = Call::new(Kind::Gather, T::DTYPE, len).root(root).detail(counts.words());
        let output = if at_root { output } else { &mut [] };
        self.gather_call(call, &parts, counts.uneven(), (input, output), patience)
    }

    pub(crate) fn gather_call<T: Element>(
        &self,
        call: Call,
        parts: &Parts,
        uneven: bool,
        (input, output): (&[T], &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let bytes = parts.get(self.context.size - 1).end * size_of::<T>();
        let manner = Manner { bytes, own: size_of_val(input), uneven, message: None, patience };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, _, call) = turn.direct()?;
                direct::gather(shared, call, parts, (input, output))
            }
            _ => streams::gather(&mut turn.session, parts, input, output),
        })
    }

    pub(crate) fn scatter<T: Element>(
        &self,
        (input, output): (&[T], &mut [T]),
        counts: Counts<'_>,
        root: usize,
        patience: Duration,
    ) -> Result<()> {
        self.rank_exists("scatter", root)?;
        let at_root = root == self.context.rank;
        let whole = if at_root { Some(input.len()) } else { None };
        let parts = self.parts("scatter", counts, whole, output.len())?;
        let len = if counts.uneven() { parts.get(self.context.size - 1).end } else { output.len() };
        let call = Call::new(Kind::Scatter, T::DTYPE, len).root(root).detail(counts.words());
        self.scatter_call(call, &parts, counts.uneven(), (input, output), patience)
    }

    pub(crate) fn scatter_call<T: Element>(
        &self,
        call: Call,
        parts: &Parts,
        uneven: bool,
        (input, output): (&[T], &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let bytes = parts.get(self.context.size - 1).end * size_of::<T>();
        let manner = Manner { bytes, own: size_of_val(&*output), uneven, message: None, patience };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, _, call) = turn.direct()?;
                direct::scatter(shared, call, parts, (input, output))
            }
            _ => streams::scatter(&mut turn.session, parts, input, output),
        })
    }

    pub(crate) fn all_to_all<T: Element>(
        &self,
        (input, output): (&[T], &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        let size = self.context.size;
        if input.len() != output.len() || !input.len().is_multiple_of(size) {
            return Err(Error::Usage(format!(
                "all_to_all: {} elements in and {} out are not {size} parts of one length",
                input.len(),
                output.len()
            )));
        }
        let block = input.len() / size;
        let call = Call::new(Kind::AllToAll, T::DTYPE, block);
        self.all_to_all_call(call, block, (input, output), patience)
    }

    pub(crate) fn all_to_all_call<T: Element>(
        &self,
        call: Call,
        block: usize,
        (input, output): (&[T], &mut [T]),
        patience: Duration,
    ) -> Result<()> {
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let manner = Manner {
            bytes: size_of_val(input),
            own: size_of_val(input) / self.context.size,
            uneven: false,
            message: None,
            patience,
        };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, _, call) = turn.direct()?;
                direct::all_to_all(shared, call, block, (input, output))
            }
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::all_to_all(&mut turn.session, block, input, output),
            algorithm => {
                let parts = Parts::even(turn.session.context.size, block);
                streams::all_to_all(&mut turn.session, algorithm, (&parts, &parts), input, output)
            }
        })
    }

    pub(crate) fn all_to_all_v<T: Element>(
        &self,
        (input, sent): (&[T], &[usize]),
        (output, received): (&mut [T], &[usize]),
        patience: Duration,
    ) -> Result<()> {
        let rank = self.context.rank;
        let own = |counts: &[usize]| counts.get(rank).copied().unwrap_or(0);
        let sent_parts = self.parts("all_to_all", Counts::Of(sent), Some(input.len()), own(sent))?;
        let received_parts =
            self.parts("all_to_all", Counts::Of(received), Some(output.len()), own(received))?;
        if own(sent) != own(received) {
            return Err(Error::Usage(format!(
                "all_to_all: rank {rank} sends itself {} elements but receives {}",
                own(sent),
                own(received)
            )));
        }
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        // Lengths are agreed upon pair by pair.
        let call = Call::new(Kind::AllToAll, T::DTYPE, 0).detail([1]);
        let bytes = size_of_val(input).max(size_of_val(output));
        self.run(call, Manner { bytes, own: 0, uneven: true, message: None, patience }, |turn| {
            let parts = (&sent_parts, &received_parts);
            streams::all_to_all(&mut turn.session, turn.algorithm, parts, input, output)
        })
    }

    pub(crate) fn barrier(&self, patience: Duration) -> Result<()> {
        let call = Call::new(Kind::Barrier, DType::U8, 0);
        let manner = Manner { bytes: 0, own: 0, uneven: false, message: None, patience };
        self.run(call, manner, |turn| match turn.algorithm {
            Algorithm::Direct => {
                let (shared, _, call) = turn.direct()?;
                direct::barrier(shared, call)
            }
            #[cfg(feature = "mpi")]
            Algorithm::Native => mpi::barrier(&mut turn.session),
            _ => streams::barrier(&mut turn.session),
        })
    }

    fn other(&self, what: &str, peer: usize) -> Result<()> {
        self.rank_exists(what, peer)?;
        if peer == self.context.rank {
            return Err(Error::Usage(format!("{what}: rank {peer} is this rank itself")));
        }
        Ok(())
    }

    pub(crate) fn send<T: Element>(&self, data: &[T], to: usize, patience: Duration) -> Result<()> {
        self.other("send", to)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        let manner =
            Manner { bytes: size_of_val(data), own: 0, uneven: false, message: Some((to, true)), patience };
        self.run(call, manner, |turn| turn.session.exchange(to, Some(data), None))
    }

    pub(crate) fn recv<T: Element>(&self, data: &mut [T], from: usize, patience: Duration) -> Result<()> {
        self.other("recv", from)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        let manner = Manner {
            bytes: size_of_val(data),
            own: 0,
            uneven: false,
            message: Some((from, false)),
            patience,
        };
        self.run(call, manner, |turn| turn.session.exchange(from, None, Some(data)))
    }
}
