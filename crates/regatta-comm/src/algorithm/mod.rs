//! Algorithms, a file each. Most are functions from (rank, size, length) to a [`schedule`] of messages that
//! [`run`] executes over any transport; `direct` reads and writes memory that ranks share; `adasum`, `bruck` and
//! `hierarchical` are made of several.

mod adasum;
pub(crate) mod backend;
mod backends;
mod bruck;
mod costs;
pub(crate) mod direct;
mod dissemination;
mod doubling;
mod halving_doubling;
mod hierarchical;
mod linear;
pub(crate) mod messages;
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
mod streams;
mod tree;

use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::transport::TransportKind;
use backend::{Backend, Offer, Wanted};
use std::fmt;
use std::str::FromStr;

macro_rules! algorithms {
    (
        $($(#[doc = $doc:literal])* $(#[cfg($cfg:meta)])? $algorithm:ident = $name:literal by $backend:expr),* $(,)?
    ) => {
        /// How a collective operation is carried out.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Algorithm {
            $($(#[doc = $doc])* $(#[cfg($cfg)])? $algorithm),*
        }

        impl Algorithm {
            /// All algorithms.
            pub const ALL: &'static [Self] = &[$($(#[cfg($cfg)])? Self::$algorithm),*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$algorithm => $name),*
                }
            }

            pub(crate) fn backend(self) -> &'static dyn Backend {
                match self {
                    $($(#[cfg($cfg)])? Self::$algorithm => &$backend),*
                }
            }
        }
    };
}

// Of algorithms that suit an operation equally well, the first is taken.
algorithms! {
    /// Each rank reduces its own slice straight from its peers' memory.
    Direct = "direct" by backends::direct::Direct,
    /// Reduce-scatter, then all-gather around a ring; broadcast and reduce along a chain.
    Ring = "ring" by backends::streams::Streams,
    /// Two binary trees with half of the data each.
    Tree = "tree" by backends::streams::Streams,
    /// Recursive halving and doubling.
    HalvingDoubling = "halving_doubling" by backends::streams::Streams,
    /// Recursive doubling.
    Doubling = "doubling" by backends::streams::Streams,
    /// To and from the root directly.
    Linear = "linear" by backends::streams::Streams,
    /// All-to-all by exchanges in pairs.
    Pairwise = "pairwise" by backends::streams::Streams,
    /// All-to-all in log2 n steps.
    Bruck = "bruck" by backends::streams::Streams,
    /// Barrier in log2 n steps.
    Dissemination = "dissemination" by backends::streams::Streams,
    /// Shared memory within hosts, messages between them.
    Hierarchical = "hierarchical" by backends::hierarchical::Hierarchical,
    /// The collective operation of the message-passing library beneath (MPI).
    Native = "native" by backends::native::Native,
    /// For a test.
    #[cfg(test)]
    Toy = "toy" by backends::toy::Toy,
}

impl Algorithm {
    /// Whether it can carry out `kind` over any transport.
    pub fn offers(self, kind: Kind) -> bool {
        TransportKind::ALL.iter().any(|&link| self.works_over(link, kind))
    }

    /// Whether it can carry out `kind`, an operation of all ranks, over `link`, with parts of one length.
    pub fn works_over(self, link: TransportKind, kind: Kind) -> bool {
        !matches!(kind, Kind::Send | Kind::Join) && self.suits(&Wanted::plain(kind, link))
    }

    pub(crate) fn suits(self, wanted: &Wanted) -> bool {
        self.offer(wanted) != Offer::No
    }

    pub(crate) fn offer(self, wanted: &Wanted) -> Offer {
        self.backend().offers(self, wanted)
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
        Self::ALL.iter().copied().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
            let known = Self::ALL.iter().map(|known| known.name()).collect::<Vec<_>>().join(", ");
            Error::Usage(format!("unknown algorithm `{text}`; known are {known}"))
        })
    }
}
