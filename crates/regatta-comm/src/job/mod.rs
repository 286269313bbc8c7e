//! A rank's membership in its job: the store, the news, and how groups get their transports.

mod gathering;
mod link;
pub(crate) mod options;
mod shared_memory;
mod start;

pub(crate) use link::Link;
pub(crate) use start::Reached;

use crate::algorithm::select::Table;
use crate::error::{Error, Result};
use crate::job::options::Options;
use crate::member::call::Call;
use crate::member::context::Context;
use crate::member::directory::Directory;
use crate::member::health::Health;
use crate::rendezvous::store::StoreClient;
use crate::rendezvous::{StoreServer, World};
use crate::transport::tcp::Connections;
use crate::transport::thread::Hub;
use gathering::Met;
use link::Means;
use shared_memory::HostMemory;
use start::{gave_up, join_timer, tell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest wait at the end of a rank until what it has sent has left this host.
const LINGER: Duration = Duration::from_secs(10);

/// Dropped when the last group of the rank is: the rank leaves the job.
pub(crate) struct Job {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) health: Arc<Health>,
    /// Rank 0's, the same for all.
    pub(crate) tuning: Arc<Table>,
    /// Tells this job from others in the names of files.
    name: String,
    /// The host of each rank.
    hosts: Vec<Vec<u8>>,
    ways: Ways,
    /// As far as has been said, ranks of a host share memory.
    shared_memory: AtomicBool,
}

enum Ways {
    /// Alone: nobody to talk to.
    Solo,
    /// The other ranks are threads of this process.
    Threads(Arc<Hub>),
    /// The other ranks are processes. The client goes before the server.
    Processes {
        connections: Arc<Connections>,
        /// How long to wait at the end until what was sent has left this host.
        patience: Duration,
        memory: HostMemory,
        store: Arc<StoreClient>,
        server: Option<StoreServer>,
    },
}

impl Job {
    pub(crate) fn solo() -> Self {
        let (health, tuning) = (Arc::default(), Arc::default());
        let name = crate::rendezvous::random_name();
        let (ways, shared_memory) = (Ways::Solo, AtomicBool::new(true));
        Self { rank: 0, size: 1, health, tuning, name, hosts: vec![vec![]], ways, shared_memory }
    }

    pub(crate) fn threads(size: usize, options: &Options) -> Vec<Self> {
        let hub = Arc::new(Hub::default());
        let tuning = Arc::new(options.tuning.clone().unwrap_or_default());
        let name = crate::rendezvous::random_name();
        let rank = |rank| Self {
            rank,
            size,
            name: name.clone(),
            health: hub.health().clone(),
            tuning: tuning.clone(),
            hosts: vec![vec![]; size],
            ways: Ways::Threads(hub.clone()),
            shared_memory: AtomicBool::new(true),
        };
        (0..size).map(rank).collect()
    }

    /// Waits for the other processes of `world`, once the store is reached.
    pub(crate) fn assemble(world: &World, options: &Options, reached: Reached) -> Result<Self> {
        let met = options.check().and_then(|()| gathering::meet(world, options, &reached));
        let Reached { health, store, server, .. } = reached;
        let Met { hosts, tuning, name, connections } = met.inspect_err(|error| {
            if !matches!(error, Error::Aborted { .. }) {
                tell(world.rank, &store, server.as_ref(), &gave_up(world.rank, &error.to_string()));
            }
        })?;
        let here = (0..world.size).filter(|&rank| hosts[rank] == hosts[world.rank]).collect();
        let (memory, patience) = (HostMemory::new(world.rank, here), options.deadline.min(LINGER));
        let ways = Ways::Processes { connections, patience, memory, store, server };
        let shared_memory = AtomicBool::new(true);
        let (rank, size, tuning) = (world.rank, world.size, Arc::new(tuning));
        Ok(Self { rank, size, health, tuning, name, hosts, ways, shared_memory })
    }

    /// Tells this job from others in the names of files.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where the ranks leave each other word.
    pub(crate) fn directory(&self) -> Option<Arc<dyn Directory>> {
        match &self.ways {
            Ways::Solo => None,
            Ways::Threads(hub) => Some(hub.clone()),
            Ways::Processes { store, .. } => Some(store.clone()),
        }
    }

    /// What to add to this host's clock to get the clock that all ranks share, in microseconds.
    pub(crate) fn clock_offset_us(&self) -> i64 {
        match &self.ways {
            Ways::Processes { store, .. } => store.clock_offset_us(),
            _ => 0,
        }
    }

    /// The ranks of a group by host; `names` are their ranks in the world.
    pub(crate) fn by_host(&self, names: &[usize]) -> Vec<Vec<usize>> {
        let mut lists: Vec<(&[u8], Vec<usize>)> = vec![];
        for (rank, &name) in names.iter().enumerate() {
            let host = self.hosts[name].as_slice();
            match lists.iter_mut().find(|(known, _)| *known == host) {
                Some((_, list)) => list.push(rank),
                None => lists.push((host, vec![rank])),
            }
        }
        lists.into_iter().map(|(_, list)| list).collect()
    }

    /// Ends the job for all ranks.
    pub(crate) fn abort(&self, reason: &str) {
        let reason = gave_up(self.rank, reason);
        self.health.end(Some(self.rank), &reason);
        if let Ways::Processes { store, server, .. } = &self.ways {
            tell(self.rank, store, server.as_ref(), &reason);
        }
    }

    /// Says, once for all ranks, why ranks that could share memory do not.
    fn without_shared_memory(&self, context: &Context, reason: &Error) {
        if self.shared_memory.swap(false, Ordering::Relaxed) && context.rank == 0 {
            crate::say::say(format_args!(
                "warning: the ranks of a host do not share memory and use TCP instead, which is slower: {reason} (to \
                 have it so without this warning: --transport tcp or REGATTA_TRANSPORT=tcp)"
            ));
        }
    }

    /// Ends the job for all ranks, since `call` has failed with `error`; the error to report, which may be an earlier one.
    pub(crate) fn end_by(&self, call: &Call, error: Error) -> Error {
        let error = match error {
            Error::PeerDied { rank, .. } => self.health.closed(rank, call),
            // Others may have learnt more meanwhile.
            error @ Error::Deadline { .. } => self.health.check().err().unwrap_or(error),
            error => error,
        };
        if !matches!(error, Error::Aborted { .. }) {
            self.abort(&error.to_string());
        }
        error
    }

    /// Ends the job for all ranks; why it has ended, which may be something earlier.
    pub(crate) fn give_up(&self, reason: &str) -> Error {
        self.abort(reason);
        let own = Error::Aborted { rank: Some(self.rank), reason: reason.into() };
        self.health.check().err().unwrap_or(own)
    }

    /// A transport for the group `id`, in which this process is `context.rank`. All members call it.
    pub(crate) fn link(&self, id: u64, context: &Context, options: &Options) -> Result<Link> {
        match &self.ways {
            Ways::Solo => link::threads(&Hub::default(), 0, context, 1),
            Ways::Threads(hub) => link::threads(hub, id, context, options.lanes),
            Ways::Processes { store, connections, memory, .. } => {
                let unshared = |error: &Error| self.without_shared_memory(context, error);
                let means = Means { store, connections, memory };
                link::processes(&means, id, context, options, &join_timer(options), &unshared)
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The client of a store says goodbye when it is dropped.
        match &self.ways {
            Ways::Solo => {}
            Ways::Threads(_) => self.health.left(self.rank),
            Ways::Processes { connections, patience, .. } => connections.close(*patience),
        }
    }
}
