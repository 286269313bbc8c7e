//! A rank's membership in its job: the store, the news, and how groups get their transports.

use crate::algorithm::select::Table;
use crate::member::context::Context;
use crate::transport::registered::Registered;
mod gathering;
pub(crate) mod options;

use crate::error::{Error, Result};
use crate::job::gathering::Gathering;
use crate::job::options::Options;
use crate::member::health::Health;
use crate::member::notes::Directory;
use crate::member::timer::Timer;
use crate::rendezvous::Tls;
use crate::rendezvous::store::{Reach, StoreClient};
use crate::rendezvous::{Secret, Security, StoreAt, StoreServer, World};
use crate::transport::mixed::MixedTransport;
use crate::transport::shared::Shared;
#[cfg(target_os = "linux")]
use crate::transport::shm::ShmTransport;
use crate::transport::tcp::{self, TcpTransport};
use crate::transport::thread::{Hub, ThreadTransport};
use crate::transport::{Transport, TransportKind};
use std::cell::RefCell;
use std::io::{self, Write};
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
    Processes { store: Arc<StoreClient>, server: Option<StoreServer>, security: Security },
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
pub(crate) struct ArenaMemory(pub(crate) Arc<crate::transport::shm::Arena>);

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
        let met = options.check().and_then(|()| Self::meet(world, options, &reached));
        let Reached { health, store, server, security } = reached;
        let (hosts, tuning, name) = met.inspect_err(|error| {
            if !matches!(error, Error::Aborted { .. }) {
                tell(world.rank, &store, server.as_ref(), &gave_up(world.rank, &error.to_string()));
            }
        })?;
        let ways = Ways::Processes { store, server, security };
        let shared_memory = AtomicBool::new(true);
        let (rank, size, tuning) = (world.rank, world.size, Arc::new(tuning));
        Ok(Self { rank, size, health, tuning, name, hosts, ways, shared_memory })
    }

    /// The hosts of all ranks, the tuning table and the name of the job.
    fn meet(world: &World, options: &Options, reached: &Reached) -> Result<(Vec<Vec<u8>>, Table, String)> {
        let store = &*reached.store;
        reached.health.check()?;
        store.keep_time(options.deadline);
        // What is set first tells of the job; the rank's own place comes last and says that all is there.
        if world.rank == 0 {
            let tuning = options.tuning.as_ref().map(Table::to_string).unwrap_or_default();
            store.set("tuning", tuning.as_bytes())?;
            store.set("name", crate::rendezvous::random_name().as_bytes())?;
            store.set("alike", alike(world, options).join("\n").as_bytes())?;
        }
        let about = format!("{} {}", store.local_ip(), world.host);
        store.set(&node(world.rank), about.as_bytes())?;
        let (mut hosts, mut ips) = (vec![], vec![]);
        let mut gathering = Gathering::new(store, world, options, join_timer(options));
        for rank in 0..world.size {
            let about = gathering.wait_for(rank)?;
            if rank == 0 {
                let lead = store.get("alike", 0, &gathering.timer)?;
                compare(world, options, &String::from_utf8_lossy(&lead))?;
            }
            let about = String::from_utf8_lossy(&about).into_owned();
            let (ip, host) = about.split_once(' ').unwrap_or_default();
            hosts.push(host.as_bytes().to_vec());
            ips.push(ip.parse().ok());
        }
        store.learn_hosts(&ips);
        let tuning = match store.get("tuning", 0, &gathering.timer)? {
            text if text.is_empty() => Table::default(),
            text => Table::parse(&String::from_utf8_lossy(&text))?,
        };
        let name = String::from_utf8_lossy(&store.get("name", 0, &gathering.timer)?).into_owned();
        if let (StoreAt::File(path), 0) = (&world.store, world.rank) {
            // Everyone is here; a later job must not find it.
            let _ = std::fs::remove_file(path);
        }
        Ok((hosts, tuning, name))
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

    /// Ends the job for all ranks; why it has ended, which may be something earlier.
    pub(crate) fn give_up(&self, reason: &str) -> Error {
        self.abort(reason);
        let own = Error::Aborted { rank: Some(self.rank), reason: reason.into() };
        self.health.check().err().unwrap_or(own)
    }

    /// A transport for the group `id`, in which this process is `context.rank`. All members call it.
    pub(crate) fn link(&self, id: u64, context: &Context, options: &Options) -> Result<Link> {
        let timer = &join_timer(options);
        let wanted = options.transport;
        match &self.ways {
            Ways::Solo => threads(&Hub::default(), 0, context, 1),
            Ways::Threads(hub) => threads(hub, id, context, options.lanes),
            Ways::Processes { .. } if wanted == Some(TransportKind::Thread) => {
                Err(Error::Usage("the thread transport is for ranks within one process".into()))
            }
            #[cfg(feature = "mpi")]
            Ways::Processes { store, .. } if wanted == Some(TransportKind::Mpi) => {
                let transport = crate::transport::mpi::MpiTransport::connect(store, id, context, timer)?;
                Ok(Link { transport: Box::new(transport), memory: None })
            }
            #[cfg(not(feature = "mpi"))]
            Ways::Processes { .. } if wanted == Some(TransportKind::Mpi) => Err(Error::Usage(
                "the mpi transport is not in this program: build regatta-comm with its feature `mpi`".into(),
            )),
            Ways::Processes { store, security, .. } => {
                let settings = tcp::Settings { store, id, timer, streams: options.tcp_streams, security };
                let one_host = context.hosts.len() == 1;
                if wanted == Some(TransportKind::Shm) && !one_host {
                    return Err(Error::Usage(
                        "the ranks are on several hosts, which share no memory: leave --transport out".into(),
                    ));
                }
                let shares = context.hosts.iter().any(|host| host.len() > 1);
                if wanted != Some(TransportKind::Tcp) && (one_host || shares) {
                    match shared_memory(store, id, context, options.lanes, timer)? {
                        Ok((shared, memory)) if one_host => {
                            return Ok(Link {
                                transport: Box::new(ShmTransport { shared }),
                                memory: Some(memory),
                            });
                        }
                        Ok((local, _)) => return mixed(local, context, &settings),
                        Err(error) if wanted == Some(TransportKind::Shm) => return Err(error),
                        // All ranks have agreed that one of them cannot: TCP it is.
                        Err(error) => self.without_shared_memory(context, &error),
                    }
                }
                let peers: Vec<usize> = (0..context.size).filter(|&peer| peer != context.rank).collect();
                let transport = TcpTransport::connect(context, &peers, &settings)?;
                Ok(Link { transport: Box::new(transport), memory: None })
            }
        }
    }
}

