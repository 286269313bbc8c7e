//! Checks the arguments of an operation, once for each kind.

use super::engine::Core;
use super::operation::{Counts, Operation};
use crate::algorithm::backend::Task;
use crate::algorithm::parts::Parts;
use crate::algorithm::schedule::part;
use crate::error::{Error, Result};
use crate::member::call::{Call, Kind};
use crate::numbers::element::{DType, ReduceOp, Reduction};
use crate::numbers::memory::{Input, Output, Space};

/// More than any memory holds, and few enough to count their bytes.
const MOST_ELEMENTS: usize = usize::MAX >> 8;

/// What is known of an operation once its lengths fit.
struct Shape {
    parts: Parts,
    received: Option<Parts>,
    /// Elements that ranks agree on.
    len: usize,
    /// Elements of the larger side, and of this rank's part of it.
    larger: usize,
    own: usize,
}

impl Shape {
    fn whole(len: usize, own: usize) -> Self {
        Self { parts: Parts::NONE, received: None, len, larger: len, own }
    }
}

impl Core {
    /// The operation with its memory, where that fits it.
    #[inline(always)]
    pub(crate) fn check<'a>(
        &self,
        operation: &Operation,
        dtype: DType,
        input: Option<Input<'a>>,
        output: Option<Output<'a>>,
    ) -> Result<Task<'a>> {
        let &Operation { kind, reduction, root, receives, .. } = operation;
        let (what, at_root) = (operation.name(), root == self.context.rank);
        match kind {
            Kind::Reduce | Kind::Broadcast | Kind::Gather | Kind::Scatter => {
                self.context.rank_exists(what, root)?
            }
            Kind::Send => self.context.other(what, root)?,
            _ => {}
        }
        if matches!(kind, Kind::AllReduce | Kind::Reduce | Kind::ReduceScatter) {
            reducible(kind, dtype, reduction)?;
        }
        let (input, output) = match kind {
            // That of the others is neither read nor written.
            Kind::Gather if !at_root => (input, None),
            Kind::Scatter if !at_root => (None, output),
            _ => (input, output),
        };
        let given = input.map(|input| input.bytes() / dtype.bytes());
        let taken = output.as_ref().map(|output| output.bytes() / dtype.bytes());
        let shape = self.shape(operation, given, taken)?;
        let Shape { parts, received, len, larger, own } = shape;
        let call = Call::new(kind, dtype, len);
        let call = match kind {
            Kind::Send => call,
            // Lengths are agreed upon pair by pair.
            Kind::AllToAll if received.is_some() => call.detail([1]),
            _ => {
                let call = call.op(reduction.op).root(root);
                let after = (reduction.after != 1.0).then(|| reduction.after.to_bits());
                if after.is_none() && operation.lengths.is_empty() && !operation.counts.uneven() {
                    call
                } else {
                    let words = operation.lengths.iter().copied().chain(operation.counts.words());
                    call.detail(after.into_iter().chain(words))
                }
            }
        };
        let task = Task {
            call,
            input,
            output,
            parts,
            received,
            uneven: operation.counts.uneven(),
            bytes: larger * dtype.bytes(),
            own: own * dtype.bytes(),
            message: (kind == Kind::Send).then_some((root, !receives)),
        };
        self.reachable(operation, &task)?;
        Ok(task)
    }

    /// Holds the elements `given` to an operation and `taken` from it against what it needs.
    #[inline(always)]
    fn shape(&self, operation: &Operation, given: Option<usize>, taken: Option<usize>) -> Result<Shape> {
        let (rank, size) = (self.context.rank, self.context.size);
        let Operation { kind, root, counts, received, .. } = operation;
        let (what, at_root, uneven) = (operation.name(), *root == rank, counts.uneven());
        let side = |side: Option<usize>, name: &str| {
            side.ok_or_else(|| Error::Usage(format!("{what}: rank {rank} gave no {name}")))
        };
        let unused = |side: Option<usize>, name: &str| match side {
            None => Ok(()),
            Some(_) => Err(Error::Usage(format!("{what}: it uses no {name}, but rank {rank} gave one"))),
        };
        let parted = |parts: Parts, len: usize, own: usize| {
            let (len, larger) = (if uneven { parts.total() } else { len }, parts.total());
            Shape { parts, received: None, len, larger, own }
        };
        match kind {
            Kind::AllReduce | Kind::Reduce | Kind::Broadcast | Kind::Barrier | Kind::Send if uneven => {
                Err(Error::Usage(format!("{what}: it has no parts that could have counts")))
            }
            Kind::AllReduce | Kind::Reduce | Kind::Broadcast => {
                unused(given, "input")?;
                let len = side(taken, "output")?;
                // Every rank reduces one slice.
                let own = if *kind == Kind::Broadcast { 0 } else { part(len, size, rank).len() };
                Ok(Shape::whole(len, own))
            }
            Kind::ReduceScatter => {
                let (whole, own) = (side(given, "input")?, side(taken, "output")?);
                Ok(parted(self.parts(what, counts, Some(whole), own)?, own, own))
            }
            Kind::AllGather => {
                let whole = side(taken, "output")?;
                // Without an input it is in its place in the output.
                let own = given.unwrap_or_else(|| match counts {
                    Counts::Even => whole / size,
                    Counts::Of(counts) => counts.get(rank).copied().unwrap_or(0),
                });
                Ok(parted(self.parts(what, counts, Some(whole), own)?, own, own))
            }
            Kind::Gather => {
                let own = side(given, "input")?;
                let whole = if at_root { Some(side(taken, "output")?) } else { None };
                Ok(parted(self.parts(what, counts, whole, own)?, own, own))
            }
            Kind::Scatter => {
                let own = side(taken, "output")?;
                let whole = if at_root { Some(side(given, "input")?) } else { None };
                Ok(parted(self.parts(what, counts, whole, own)?, own, own))
            }
            Kind::AllToAll => {
                let (input, output) = (side(given, "input")?, side(taken, "output")?);
                match counts {
                    Counts::Even => self.even_exchange(input, output),
                    Counts::Of(sent) => self.exchange(what, (input, sent), (output, received)),
                }
            }
            Kind::Barrier => {
                unused(given, "input")?;
                unused(taken, "output")?;
                Ok(Shape::whole(0, 0))
            }
            Kind::Send if operation.receives => {
                unused(given, "input")?;
                Ok(Shape::whole(side(taken, "output")?, 0))
            }
            Kind::Send => {
                unused(taken, "output")?;
                Ok(Shape::whole(side(given, "input")?, 0))
            }
            Kind::Join => Err(Error::Internal("a join is not an operation on numbers".into())),
        }
    }

    fn even_exchange(&self, input: usize, output: usize) -> Result<Shape> {
        let size = self.context.size;
        if input != output || !input.is_multiple_of(size) {
            return Err(Error::Usage(format!(
                "all_to_all: {input} elements in and {output} out are not {size} parts of one length"
            )));
        }
        let block = input / size;
        Ok(Shape { parts: Parts::even(size, block), received: None, len: block, larger: input, own: block })
    }

    fn exchange(
        &self,
        what: &str,
        (input, sent): (usize, &[usize]),
        (output, received): (usize, &[usize]),
    ) -> Result<Shape> {
        let rank = self.context.rank;
        let own = |counts: &[usize]| counts.get(rank).copied().unwrap_or(0);
        let parts = self.parts_of(what, sent, Some(input), own(sent))?;
        let received_parts = self.parts_of(what, received, Some(output), own(received))?;
        if own(sent) != own(received) {
            return Err(Error::Usage(format!(
                "{what}: rank {rank} sends itself {} elements but receives {}",
                own(sent),
                own(received)
            )));
        }
        Ok(Shape { parts, received: Some(received_parts), len: 0, larger: input.max(output), own: 0 })
    }

    /// The parts of a whole of `whole` elements, of which this rank's own has `own`.
    fn parts(&self, what: &str, counts: &Counts, whole: Option<usize>, own: usize) -> Result<Parts> {
        let size = self.context.size;
        let counts = match counts {
            Counts::Of(counts) => return self.parts_of(what, counts, whole, own),
            Counts::Even => Parts::even(size, own),
        };
        match whole.filter(|&whole| whole != counts.total()) {
            None => Ok(counts),
            Some(whole) => Err(Error::Usage(format!(
                "{what}: {whole} elements are not {size} parts (one for each rank) of {own} elements"
            ))),
        }
    }

    /// As [`parts`](Self::parts), with a count for each rank.
    fn parts_of(&self, what: &str, counts: &[usize], whole: Option<usize>, own: usize) -> Result<Parts> {
        let (rank, size) = (self.context.rank, self.context.size);
        if counts.len() != size {
            let given = counts.len();
            return Err(Error::Usage(format!("{what}: {given} counts for a group of {size} ranks")));
        }
        let sum = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        let Some(sum) = sum.filter(|&sum| sum <= MOST_ELEMENTS) else {
            return Err(Error::Usage(format!("{what}: the counts add up to more than memory can hold")));
        };
        if let Some(whole) = whole.filter(|&whole| whole != sum) {
            return Err(Error::Usage(format!("{what}: {whole} elements, but the counts add up to {sum}")));
        }
        if counts[rank] != own {
            let count = counts[rank];
            return Err(Error::Usage(format!("{what}: {own} elements, but rank {rank}'s count is {count}")));
        }
        Ok(Parts::of(counts))
    }

    /// Whether something here can reach the memory.
    #[inline]
    fn reachable(&self, operation: &Operation, task: &Task<'_>) -> Result<()> {
        let (what, space) = (operation.name(), task.space());
        if task.input.is_some_and(|input| input.space() != space) {
            return Err(Error::Usage(format!("{what}: the input and the output are not in one memory")));
        }
        if space == Space::Host {
            return Ok(());
        }
        if operation.reduction.before != 1.0 || operation.reduction.after != 1.0 {
            return Err(Error::Usage(format!("{what}: factors are for numbers in the host's memory")));
        }
        match self.choose(&task.wanted(self.kind), task.bytes) {
            Some(_) => Ok(()),
            None => Err(Error::Usage(format!(
                "{what}: nothing here reaches the memory of {space} over {}: copy the numbers to the host",
                self.kind
            ))),
        }
    }
}

#[inline]
fn reducible(kind: Kind, dtype: DType, reduction: Reduction) -> Result<()> {
    let what = kind.name();
    if !reduction.op.suits(dtype) {
        return Err(Error::Usage(format!("{what}: {dtype} cannot be reduced by {}", reduction.op)));
    }
    if reduction.op == ReduceOp::Adasum && kind != Kind::AllReduce {
        return Err(Error::Usage(format!("{what}: adasum is for all_reduce only")));
    }
    Ok(())
}
