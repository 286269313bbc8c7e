//! Ranks as processes of one Linux host, over a segment in `/dev/shm`, or in a file where that is too small.
//!
//! There is one segment for the ranks of a job on a host, made with the first group of the job that shares memory. It is
//! one sparse file (`layout`), which all ranks map and which is unlinked then, so that nothing is left however the job
//! ends. Groups take their parts of it (`parts`), and give the memory back when all their ranks have dropped them; each
//! rank has an arena of registered memory there (`arena`), which all groups reduce in place.

mod arena;
mod layout;
mod parts;
mod ranges;
mod segment;

pub(crate) use arena::{Piece, Registry};
pub(crate) use parts::Part;
pub(crate) use segment::{Name, Segment};

use super::shared::Shared;
use super::{Transport, TransportKind};
use crate::error::Result;
use arena::Arena;
use parts::Parts;
use std::sync::Arc;
use std::time::Duration;

/// What a rank has of the segment of its job on this host. Cloning is cheap and gives the same.
#[derive(Clone)]
pub(crate) struct Memory {
    segment: Arc<Segment>,
    arena: Arc<Arena>,
    parts: Arc<Parts>,
}

impl Memory {
    /// Of `rank`, among those of the job on this host.
    pub(crate) fn new(segment: Segment, rank: usize) -> Self {
        let segment = Arc::new(segment);
        let arena = Arc::new(Arena::new(segment.clone(), rank));
        let parts = Arc::new(Parts::new(segment.clone(), rank));
        Self { segment, arena, parts }
    }

    /// Tells the segment from all others; never 0.
    pub(crate) fn nonce(&self) -> u64 {
        self.segment.nonce
    }

    /// A part for a group with `ranks` ranks on this host, of which this is the first.
    ///
    /// # Errors
    /// No room for it.
    pub(crate) fn give(&self, ranks: usize) -> Result<Part> {
        self.parts.give(ranks)
    }

    /// The part at `place`, which the first rank of a group has given it; all of its ranks on this host hold it.
    ///
    /// # Errors
    /// No part can be there.
    pub(crate) fn part(&self, place: usize, ranks: usize) -> Result<Part> {
        Part::at(self.segment.clone(), place, ranks)
    }

    /// The registered memory of a group whose ranks are these of the job's ranks on this host.
    pub(crate) fn registry(&self, ranks: Box<[usize]>) -> Registry {
        Registry::new(self.arena.clone(), ranks)
    }
}

/// The endpoint of one process.
pub(crate) struct ShmTransport {
    pub(crate) shared: Shared,
}

impl Transport for ShmTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        Ok(self.shared.try_send(to, parts))
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        Ok(self.shared.try_recv(from, parts))
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        self.shared.wait(to, from, timeout);
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.shared.set_patience(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        Some(&mut self.shared)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::algorithm::simulate::context;

    /// A segment as each rank of a host has mapped it.
    pub(super) fn mapped(ranks: usize) -> Vec<Segment> {
        let folder = tempfile::tempdir().unwrap();
        let (first, path) = Segment::create_in(folder.path(), ranks, 1, 7).unwrap();
        let others = (1..ranks).map(|_| Segment::open(&path, ranks, 1, 7).unwrap());
        let mut segments: Vec<_> = others.collect();
        segments.insert(0, first);
        segments
    }

    /// A group of all ranks of a host: what each of them has of it.
    pub(crate) fn host(ranks: usize) -> Vec<(Shared, Registry)> {
        let segments = mapped(ranks).into_iter().enumerate();
        let memories: Vec<_> = segments.map(|(rank, segment)| Memory::new(segment, rank)).collect();
        let first = memories[0].give(ranks).unwrap();
        let place = first.place();
        let mut parts = vec![first];
        parts.extend(memories[1..].iter().map(|memory| memory.part(place, ranks).unwrap()));
        let of = |(rank, (part, memory)): (usize, (Part, &Memory))| {
            let shared = Shared::with_lanes(Arc::new(part), context(rank, ranks), 1);
            (shared, memory.registry((0..ranks).collect()))
        };
        parts.into_iter().zip(&memories).enumerate().map(of).collect()
    }
}