/// What a rank has of its job before the others have come.
pub(crate) struct Reached {
    pub(crate) health: Arc<Health>,
    store: Arc<StoreClient>,
    server: Option<StoreServer>,
    security: Security,
}

impl Reached {
    /// Runs the job's store where that is this rank's part, and makes this rank known there.
    pub(crate) fn new(world: &World, options: &Options) -> Result<Self> {
        options.check()?;
        world.check()?;
        // The attempts to reach the store may pause for as long as a connection takes.
        let timer = join_timer(options);
        let health = Arc::<Health>::default();
        let mut security = Security { secret: options.secret.clone(), tls: options.tls };
        if let (StoreAt::File(_), 0, None, true) =
            (&world.store, world.rank, &security.secret, security.tls != Tls::Off)
        {
            // What only this user's processes can read may carry a secret.
            security.secret = Some(Secret::random()?);
        }
        let server = if world.rank == 0 { serve(world, &security, &timer, options)? } else { None };
        let certain = !matches!(world.store, StoreAt::File(_) | StoreAt::Rank0 { beside: true, .. });
        let found = RefCell::new(security.clone());
        let addresses = || {
            let found_at = addresses(&world.store, server.as_ref(), &security);
            if let Some((_, security)) = found_at.last() {
                found.replace(security.clone());
            }
            Ok(found_at)
        };
        let reach = Reach {
            addresses: &addresses,
            job: world.job.as_bytes(),
            rank: world.rank,
            timer: &timer,
            certain,
            deadline: options.deadline,
        };
        let store = StoreClient::connect(&reach, health.clone())?;
        let security = found.into_inner();
        Ok(Self { health, store, server, security })
    }

