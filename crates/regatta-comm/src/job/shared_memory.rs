//! The memory that the ranks of a host share: made by one of them for the whole job, and agreed on by all ranks of each
//! group.

use crate::error::{Error, Result};
use crate::member::context::Context;
use crate::member::timer::Timer;
use crate::rendezvous::store::StoreClient;
use crate::transport::Registry;
use crate::transport::shared::Shared;
#[cfg(target_os = "linux")]
use crate::transport::shm::{Memory, Name, Segment};
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::{path::Path, sync::Mutex, sync::PoisonError};

/// What a rank has of the memory that the job's ranks on its host share.
pub(super) struct HostMemory {
    /// The ranks of the job on this host.
    #[cfg(target_os = "linux")]
    ranks: Vec<usize>,
    /// This rank among them.
    #[cfg(target_os = "linux")]
    rank: usize,
    /// The memory, or why there is none; nothing before the first group that shares memory.
    #[cfg(target_os = "linux")]
    memory: Mutex<Option<Result<Memory>>>,
}

#[cfg(not(target_os = "linux"))]
impl HostMemory {
    pub(super) fn new(_: usize, _: Vec<usize>) -> Self {
        Self {}
    }

    pub(super) fn nonce(&self) -> u64 {
        0
    }

    pub(super) fn share(
        &self,
        _: &StoreClient,
        _: u64,
        _: &Context,
        _: usize,
        _: &Timer,
    ) -> Result<Result<(Shared, Arc<Registry>)>> {
        Ok(Err(Error::Usage("the shm transport is for Linux; use tcp".into())))
    }
}

/// What a rank answers that has its memory; the first of a host adds where the group has its part there.
#[cfg(target_os = "linux")]
const OK: &str = "ok ";

#[cfg(target_os = "linux")]
impl HostMemory {
    /// Of rank `rank` of the job, where `ranks` are on its host.
    pub(super) fn new(rank: usize, ranks: Vec<usize>) -> Self {
        let rank = ranks.iter().position(|&other| other == rank).unwrap_or(0);
        Self { ranks, rank, memory: Mutex::default() }
    }

    /// The memory that the ranks of this host share in the group `id`, or why one of its ranks has none: all ranks of the
    /// group agree on that.
    pub(super) fn share(
        &self,
        store: &StoreClient,
        id: u64,
        context: &Context,
        lanes: usize,
        timer: &Timer,
    ) -> Result<Result<(Shared, Arc<Registry>)>> {
        let here = context.host_of(context.rank);
        let prefix = format!("shm/{id:x}/");
        let known = self.known().clone();
        let first_group = known.is_none();
        // Whatever fails from here on, nothing is left behind.
        let (memory, name) = match known {
            Some(known) => (known, None),
            None => self.attach(store, &prefix, lanes, timer)?,
        };
        // The first rank here gives the group its part.
        let given = match &memory {
            Ok(memory) if context.rank == here[0] => memory.give(here.len()).map(Some),
            Ok(_) => Ok(None),
            Err(error) => Err(error.clone()),
        };
        let answer = match &given {
            Ok(Some(part)) => format!("{OK}{}", part.place()),
            Ok(None) => OK.to_string(),
            Err(error) => error.to_string(),
        };
        store.set(&format!("{prefix}{}", context.rank), answer.as_bytes())?;
        let answers = store.gather(&prefix, &context.names, timer)?;
        let answers: Vec<_> = answers.iter().map(|answer| String::from_utf8_lossy(answer)).collect();
        let trouble = |rank: usize| {
            let reason = (!answers[rank].starts_with(OK)).then(|| &answers[rank])?;
            let peer = context.names[rank];
            Some(Error::Rendezvous(format!("rank {peer} has no shared memory: {reason}")))
        };
        if first_group {
            // What not all ranks here have mapped is of no use to any group.
            let missing = here.iter().find_map(|&rank| trouble(rank));
            *self.known() = Some(missing.map_or(memory.clone(), Err));
        }
        // All have mapped it.
        drop(name);
        if let Some(error) = (0..context.size).find_map(trouble) {
            if let Ok(Some(part)) = given {
                part.withdraw();
            }
            return Ok(Err(error));
        }
        let (memory, given) = (memory?, given?);
        let part = match given {
            Some(part) => part,
            None => {
                let place = answers[here[0]][OK.len()..].parse();
                let place = place
                    .map_err(|_| Error::Rendezvous("the ranks of a host are of different versions".into()))?;
                memory.part(place, here.len())?
            }
        };
        let among = |&rank: &usize| self.ranks.iter().position(|&here| here == context.names[rank]);
        let registry = memory.registry(here.iter().filter_map(among).collect());
        Ok(Ok((Shared::with_lanes(Arc::new(part), context.among(here), lanes), Arc::new(registry))))
    }

    /// Tells the memory from all others; 0 where there is none.
    pub(super) fn nonce(&self) -> u64 {
        self.known().as_ref().and_then(|known| known.as_ref().ok()).map_or(0, Memory::nonce)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Option<Result<Memory>>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the segment, or opens that of the first rank of this host; also its name, where this rank has made it.
    ///
    /// All ranks of the host come here at once, with the group of all ranks: where a smaller group shares memory, that one
    /// does. But for a rank alone on its host, which needs nobody.
    fn attach(
        &self,
        store: &StoreClient,
        prefix: &str,
        lanes: usize,
        timer: &Timer,
    ) -> Result<(Result<Memory>, Option<Name>)> {
        let (first, size) = (self.ranks[0], self.ranks.len());
        let key = format!("{prefix}at/{first}");
        let mut name = None;
        let segment = if self.rank == 0 {
            let nonce = crate::rendezvous::random().max(1);
            let created = Segment::create(size, lanes, nonce);
            let published = match &created {
                Ok((_, at)) => format!("{nonce} {}", at.display()),
                Err(error) => format!("! {error}"),
            };
            let segment = created.map(|(segment, at)| {
                name = Some(Name(at));
                segment
            });
            if size > 1 {
                store.set(&key, published.as_bytes())?;
            }
            segment
        } else {
            let published = String::from_utf8_lossy(&store.get(&key, first, timer)?).into_owned();
            match published.split_once(' ').map(|(nonce, at)| (nonce.parse::<u64>(), at)) {
                Some((Ok(nonce), at)) => Segment::open(Path::new(at), size, lanes, nonce),
                _ => Err(Error::Rendezvous(format!("rank {first}: {published}"))),
            }
        };
        Ok((segment.map(|segment| Memory::new(segment, self.rank)), name))
    }
}
