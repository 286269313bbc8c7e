//! What ranks do together, without the memory that it is about.

use crate::member::call::Kind;
use crate::numbers::element::{ReduceOp, Reduction};

/// An operation: what ranks do, and with whom; the memory is given beside it, to [`Group::run`](crate::Group::run).
///
/// Made by the function with the name of the method of [`Group`](crate::Group) that does the same. Some read an input
/// and write an output; others work in place, on the output alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    pub(crate) kind: Kind,
    pub(crate) reduction: Reduction,
    /// The root, or the peer of a message.
    pub(crate) root: usize,
    /// The rank receives a message, and does not send it.
    pub(crate) receives: bool,
    pub(crate) counts: Counts,
    /// Elements that come from each rank, in an all-to-all of parts that differ.
    pub(crate) received: Vec<usize>,
    /// Lengths of what is packed together: ranks must agree on them.
    pub(crate) lengths: Vec<u64>,
}

/// How the parts of a whole are given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Counts {
    /// All alike.
    Even,
    /// Elements of each rank's part; the same on all ranks.
    Of(Vec<usize>),
}

impl Operation {
    pub(crate) fn of(kind: Kind) -> Self {
        Self {
            kind,
            reduction: ReduceOp::Sum.into(),
            root: 0,
            receives: false,
            counts: Counts::Even,
            received: vec![],
            lengths: vec![],
        }
    }

    pub(crate) fn reducing(kind: Kind, reduction: impl Into<Reduction>) -> Self {
        Self { reduction: reduction.into(), ..Self::of(kind) }
    }

    pub(crate) fn rooted(self, root: usize) -> Self {
        Self { root, ..self }
    }

    pub(crate) fn packed(self, lengths: Vec<u64>) -> Self {
        Self { lengths, ..self }
    }

    /// In place.
    pub fn all_reduce(reduction: impl Into<Reduction>) -> Self {
        Self::reducing(Kind::AllReduce, reduction)
    }

    /// In place.
    pub fn reduce(reduction: impl Into<Reduction>, root: usize) -> Self {
        Self::reducing(Kind::Reduce, reduction).rooted(root)
    }

    /// From an input to an output.
    pub fn reduce_scatter(reduction: impl Into<Reduction>) -> Self {
        Self::reducing(Kind::ReduceScatter, reduction)
    }

    /// From an input to an output; in place where the input is left out.
    pub fn all_gather() -> Self {
        Self::of(Kind::AllGather)
    }

    /// From an input to an output, which only the root needs.
    pub fn gather(root: usize) -> Self {
        Self::of(Kind::Gather).rooted(root)
    }

    /// From an input, which only the root needs, to an output.
    pub fn scatter(root: usize) -> Self {
        Self::of(Kind::Scatter).rooted(root)
    }

    /// In place.
    pub fn broadcast(root: usize) -> Self {
        Self::of(Kind::Broadcast).rooted(root)
    }

    /// From an input to an output.
    pub fn all_to_all() -> Self {
        Self::of(Kind::AllToAll)
    }

    /// From an input to an output: `sent[r]` elements go to rank r, and `received[r]` come from it.
    pub fn all_to_all_v(sent: &[usize], received: &[usize]) -> Self {
        Self { received: received.to_vec(), ..Self::all_to_all().counts(sent) }
    }

    /// Without memory.
    pub fn barrier() -> Self {
        Self::of(Kind::Barrier)
    }

    /// Sends an input.
    pub fn send(to: usize) -> Self {
        Self::of(Kind::Send).rooted(to)
    }

    /// Receives an output.
    pub fn recv(from: usize) -> Self {
        Self { receives: true, ..Self::send(from) }
    }

    /// The same where rank r's part has `counts[r]` elements, for operations with parts: `reduce_scatter`, `all_gather`,
    /// `gather` and `scatter`. All ranks give the same counts.
    #[must_use]
    pub fn counts(self, counts: &[usize]) -> Self {
        Self { counts: Counts::Of(counts.to_vec()), ..self }
    }

    /// Its name, as the method's of [`Group`](crate::Group).
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Send if self.receives => "recv",
            Kind::Send => "send",
            kind => kind.name(),
        }
    }
}

impl Counts {
    pub(crate) fn words(&self) -> Vec<u64> {
        match self {
            Self::Even => vec![],
            Self::Of(counts) => counts.iter().map(|&count| count as u64).collect(),
        }
    }

    pub(crate) fn uneven(&self) -> bool {
        matches!(self, Self::Of(_))
    }
}