    /// Ends the job for all ranks. Where this rank runs the store, waits up to `patience` for the others to come and
    /// hear of it.
    pub(crate) fn give_up(self, world: &World, reason: &str, patience: Duration) {
        tell(world.rank, &self.store, self.server.as_ref(), &gave_up(world.rank, reason));
        let Some(server) = &self.server else { return };
        let timer = Timer::new(patience);
        while server.heard() < world.size && !timer.is_over() {
            // The others are just being started; there is no event to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sends the end of the job to all ranks.
fn tell(rank: usize, store: &StoreClient, server: Option<&StoreServer>, reason: &str) {
    match server {
        // A message to the server of this process might come after the goodbye that its end says.
        Some(server) => server.abort(Some(rank), reason),
        None => store.abort(reason),
    }
}

fn gave_up(rank: usize, reason: &str) -> String {
    format!("rank {rank} gave up: {reason}")
}

/// How long ranks may take to find each other, where one request may take some seconds.
fn join_timer(options: &Options) -> Timer {
    Timer::with_pauses(options.join, Duration::from_secs(12))
}

/// Where the store keeps what a rank says of itself when it has joined.
pub(crate) fn node(rank: usize) -> String {
    format!("node/{rank}")
}

fn threads(hub: &Hub, id: u64, context: &Context, lanes: usize) -> Result<Link> {
    let shared = Shared::with_lanes(hub.region(id, context.size, lanes)?, context.clone(), lanes);
    Ok(Link { transport: Box::new(ThreadTransport(shared)), memory: None })
}

/// Shared memory inside this host, TCP to the ranks on others.
fn mixed(local: Shared, context: &Context, settings: &tcp::Settings<'_>) -> Result<Link> {
    let here = context.host_of(context.rank);
    let places: Vec<Option<usize>> =
        (0..context.size).map(|rank| here.iter().position(|&at| at == rank)).collect();
    let others: Vec<usize> = (0..context.size).filter(|&rank| places[rank].is_none()).collect();
    let across = TcpTransport::connect(context, &others, settings)?;
    let transport = MixedTransport { local, across, places, patience: Duration::ZERO };
    Ok(Link { transport: Box::new(transport), memory: None })
}

impl Drop for Job {
    fn drop(&mut self) {
        // The client of a store says goodbye when it is dropped.
        if let Ways::Threads(_) = self.ways {
            self.health.left(self.rank);
        }
    }
}

/// Settings that ranks can connect with only where all have the same.
const ALIKE: [&str; 3] = ["WORLD_SIZE", "REGATTA_TRANSPORT", "REGATTA_TCP_STREAMS"];

/// What they are on this rank.
fn alike(world: &World, options: &Options) -> [String; 3] {
    let transport = options.transport.map_or("left out".into(), |transport| transport.to_string());
    [world.size.to_string(), transport, options.tcp_streams.to_string()]
}

/// Compares them with those of rank 0, so that ranks that differ do not wait for each other until the deadline.
fn compare(world: &World, options: &Options, lead: &str) -> Result<()> {
    for ((variable, own), lead) in ALIKE.into_iter().zip(alike(world, options)).zip(lead.lines()) {
        if own != lead {
            let rank = world.rank;
            let problem =
                format!("is {own} on rank {rank}, and {lead} on rank 0: it must be the same on all ranks");
            return Err(Error::Env { variable: variable.into(), problem });
        }
    }
    Ok(())
}

/// Rank 0's part: runs the store, where nobody else does.
fn serve(
    world: &World,
    security: &Security,
    timer: &Timer,
    options: &Options,
) -> Result<Option<StoreServer>> {
    let start = |address: &str| StoreServer::start_for(address, world.size, security, world.job.as_bytes());
    match &world.store {
        StoreAt::Elsewhere(_) => Ok(None),
        StoreAt::Rank0 { host, port, beside: false } => {
            await_name(host, *port, timer, options)?;
            let server = start(&format!("{host}:{port}"))?;
            reachable(host, &server, world)?;
            Ok(Some(server))
        }
        StoreAt::Rank0 { host, port, .. } => {
            await_name(host, *port, timer, options)?;
            let mut last = None;
            for (address, _) in addresses(&world.store, None, security) {
                match start(&address) {
                    Ok(server) => return Ok(Some(server)),
                    Err(error) => last = Some(error),
                }
            }
            last.map_or(Ok(None), Err)
        }
        StoreAt::File(path) => {
            let server = start("127.0.0.1:0")?;
            let secret = security.secret.as_ref().map(Secret::to_text).unwrap_or_default();
            publish(path, &format!("{} {secret}", server.addr()))
                .map_err(Error::system(format!("write {}", path.display())))?;
            Ok(Some(server))
        }
    }
}

/// Waits until the host's name is known: that of a Kubernetes service appears some seconds after its pods have begun.
fn await_name(host: &str, port: u16, timer: &Timer, options: &Options) -> Result<()> {
    let mut said = false;
    loop {
        let Err(error) = (host, port).to_socket_addrs() else { return Ok(()) };
        let waited = timer.used();
        if waited >= options.join {
            return Err(Error::Env {
                variable: "MASTER_ADDR".into(),
                problem: format!(
                    "rank 0's host does not know the name {host:?} after {:.1} s ({error}); give an address, or more time \
                     by REGATTA_JOIN_S",
                    waited.as_secs_f64()
                ),
            });
        }
        if waited >= options.warn && !said {
            said = true;
            crate::say::say(format_args!(
                "warning: rank 0 waits for the name {host:?} (MASTER_ADDR) to appear: {error}"
            ));
        }
        // The system's resolver tells of no event to wait for.
        std::thread::sleep(Duration::from_millis(100));
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

/// Where the store may be, and how it is reached.
fn addresses(store: &StoreAt, own: Option<&StoreServer>, security: &Security) -> Vec<(String, Security)> {
    let with = |address: String| (address, security.clone());
    if let Some(server) = own {
        return vec![with(server.addr().to_string())];
    }
    match store {
        StoreAt::Elsewhere(address) => vec![with(address.clone())],
        StoreAt::Rank0 { host, port, beside: false } => vec![with(format!("{host}:{port}"))],
        StoreAt::Rank0 { host, port, beside: true } => {
            let last = port.saturating_add(crate::rendezvous::BESIDE);
            (port.saturating_add(1)..=last).map(|port| with(format!("{host}:{port}"))).collect()
        }
        StoreAt::File(path) => published(path)
            .and_then(|text| {
                let (address, secret) = text.split_once(' ')?;
                let secret = (!secret.is_empty()).then(|| Secret::from_text(secret));
                Some((address.to_string(), Security { secret, ..security.clone() }))
            })
            .into_iter()
            .collect(),
    }
}

/// The memory that the ranks of this host share, or why one of the ranks has none: all ranks of the group agree on that.
#[cfg(target_os = "linux")]
fn shared_memory(
    store: &StoreClient,
    id: u64,
    context: &Context,
    lanes: usize,
    timer: &Timer,
) -> Result<Result<(Shared, Arc<dyn Memory>)>> {
    use crate::transport::shm::{Arena, Name, Segment};
    let here = context.host_of(context.rank);
    let (first, size) = (here[0], here.len());
    let key = format!("shm/{id:x}/{first}");
    // Whatever fails from here on, nothing is left behind.
    let mut name = None;
    let segment = if context.rank == first {
        let nonce = crate::rendezvous::random();
        let created = Segment::create(size, lanes, nonce);
        let published = match &created {
            Ok((_, at)) => format!("{nonce} {}", at.display()),
            Err(error) => format!("! {error}"),
        };
        if let Ok((_, at)) = &created {
            name = Some(Name(at.clone()));
        }
        store.set(&key, published.as_bytes())?;
        created.map(|(segment, _)| segment)
    } else {
        let published = String::from_utf8_lossy(&store.get(&key, context.names[first], timer)?).into_owned();
        match published.split_once(' ').map(|(nonce, at)| (nonce.parse::<u64>(), at)) {
            Some((Ok(nonce), at)) => Segment::open(Path::new(at), size, lanes, nonce),
            _ => Err(Error::Rendezvous(format!("rank {}: {published}", context.names[first]))),
        }
    };
    let outcome = match &segment {
        Ok(_) => "ok".to_string(),
        Err(error) => error.to_string(),
    };
    store.set(&format!("shm/{id:x}/ok/{}", context.rank), outcome.as_bytes())?;
    for peer in 0..context.size {
        let answer = store.get(&format!("shm/{id:x}/ok/{peer}"), context.names[peer], timer)?;
        if answer != b"ok" {
            let reason = String::from_utf8_lossy(&answer).into_owned();
            let without = format!("rank {} has no shared memory: {reason}", context.names[peer]);
            return Ok(Err(Error::Rendezvous(without)));
        }
    }
    // All have mapped it.
    drop(name);
    let segment = match segment {
        Ok(segment) => Arc::new(segment),
        Err(error) => return Ok(Err(error)),
    };
    let local = context.among(here);
    let arena = Arc::new(Arena::new(segment.clone(), local.rank));
    Ok(Ok((Shared::with_lanes(segment, local, lanes), Arc::new(ArenaMemory(arena)))))
}

#[cfg(not(target_os = "linux"))]
fn shared_memory(
    _: &StoreClient,
    _: u64,
    _: &Context,
    _: usize,
    _: &Timer,
) -> Result<Result<(Shared, Arc<dyn Memory>)>> {
    Ok(Err(Error::Usage("the shm transport is for Linux; use tcp".into())))
}
