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
mod pairwise;
mod ring;
pub(crate) mod run;
pub(crate) mod schedule;
pub(crate) mod select;
#[cfg(any(test, fuzzing))]
pub(crate) mod simulate;
pub(crate) mod streams;
mod tree;

use crate::call::{Call, Kind, show};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::health::Health;
use crate::joining::Joining;
use crate::notes::Notes;
use crate::on_late::OnLate;
use crate::recorder::Recorder;
use crate::transport::{Transport, TransportKind};
use run::{Numbers, Pool};
use schedule::{Schedule, What};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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

/// What an algorithm knows of its group.
#[derive(Clone)]
pub(crate) struct Context {
    pub rank: usize,
    pub size: usize,
    /// Ranks of the world by rank of the group, for errors.
    pub names: Arc<[usize]>,
    /// Ranks of the group by host, each list in order.
    pub hosts: Arc<[Vec<usize>]>,
    pub health: Arc<Health>,
    pub notes: Arc<Notes>,
    pub recorder: Arc<Mutex<Recorder>>,
    pub joining: Arc<Joining>,
    pub deadline: Duration,
    /// When a late rank is reported, and how.
    pub warn: Duration,
    pub on_late: OnLate,
}

impl Context {
    /// What is wrong when `peer` calls `theirs` while this rank calls `call`.
    pub(crate) fn mismatch(&self, call: Call, peer: usize, theirs: Option<Call>) -> Error {
        // A rank that only sends may be further on: what was called under the same number is what is wrong.
        let numbered = theirs.filter(|theirs| theirs.is_collective() && call.is_collective());
        let earlier = numbered.and_then(|theirs| self.earlier(theirs.sequence));
        let earlier = earlier.filter(|own| Some(*own) != theirs);
        if numbered.is_some_and(|theirs| theirs.sequence > call.sequence) {
            // The peer compares what it called before with our note, when it waits.
            self.notes.say(self.current().unwrap_or(call), self.names[peer]);
        }
        self.disagree(earlier.unwrap_or(call), self.names[peer], theirs)
    }

    /// This rank's call `own` and `theirs` of rank `other` of the world will never meet. A rank that is further on knows
    /// better what it called before, so its word is waited for.
    pub(crate) fn disagree(&self, own: Call, other: usize, theirs: Option<Call>) -> Error {
        let mismatch = Error::Mismatch {
            rank: self.names[self.rank],
            call: own.to_string(),
            other,
            other_call: show(theirs),
        };
        let further = |theirs: Call| theirs.sequence > own.sequence && theirs.is_collective();
        match own.is_collective() && theirs.is_some_and(further) {
            true => self.health.verdict(mismatch),
            false => mismatch,
        }
    }

    /// The operation that goes on in the group.
    pub(crate) fn current(&self) -> Option<Call> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner).current()
    }

    /// The collective operation with this number, as far as it is remembered.
    pub(crate) fn earlier(&self, sequence: u32) -> Option<Call> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner).call(sequence)
    }

    /// The ranks on the host of `rank`, in order.
    pub(crate) fn host_of(&self, rank: usize) -> &[usize] {
        self.hosts.iter().find(|host| host.contains(&rank)).map_or(&[], Vec::as_slice)
    }

    /// The context of some ranks of the group, numbered anew, of which this rank is one.
    pub(crate) fn among(&self, ranks: &[usize]) -> Self {
        Self {
            rank: ranks.iter().position(|&rank| rank == self.rank).unwrap_or(0),
            size: ranks.len(),
            names: ranks.iter().map(|&rank| self.names[rank]).collect(),
            hosts: Arc::new([]),
            ..self.clone()
        }
    }
}

/// Where a rank stands in an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub rank: usize,
    pub size: usize,
    /// Elements that go on together.
    pub chunk: usize,
}

impl Place {
    pub(crate) fn schedule(self) -> Schedule {
        Schedule::new(self.chunk)
    }

    /// All other ranks, the right neighbour first.
    pub(crate) fn others(self) -> impl Iterator<Item = usize> {
        (1..self.size).map(move |distance| (self.rank + distance) % self.size)
    }
}

/// One operation over streams.
pub(crate) struct Session<'a> {
    pub transport: &'a mut dyn Transport,
    pub context: &'a Context,
    pub call: Call,
    pub pool: &'a mut Pool,
    /// Bytes of numbers that this rank has sent so far.
    pub sent: &'a mut u64,
    /// Bytes that go on together.
    pub chunk: usize,
}

impl Session<'_> {
    pub(crate) fn place<T>(&self) -> Place {
        Place {
            rank: self.context.rank,
            size: self.context.size,
            chunk: (self.chunk / size_of::<T>()).max(1),
        }
    }

    /// Executes a schedule.
    pub(crate) fn run<T: Element>(&mut self, schedule: &Schedule, numbers: Numbers<'_, T>) -> Result<()> {
        run::run(self, schedule, numbers)
    }

    /// Sends to `peer` and receives from it, at the same time.
    pub(crate) fn exchange<T: Element>(
        &mut self,
        peer: usize,
        send: Option<&[T]>,
        receive: Option<&mut [T]>,
    ) -> Result<()> {
        let mut schedule = self.place::<T>().schedule();
        if let Some(send) = send {
            schedule.add(peer, What::SendInput, 0..send.len(), None);
        }
        if let Some(receive) = &receive {
            schedule.add(peer, What::Copy, 0..receive.len(), None);
        }
        let numbers = Numbers { input: send.unwrap_or_default(), working: receive.unwrap_or_default() };
        self.run(&schedule, numbers)
    }
}
