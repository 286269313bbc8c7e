//! Algorithms, a file each. Most are functions from (rank, size, length) to a [`schedule`] of messages that
//! [`run`] executes over any transport; `direct` reads and writes memory that ranks share; `adasum`, `bruck` and
//! `hierarchical` are made of several.

mod adasum;
mod bruck;
pub(crate) mod direct;
mod dissemination;
mod doubling;
mod halving_doubling;
pub(crate) mod hierarchical;
mod linear;
mod owners;
mod pairwise;
pub(crate) mod parts;
mod ring;
pub(crate) mod run;
pub(crate) mod schedule;
pub(crate) mod select;
pub(crate) mod session;
#[cfg(any(test, fuzzing))]
pub(crate) mod simulate;
pub(crate) mod streams;
mod tree;

use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::transport::TransportKind;
use std::fmt;
use std::str::FromStr;

/// How a collective operation is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Each rank reduces its own slice straight from its peers' memory.
    Direct,
    /// Reduce-scatter, then all-gather around a ring; broadcast and reduce along a chain.
    Ring,
    /// Two binary trees with half of the data each.
    Tree,
    /// Recursive halving and doubling.
    HalvingDoubling,
    /// Recursive doubling.
    Doubling,
    /// To and from the root directly.
    Linear,
    /// All-to-all by exchanges in pairs.
    Pairwise,
    /// All-to-all in log2 n steps.
    Bruck,
    /// Barrier in log2 n steps.
    Dissemination,
    /// Shared memory within hosts, messages between them.
    Hierarchical,
    /// The collective operation of the message-passing library beneath (MPI).
    Native,
}

impl Algorithm {
    /// All algorithms.
    pub const ALL: [Self; 11] = [
        Self::Direct,
        Self::Ring,
        Self::Tree,
        Self::HalvingDoubling,
        Self::Doubling,
        Self::Linear,
        Self::Pairwise,
        Self::Bruck,
        Self::Dissemination,
        Self::Hierarchical,
        Self::Native,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ring => "ring",
            Self::Tree => "tree",
            Self::HalvingDoubling => "halving_doubling",
            Self::Doubling => "doubling",
            Self::Linear => "linear",
            Self::Pairwise => "pairwise",
            Self::Bruck => "bruck",
            Self::Dissemination => "dissemination",
            Self::Hierarchical => "hierarchical",
            Self::Native => "native",
        }
    }

    /// Whether it can carry out `kind`.
    pub fn offers(self, kind: Kind) -> bool {
        use Kind::{
            AllGather, AllReduce, AllToAll, Barrier, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
        };
        match self {
            Self::Direct => !matches!(kind, Kind::Send | Kind::Join),
            Self::Ring => matches!(kind, AllReduce | ReduceScatter | AllGather | Broadcast | Reduce),
            Self::Tree => matches!(kind, AllReduce | Broadcast | Reduce),
            Self::HalvingDoubling => matches!(kind, AllReduce | ReduceScatter | AllGather),
            Self::Doubling => kind == AllReduce,
            Self::Linear => matches!(kind, Gather | Scatter),
            Self::Pairwise | Self::Bruck => kind == AllToAll,
            Self::Dissemination => kind == Barrier,
            Self::Hierarchical => matches!(kind, AllReduce | Broadcast),
            Self::Native => {
                matches!(
                    kind,
                    AllReduce | Reduce | Broadcast | AllGather | ReduceScatter | AllToAll | Barrier
                )
            }
        }
    }

    /// Whether it can carry out `kind` over `link`, with parts of one length.
    pub fn works_over(self, link: TransportKind, kind: Kind) -> bool {
        select::possible(self, kind, link, false)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::Usage(format!("unknown algorithm `{text}`; known are {known}"))
        })
    }
}
