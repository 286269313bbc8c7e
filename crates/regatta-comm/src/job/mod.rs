//! A rank's membership in its job: the store, the news, and how groups get their transports.

mod gathering;
mod generation;
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

/// A rank's part in one generation of its job. When the last one is dropped, the rank leaves the job.
pub(crate) struct Job {
    /// This rank, by which it is known in all generations.
    pub(crate) rank: usize,
    /// Ranks in this generation.
    pub(crate) size: usize,
    pub(crate) generation: u64,
    pub(crate) health: Arc<Health>,
    /// Where ranks are processes.
    processes: Option<Processes>,
    /// Rank 0's, the same for all.
    pub(crate) tuning: Arc<Table>,
    /// Tells this job from others in the names of files.
    name: String,
    /// The host of each rank.
    hosts: Vec<Vec<u8>>,
    ways: Arc<Ways>,
    /// As far as has been said, ranks of a host share memory.
    shared_memory: AtomicBool,
}

/// What ranks that are processes have for a generation.
struct Processes {
    store: Arc<StoreClient>,
    /// The memory that those of this host share; it stays as long as all of them do.
    memory: Arc<HostMemory>,
}

/// How a rank reaches the others, in all generations.
enum Ways {
    /// Alone: nobody to talk to.
    Solo,
    /// The other ranks are threads of this process.
    Threads { hub: Arc<Hub>, rank: usize },
    /// The other ranks are processes. The client goes before the server.
    Processes {
        connections: Arc<Connections>,
        /// How long to wait at the end until what was sent has left this host.
        patience: Duration,
        /// Kept until the connections are closed: then the rank says goodbye.
        _store: Arc<StoreClient>,
        server: Option<StoreServer>,
    },
}

impl Ways {
    fn processes(
        connections: Arc<Connections>,
        options: &Options,
        store: Arc<StoreClient>,
        server: Option<StoreServer>,
    ) -> Self {
        Self::Processes { connections, patience: options.deadline.min(LINGER), _store: store, server }
    }
}

impl Job {
    pub(crate) fn solo() -> Self {
        let (health, tuning) = (Arc::default(), Arc::default());
        let name = crate::rendezvous::random_name();
        let (ways, shared_memory) = (Arc::new(Ways::Solo), AtomicBool::new(true));
        let hosts = vec![vec![]];
        Self {
            rank: 0,
            size: 1,
            generation: 0,
            health,
            processes: None,
            tuning,
            name,
            hosts,
            ways,
            shared_memory,
        }
    }

    pub(crate) fn threads(size: usize, options: &Options) -> Vec<Self> {
        let (hub, health) = Hub::new(size);
        let tuning = Arc::new(options.tuning.clone().unwrap_or_default());
        let name = crate::rendezvous::random_name();
        let rank = |rank| Self {
            rank,
            size,
            generation: 0,
            name: name.clone(),
            health: health.clone(),
            processes: None,
            tuning: tuning.clone(),
            hosts: vec![vec![]; size],
            ways: Arc::new(Ways::Threads { hub: hub.clone(), rank }),
            shared_memory: AtomicBool::new(true),
        };
        (0..size).map(rank).collect()
    }

    /// Waits for the other processes of `world`, once the store is reached.
    pub(crate) fn assemble(world: &World, options: &Options, reached: Reached) -> Result<Self> {
        let met = options.check().and_then(|()| gathering::meet(world, options, &reached));
        let Reached { store, server, .. } = reached;
        let Met { hosts, tuning, name, connections } = met.inspect_err(|error| {
            if !matches!(error, Error::Aborted { .. }) {
                tell(world.rank, &store, server.as_ref(), &gave_up(world.rank, &error.to_string()));
            }
        })?;
        let here = (0..world.size).filter(|&rank| hosts[rank] == hosts[world.rank]).collect();
        let memory = Arc::new(HostMemory::new(world.rank, here));
        Ok(Self {
            rank: world.rank,
            size: world.size,
            generation: 0,
            health: store.health().clone(),
            processes: Some(Processes { store: store.clone(), memory }),
            tuning: Arc::new(tuning),
            name,
            hosts,
            ways: Arc::new(Ways::processes(connections, options, store, server)),
            shared_memory: AtomicBool::new(true),
        })
    }

    /// Tells this job from others in the names of files.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where the ranks leave each other word.
    pub(crate) fn directory(&self) -> Option<Arc<dyn Directory>> {
        match (&*self.ways, &self.processes) {
            (Ways::Threads { hub, .. }, _) => Some(hub.clone()),
            (_, Some(processes)) => Some(processes.store.clone()),
            (_, None) => None,
        }
    }

    /// What to add to this host's clock to get the clock that all ranks share, in microseconds.
    pub(crate) fn clock_offset_us(&self) -> i64 {
        self.processes.as_ref().map_or(0, |processes| processes.store.clock_offset_us())
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

    fn processes(&self) -> Result<&Processes> {
        self.processes.as_ref().ok_or_else(|| Error::Internal("processes without a store".into()))
    }

    /// Ends this generation of the job for all its ranks.
    pub(crate) fn abort(&self, reason: &str) {
        let reason = gave_up(self.rank, reason);
        self.health.end(Some(self.rank), &reason);
        if let (Ways::Processes { server, .. }, Some(processes)) = (&*self.ways, &self.processes) {
            tell(self.rank, &processes.store, server.as_ref(), &reason);
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

    /// Ends this generation for all its ranks, since `call` has failed with `error`; the error to report, which may be an earlier one.
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

    /// Ends this generation for all its ranks; why it has ended, which may be something earlier.
    pub(crate) fn give_up(&self, reason: &str) -> Error {
        self.abort(reason);
        let own = Error::Aborted { rank: Some(self.rank), reason: reason.into() };
        self.health.check().err().unwrap_or(own)
    }

    /// A transport for the group `id`, in which this process is `context.rank`. All members call it.
    pub(crate) fn link(&self, id: u64, context: &Context, options: &Options) -> Result<Link> {
        match &*self.ways {
            Ways::Solo => link::threads(&Hub::default(), 0, context, 1),
            Ways::Threads { hub, .. } => link::threads(hub, id, context, options.lanes),
            Ways::Processes { connections, .. } => {
                let Processes { store, memory } = self.processes()?;
                let unshared = |error: &Error| self.without_shared_memory(context, error);
                let means = Means { store, connections, memory };
                link::processes(&means, id, context, options, &join_timer(options), &unshared)
            }
        }
    }
}

impl Drop for Ways {
    fn drop(&mut self) {
        // The client of a store says goodbye when it is dropped.
        match self {
            Self::Solo => {}
            Self::Threads { hub, rank } => hub.leave(*rank),
            Self::Processes { connections, patience, .. } => connections.close(*patience),
        }
    }
}
