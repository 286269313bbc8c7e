//! What a group has carried, counted on each rank where it happens.

use crate::member::call::Kind;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What a group has done so far on this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations.
    pub operations: u64,
    /// Bytes of their data (of the larger side).
    pub bytes: u64,
    /// Time spent in them.
    pub busy: Duration,
    kinds: [Volume; Kind::ALL.len()],
}

/// Operations of one kind on this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Volume {
    /// Operations. A message counts once where it is sent and once where it is received.
    pub operations: u64,
    /// Bytes of their data (of the larger side).
    pub bytes: u64,
    /// Bytes that this rank has given to others: what its transport has taken, without the 32 bytes that tell a peer
    /// which operation begins. In a ring over n ranks 2(n-1)/n of an all-reduce's bytes, and half of that for a
    /// reduce-scatter or an all-gather.
    ///
    /// Where the algorithm is `direct`, nobody sends: these are then the bytes that the others read of this rank's data
    /// and of its results, the same 2(n-1)/n above 16 KiB, and n-1 times the bytes below, where everybody reads
    /// everything. 0 for what the message-passing library beneath carries out (`native`).
    pub sent: u64,
}

impl Traffic {
    /// Operations of this kind.
    pub fn of(&self, kind: Kind) -> Volume {
        self.kinds[kind as usize - 1]
    }

    /// The kinds that there were, and their operations.
    pub fn kinds(&self) -> impl Iterator<Item = (Kind, Volume)> {
        let all = Kind::ALL.iter().map(|&kind| (kind, self.of(kind)));
        all.filter(|(_, volume)| volume.operations > 0)
    }

    /// Bytes given to others, in operations of all kinds.
    pub fn sent(&self) -> u64 {
        self.kinds.iter().map(|volume| volume.sent).sum()
    }

    /// What came since `earlier`, which the same group reported.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut kinds = self.kinds;
        for (kind, before) in kinds.iter_mut().zip(&earlier.kinds) {
            kind.operations = kind.operations.saturating_sub(before.operations);
            kind.bytes = kind.bytes.saturating_sub(before.bytes);
            kind.sent = kind.sent.saturating_sub(before.sent);
        }
        Self {
            operations: self.operations.saturating_sub(earlier.operations),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            busy: self.busy.saturating_sub(earlier.busy),
            kinds,
        }
    }
}

/// Where it is counted: by one thread at a time, which needs no lock for it. What ends while another thread reads may be
/// there in part.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    /// Nanoseconds.
    busy: AtomicU64,
    /// Operations, bytes and bytes sent.
    kinds: [[AtomicU64; 3]; Kind::ALL.len()],
}

impl Counted {
    /// One more operation. Whoever calls this keeps others from doing so.
    pub(crate) fn add(&self, kind: Kind, bytes: u64, sent: u64, nanoseconds: u64) {
        let add = |to: &AtomicU64, more: u64| to.store(to.load(Relaxed).wrapping_add(more), Relaxed);
        add(&self.busy, nanoseconds);
        let [operations, all, given] = &self.kinds[kind as usize - 1];
        add(operations, 1);
        add(all, bytes);
        add(given, sent);
    }

    /// All of it.
    pub(crate) fn read(&self) -> Traffic {
        let kinds = std::array::from_fn(|kind| {
            let [operations, bytes, sent] = [0, 1, 2].map(|what| self.kinds[kind][what].load(Relaxed));
            Volume { operations, bytes, sent }
        });
        let sum = |of: fn(&Volume) -> u64| kinds.iter().map(of).sum();
        let (operations, bytes) = (sum(|volume| volume.operations), sum(|volume| volume.bytes));
        Traffic { operations, bytes, busy: Duration::from_nanos(self.busy.load(Relaxed)), kinds }
    }
}
