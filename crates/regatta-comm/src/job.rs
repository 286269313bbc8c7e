//! A rank's membership in its job: the store, the news, and how groups get their transports.

use crate::algorithm::Context;
use crate::algorithm::direct::Registered;
use crate::error::{Error, Result};
use crate::health::Health;
use crate::options::Options;
use crate::rendezvous::store::StoreClient;
use crate::rendezvous::{StoreAt, StoreServer, World};
use crate::transport::shared::Shared;
use crate::transport::tcp::TcpTransport;
use crate::transport::thread::{Hub, ThreadTransport};
use crate::transport::{Transport, TransportKind};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a rank that has waited in vain asks whether its peer has, too.
const BLAME: Duration = Duration::from_millis(200);

/// Dropped when the last group of the rank is: the rank leaves the job.
pub(crate) struct Job {
    rank: usize,
    pub(crate) health: Arc<Health>,
    ways: Ways,
}

enum Ways {
    /// Alone: nobody to talk to.
    Solo,
    /// The other ranks are threads of this process.
    Threads(Arc<Hub>),
    /// The other ranks are processes. The client goes before the server.
    Processes { store: Arc<StoreClient>, _server: Option<StoreServer>, hosts: Vec<Vec<u8>> },
}

/// What a group communicates with.
pub(crate) struct Link {
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) memory: Option<Arc<dyn Memory>>,
}

/// Registered memory that buffers come from.
pub(crate) trait Memory: Registered + Send + Sync {
    #[cfg(target_os = "linux")]
    fn allocate(&self, bytes: usize) -> Option<crate::transport::shm::Piece>;
}

#[cfg(target_os = "linux")]
struct ArenaMemory(Arc<crate::transport::shm::Arena>);

#[cfg(target_os = "linux")]
impl Registered for ArenaMemory {
    fn place(&self, data: &[u8]) -> Option<u64> {
        self.0.place(data)
    }

    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8> {
        self.0.at(rank, place, len)
    }
}

#[cfg(target_os = "linux")]
impl Memory for ArenaMemory {
    fn allocate(&self, bytes: usize) -> Option<crate::transport::shm::Piece> {
        self.0.allocate(bytes)
    }
}

impl Job {
    pub(crate) fn solo() -> Self {
        Self { rank: 0, health: Arc::default(), ways: Ways::Solo }
    }

    pub(crate) fn threads(size: usize) -> Vec<Self> {
        let (hub, health) = (Arc::new(Hub::default()), Arc::<Health>::default());
        (0..size)
            .map(|rank| Self { rank, health: health.clone(), ways: Ways::Threads(hub.clone()) })
            .collect()
    }

    /// Finds the other processes of `world`.
    pub(crate) fn connect(world: &World, options: &Options) -> Result<Self> {
        let until = Instant::now() + options.join;
        let health = Arc::<Health>::default();
        let job = world.job.as_bytes();
        let server = if world.rank == 0 { serve(world)? } else { None };
        let certain = !matches!(world.store, StoreAt::File(_) | StoreAt::Rank0 { beside: true, .. });
        let addresses = || addresses(&world.store, server.as_ref());
        let store = StoreClient::connect(&addresses, job, world.rank, health.clone(), (until, certain))?;
        store.set(&format!("node/{}", world.rank), host_identity().as_bytes())?;
        let mut hosts = vec![];
        for rank in 0..world.size {
            match store.try_get(&format!("node/{rank}"), until)? {
                Some(host) => hosts.push(host),
                None => return Err(missing(&store, world, options)),
            }
        }
        if let (StoreAt::File(path), 0) = (&world.store, world.rank) {
            // Everyone is here; a later job must not find it.
            let _ = std::fs::remove_file(path);
        }
        Ok(Self { rank: world.rank, health, ways: Ways::Processes { store, _server: server, hosts } })
    }

    /// Ends the job for all ranks.
    pub(crate) fn abort(&self, reason: &str) {
        let reason = format!("rank {} gave up: {reason}", self.rank);
        self.health.end(Some(self.rank), &reason);
        if let Ways::Processes { store, .. } = &self.ways {
            store.abort(&reason);
        }
    }

    /// Who keeps a rank waiting that has waited for `peer` in vain: `peer` may itself be waiting for another.
    pub(crate) fn blame(&self, peer: usize) -> usize {
        let Ways::Processes { store, .. } = &self.ways else { return peer };
        // Without a store there is nobody to ask.
        let _ = store.set(&format!("stuck/{}", self.rank), peer.to_string().as_bytes());
        let mut seen = vec![self.rank];
        let mut culprit = peer;
        while !seen.contains(&culprit) {
            seen.push(culprit);
            // A rank that runs into its own deadline says so at about the same time.
            let answer = store.try_get(&format!("stuck/{culprit}"), Instant::now() + BLAME);
            let next = answer.ok().flatten().and_then(|rank| String::from_utf8(rank).ok()?.parse().ok());
            match next {
                Some(next) => culprit = next,
                None => return culprit,
            }
        }
        peer
    }

    /// A transport for the group `id`, in which this process is `context.rank`. All members call it.
    pub(crate) fn link(&self, id: u64, context: &Context, options: &Options) -> Result<Link> {
        let until = Instant::now() + options.join;
        let names = context.names.clone();
        match &self.ways {
            Ways::Solo => {
                let region = Hub::default().region(0, 1);
                let shared = Shared::new(region, 0, names, self.health.clone(), options.deadline);
                Ok(Link { transport: Box::new(ThreadTransport(shared)), memory: None })
            }
            Ways::Threads(hub) => {
                let region = hub.region(id, context.size);
                let shared = Shared::new(region, context.rank, names, self.health.clone(), options.deadline);
                Ok(Link { transport: Box::new(ThreadTransport(shared)), memory: None })
            }
            Ways::Processes { store, hosts, .. } => {
                let one_host = names.iter().all(|&rank| hosts[rank] == hosts[names[0]]);
                let wanted = options.transport;
                if wanted == Some(TransportKind::Thread) {
                    return Err(Error::Usage("the thread transport is for ranks within one process".into()));
                }
                if wanted != Some(TransportKind::Tcp) {
                    if !one_host && wanted.is_some() {
                        return Err(Error::Usage(
                            "the ranks are on several hosts, which share no memory: leave --transport out"
                                .into(),
                        ));
                    }
                    if one_host {
                        match shared_memory(store, id, context, options, until) {
                            Ok(link) => return Ok(link),
                            Err(error) if wanted.is_some() => return Err(error),
                            // All ranks have agreed that one of them cannot: TCP it is, unless the job has ended.
                            Err(_) => self.health.check()?,
                        }
                    }
                }
                let transport = TcpTransport::connect(store, id, context.rank, names, until)?;
                Ok(Link { transport: Box::new(transport), memory: None })
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The client of a store says goodbye when it is dropped.
        if let Ways::Threads(_) = self.ways {
            self.health.left(self.rank);
        }
    }
}

/// Rank 0's part: runs the store, where nobody else does.
fn serve(world: &World) -> Result<Option<StoreServer>> {
    let start = |address: String| StoreServer::start_for(&address, world.size, world.job.as_bytes());
    match &world.store {
        StoreAt::Elsewhere(_) => Ok(None),
        StoreAt::Rank0 { host, port, beside: false } => {
            let server = start(format!("{host}:{port}"))?;
            reachable(host, &server, world)?;
            Ok(Some(server))
        }
        StoreAt::Rank0 { .. } => {
            let mut last = None;
            for address in addresses(&world.store, None) {
                match start(address) {
                    Ok(server) => return Ok(Some(server)),
                    Err(error) => last = Some(error),
                }
            }
            last.map_or(Ok(None), Err)
        }
        StoreAt::File(path) => {
            let server = start("127.0.0.1:0".into())?;
            publish(path, &server.addr().to_string())
                .map_err(Error::system(format!("write {}", path.display())))?;
            Ok(Some(server))
        }
    }
}

/// Debian and others resolve a host's own name to 127.0.1.1, where no other host reaches it.
fn reachable(host: &str, server: &StoreServer, world: &World) -> Result<()> {
    let named = host != "localhost" && host.parse::<std::net::IpAddr>().is_err();
    let ip = server.addr().ip();
    if world.local_size == world.size || !named || !ip.is_loopback() {
        return Ok(());
    }
    Err(Error::Env {
        variable: "MASTER_ADDR".into(),
        problem: format!(
            "{host:?} is {ip} on rank 0's host, which other hosts cannot reach; give its address"
        ),
    })
}

/// Writes `text` to `path` so that readers see all of it or nothing, and only this user's processes can.
fn publish(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension(std::process::id().to_string());
    // A name left by a process that died; with `create_new`, nobody can have put a link there.
    let _ = std::fs::remove_file(&temporary);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&temporary)?.write_all(text.as_bytes())?;
    std::fs::rename(&temporary, path)
}

/// What this user's processes have published at `path`.
fn published(path: &Path) -> Option<String> {
    #[cfg(unix)]
    if std::os::unix::fs::MetadataExt::uid(&std::fs::symlink_metadata(path).ok()?)
        != rustix::process::getuid().as_raw()
    {
        return None;
    }
    std::fs::read_to_string(path).ok()
}

/// Where the store may be.
fn addresses(store: &StoreAt, own: Option<&StoreServer>) -> Vec<String> {
    if let Some(server) = own {
        return vec![server.addr().to_string()];
    }
    match store {
        StoreAt::Elsewhere(address) => vec![address.clone()],
        StoreAt::Rank0 { host, port, beside: false } => vec![format!("{host}:{port}")],
        StoreAt::Rank0 { host, port, beside: true } => {
            let last = port.saturating_add(crate::rendezvous::BESIDE);
            (port.saturating_add(1)..=last).map(|port| format!("{host}:{port}")).collect()
        }
        StoreAt::File(path) => published(path).into_iter().collect(),
    }
}

/// Which ranks have not come.
fn missing(store: &StoreClient, world: &World, options: &Options) -> Error {
    let now = Instant::now();
    let absent: Vec<String> = (0..world.size)
        .filter(|rank| !matches!(store.try_get(&format!("node/{rank}"), now), Ok(Some(_))))
        .map(|rank| rank.to_string())
        .collect();
    Error::Rendezvous(format!(
        "rank {} of {} did not join within {:.0} s: are they all started? (the time can be set by REGATTA_JOIN_S)",
        absent.join(", "),
        world.size,
        options.join.as_secs_f64()
    ))
}

/// The same for two processes exactly when they run under the same kernel.
fn host_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    format!("{} {}", crate::rendezvous::hostname(), boot.trim())
}

#[cfg(target_os = "linux")]
fn shared_memory(
    store: &StoreClient,
    id: u64,
    context: &Context,
    options: &Options,
    until: Instant,
) -> Result<Link> {
    use crate::transport::shm::{Arena, Segment, ShmTransport, unlink};
    let (rank, size) = (context.rank, context.size);
    let key = format!("shm/{id:x}");
    let mut path = None;
    let segment = if rank == 0 {
        let nonce = crate::rendezvous::random();
        let created = Segment::create(size, nonce);
        let published = match &created {
            Ok((_, at)) => format!("{nonce} {}", at.display()),
            Err(error) => format!("! {error}"),
        };
        if let Ok((_, at)) = &created {
            path = Some(at.clone());
        }
        store.set(&key, published.as_bytes())?;
        created.map(|(segment, _)| segment)
    } else {
        let published = String::from_utf8_lossy(&store.get(&key, until)?).into_owned();
        match published.split_once(' ').map(|(nonce, at)| (nonce.parse::<u64>(), at)) {
            Some((Ok(nonce), at)) => Segment::open(Path::new(at), size, nonce),
            _ => Err(Error::Rendezvous(format!("rank {}: {published}", context.names[0]))),
        }
    };
    let outcome = match &segment {
        Ok(_) => "ok".to_string(),
        Err(error) => error.to_string(),
    };
    let agreed = store.set(&format!("{key}/{rank}"), outcome.as_bytes()).and_then(|()| {
        for peer in 0..size {
            let answer = store.get(&format!("{key}/{peer}"), until)?;
            if answer != b"ok" {
                let reason = String::from_utf8_lossy(&answer).into_owned();
                return Err(Error::Rendezvous(format!(
                    "rank {} has no shared memory: {reason}",
                    context.names[peer]
                )));
            }
        }
        Ok(())
    });
    // All have mapped it, or nobody will: from here on nothing can be left behind.
    if let Some(path) = path {
        unlink(&path);
    }
    agreed?;
    let segment = Arc::new(segment?);
    let arena = Arc::new(Arena::new(segment.clone(), rank));
    let shared = Shared::new(segment, rank, context.names.clone(), context.health.clone(), options.deadline);
    Ok(Link { transport: Box::new(ShmTransport { shared }), memory: Some(Arc::new(ArenaMemory(arena))) })
}

#[cfg(not(target_os = "linux"))]
fn shared_memory(_: &StoreClient, _: u64, _: &Context, _: &Options, _: Instant) -> Result<Link> {
    Err(Error::Usage("the shm transport is for Linux; use tcp".into()))
}
