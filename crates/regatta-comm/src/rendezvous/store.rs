//! The job's directory: a small key/value store over TCP, run by the launcher or by rank 0.
//!
//! Every rank keeps two connections: one for requests, one to *watch*. The watch connection is how the death of
//! a process is noticed at once: when it closes without a goodbye, the server tells all others. Whatever fails
//! first is what every rank reports.

use super::wire;
use crate::error::{Error, Result};
use crate::health::Health;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

const MAGIC: &[u8] = b"regatta-store-1";
/// How long a stranger may take to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long one of several possible stores may take to answer.
const PROBE_TIME: Duration = Duration::from_millis(500);
/// Longest time a get waits on the server before the client asks again.
const GET_SLICE: Duration = Duration::from_secs(2);
/// How long an answer may take.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Stands for no rank.
const NOBODY: u32 = u32::MAX;

/// The server. Dropping it ends the job's directory; ranks that are still working go on without.
pub struct StoreServer {
    shared: Arc<Served>,
}

struct Served {
    address: SocketAddr,
    job: Vec<u8>,
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
    closing: AtomicBool,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Vec<u8>>,
    failure: Option<(Option<usize>, String)>,
    watchers: Vec<TcpStream>,
}

impl StoreServer {
    /// Starts a server for a job of `size` ranks on `address` (port 0: any free one).
    ///
    /// # Errors
    /// When the address is in use or not this host's.
    pub fn start(address: &str, size: usize) -> Result<Self> {
        Self::start_for(address, size, b"")
    }

    /// As [`start`](Self::start), serving only clients that name the same `job`.
    pub(crate) fn start_for(address: &str, size: usize, job: &[u8]) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::Rendezvous(format!(
                "port {address} is in use by another program: set MASTER_PORT to a free one"
            )),
            _ => Error::Rendezvous(format!(
                "cannot listen on {address} ({error}): MASTER_ADDR must be an address of rank 0's host"
            )),
        })?;
        let address = listener.local_addr().map_err(Error::system("listen"))?;
        let shared = Arc::new(Served {
            address,
            job: job.to_vec(),
            size,
            state: Mutex::default(),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
        });
        at_exit::register(at_exit::Farewell::Server(Arc::downgrade(&shared)));
        let served = shared.clone();
        std::thread::Builder::new()
            .name("regatta-store".into())
            .spawn(move || {
                for stream in listener.incoming() {
                    if served.closing.load(Ordering::Acquire) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    let served = served.clone();
                    std::thread::spawn(move || served.serve(stream));
                }
            })
            .map_err(Error::system("start a thread"))?;
        Ok(Self { shared })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.shared.address
    }

    /// The first failure of the job: the rank, where one is known, and what happened.
    pub fn first_failure(&self) -> Option<(Option<usize>, String)> {
        self.shared.lock().failure.clone()
    }

    /// Ends the job: every rank's calls return an error with this reason.
    pub fn abort(&self, rank: Option<usize>, reason: &str) {
        self.shared.fail(rank, reason);
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Served {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says goodbye to the watchers and stops accepting.
    fn close(&self) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.tell(&[b"C"]);
        let ip = if self.address.ip().is_unspecified() {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            self.address.ip()
        };
        // Wakes the acceptor, which sees the flag.
        let _ = TcpStream::connect_timeout(&SocketAddr::new(ip, self.address.port()), Duration::from_secs(1));
    }

    fn fail(&self, rank: Option<usize>, reason: &str) {
        {
            let mut state = self.lock();
            if state.failure.is_some() {
                return;
            }
            state.failure = Some((rank, reason.into()));
        }
        self.changed.notify_all();
        self.tell(&[b"X", &rank_code(rank), reason.as_bytes()]);
    }

    fn tell(&self, message: &[&[u8]]) {
        let [kind, rank, text] = [0, 1, 2].map(|i| message.get(i).copied().unwrap_or_default());
        let message = wire::pack(&[kind, rank, text]);
        for mut watcher in &self.lock().watchers {
            // A watcher that is gone is noticed by its own thread.
            let _ = wire::write(&mut watcher, &message);
        }
    }

    /// One connection, to its end.
    fn serve(&self, mut stream: TcpStream) {
        // A stranger's connection ends here, without a word and without harm.
        let _ = self.converse(&mut stream);
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn converse(&self, stream: &mut TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HELLO_TIME))?;
        let hello = wire::read(stream)?;
        let Some([magic, job, role, rank, who]) = wire::unpack::<5>(&hello) else { return Ok(()) };
        let rank = parse_rank(rank);
        let known = magic == MAGIC && job == self.job && rank.is_some_and(|rank| rank < self.size);
        let answer: &[u8] = if known { b"ok" } else { b"no" };
        wire::write(stream, answer)?;
        let Some(rank) = rank.filter(|_| known) else { return Ok(()) };
        stream.set_read_timeout(None)?;
        match role {
            b"watch" => self.watch(stream, rank, &String::from_utf8_lossy(who)),
            _ => self.requests(stream),
        }
    }

    /// Holds a rank's watch connection until it says goodbye or dies.
    fn watch(&self, stream: &mut TcpStream, rank: usize, who: &str) -> io::Result<()> {
        {
            let mut state = self.lock();
            if let Some((rank, reason)) = &state.failure {
                wire::write(stream, &wire::pack(&[b"X", &rank_code(*rank), reason.as_bytes()]))?;
            }
            state.watchers.push(stream.try_clone()?);
        }
        loop {
            let message = wire::read(stream);
            match message.as_deref().ok().and_then(wire::unpack::<2>) {
                Some([b"X", reason]) => self.fail(Some(rank), &String::from_utf8_lossy(reason)),
                Some(_) => {
                    self.tell(&[b"L", &rank_code(Some(rank))]);
                    return Ok(());
                }
                None if self.closing.load(Ordering::Acquire) => return Ok(()),
                None => {
                    let reason =
                        format!("rank {rank} ({who}) died: its connections closed without a goodbye");
                    self.fail(Some(rank), &reason);
                    return Ok(());
                }
            }
        }
    }

    fn requests(&self, stream: &mut TcpStream) -> io::Result<()> {
        loop {
            let request = wire::read(stream)?;
            let Some([kind, key, value]) = wire::unpack::<3>(&request) else { return Ok(()) };
            let key = String::from_utf8_lossy(key).into_owned();
            let answer = match kind {
                b"S" => {
                    self.lock().entries.insert(key, value.to_vec());
                    self.changed.notify_all();
                    wire::pack(&[b"k", b""])
                }
                b"G" => {
                    let Ok(patience) = value.try_into().map(u32::from_le_bytes) else { return Ok(()) };
                    let patience = Duration::from_millis(patience.into()).min(GET_SLICE);
                    let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| {
                        state.failure.is_none() && !state.entries.contains_key(&key)
                    });
                    let state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    match (&state.failure, state.entries.get(&key)) {
                        (_, Some(value)) => wire::pack(&[b"v", value]),
                        (Some(_), None) => wire::pack(&[b"x", b""]),
                        (None, None) => wire::pack(&[b"t", b""]),
                    }
                }
                _ => return Ok(()),
            };
            wire::write(stream, &answer)?;
        }
    }
}

fn rank_code(rank: Option<usize>) -> [u8; 4] {
    rank.map_or(NOBODY, |rank| rank as u32).to_le_bytes()
}

fn parse_rank(bytes: &[u8]) -> Option<usize> {
    let code = u32::from_le_bytes(bytes.try_into().ok()?);
    (code != NOBODY).then_some(code as usize)
}

/// A rank's connections to the store.
pub(crate) struct StoreClient {
    requests: Mutex<TcpStream>,
    /// Carries the server's news to us, and our end, in either form, to the server.
    watch: Mutex<TcpStream>,
    health: Arc<Health>,
    local_ip: IpAddr,
    gone: AtomicBool,
}

impl StoreClient {
    /// Connects rank `rank` to the store at one of `addresses`, trying until `until`. Unless the address is
    /// `certain`, others may be there.
    pub(crate) fn connect(
        addresses: &dyn Fn() -> Vec<String>,
        job: &[u8],
        rank: usize,
        health: Arc<Health>,
        (until, certain): (Instant, bool),
    ) -> Result<Arc<Self>> {
        // What may be a stranger's address need not ever answer.
        let left = until.saturating_duration_since(Instant::now()).max(PROBE_TIME);
        let patience = if certain { HELLO_TIME.min(left) } else { PROBE_TIME };
        let who = format!("host {}, process {}", super::hostname(), std::process::id());
        let open = |address: &str, role: &str| -> io::Result<TcpStream> {
            let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
            for address in std::net::ToSocketAddrs::to_socket_addrs(address)? {
                match greet(&address, patience, job, role, rank, &who) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        let mut reason = "no address".to_string();
        loop {
            for address in addresses() {
                match open(&address, "request").and_then(|requests| Ok((requests, open(&address, "watch")?)))
                {
                    Ok((requests, watch)) => return Self::start(requests, watch, health),
                    Err(error) => reason = format!("{address}: {error}"),
                }
            }
            if Instant::now() >= until {
                return Err(Error::Rendezvous(format!(
                    "rank {rank} cannot reach the job's store ({reason}): is rank 0 running, and are MASTER_ADDR and \
                     MASTER_PORT right?"
                )));
            }
            // The store may not have been started yet; there is no event to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(requests: TcpStream, watch: TcpStream, health: Arc<Health>) -> Result<Arc<Self>> {
        let local_ip = requests.local_addr().map_err(Error::system("connect to the store"))?.ip();
        requests.set_read_timeout(Some(ANSWER_TIME)).map_err(Error::system("connect to the store"))?;
        let mut news = watch.try_clone().map_err(Error::system("connect to the store"))?;
        let gone = AtomicBool::new(false);
        let client = Arc::new(Self {
            requests: Mutex::new(requests),
            watch: Mutex::new(watch),
            health,
            local_ip,
            gone,
        });
        at_exit::register(at_exit::Farewell::Client(Arc::downgrade(&client)));
        let (health, weak) = (client.health.clone(), Arc::downgrade(&client));
        std::thread::Builder::new()
            .name("regatta-watch".into())
            .spawn(move || watch_news(&mut news, &health, &weak))
            .map_err(Error::system("start a thread"))?;
        Ok(client)
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The address of this host from which the store is reached.
    pub(crate) fn local_ip(&self) -> IpAddr {
        self.local_ip
    }

    fn ask(&self, request: [&[u8]; 3]) -> Result<(u8, Vec<u8>)> {
        let mut stream = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = wire::write(&mut *stream, &wire::pack(&request)).and_then(|()| wire::read(&mut *stream));
        drop(stream);
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let own =
                    Error::Rendezvous(format!("the job's store does not answer ({error}): rank 0 has ended"));
                return Err(self.health.verdict(own));
            }
        };
        match wire::unpack::<2>(&answer) {
            Some([[kind], value]) => Ok((*kind, value.to_vec())),
            _ => Err(Error::Rendezvous("the job's store gave an answer that is none".into())),
        }
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask([b"S", key.as_bytes(), value]).map(|_| ())
    }

    /// The value of `key`, waiting for it until `until`.
    pub(crate) fn get(&self, key: &str, until: Instant) -> Result<Vec<u8>> {
        self.try_get(key, until)?
            .ok_or_else(|| Error::Rendezvous(format!("no rank has published {key} in time")))
    }

    /// As [`get`](Self::get), but nothing where it does not come in time.
    pub(crate) fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            let left = until.saturating_duration_since(Instant::now()).min(GET_SLICE).as_millis() as u32;
            match self.ask([b"G", key.as_bytes(), &left.to_le_bytes()])? {
                (b'v', value) => return Ok(Some(value)),
                (b'x', _) => {
                    let own = Error::Rendezvous("the job has ended".into());
                    return Err(self.health.verdict(own));
                }
                _ if Instant::now() >= until => return Ok(None),
                _ => {}
            }
        }
    }

    /// Tells all ranks that this one gives up. Goes beside the requests, one of which may be waiting.
    pub(crate) fn abort(&self, reason: &str) {
        // Without a store there is nobody to tell.
        let _ = self.say(&[b"X", reason.as_bytes()]);
    }

    fn say(&self, message: &[&[u8]; 2]) -> io::Result<()> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut *watch, &wire::pack(message))
    }

    /// Says goodbye, once: from here on this rank is not missed.
    fn leave(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            let _ = self.say(&[b"L", b""]);
            let _ = self.watch.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
        }
    }
}

impl Drop for StoreClient {
    fn drop(&mut self) {
        self.leave();
    }
}

fn greet(
    address: &SocketAddr,
    patience: Duration,
    job: &[u8],
    role: &str,
    rank: usize,
    who: &str,
) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(address, patience)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    let hello = wire::pack(&[MAGIC, job, role.as_bytes(), &rank_code(Some(rank)), who.as_bytes()]);
    wire::write(&mut stream, &hello)?;
    match wire::read(&mut stream)?.as_slice() {
        b"ok" => {
            stream.set_read_timeout(None)?;
            Ok(stream)
        }
        _ => Err(io::Error::new(ErrorKind::ConnectionRefused, "the store there is of another job")),
    }
}

/// Passes the server's news on, until the connection closes.
fn watch_news(stream: &mut TcpStream, health: &Health, client: &Weak<StoreClient>) {
    loop {
        let message = wire::read(stream);
        let fields = message.as_deref().ok().and_then(wire::unpack::<3>);
        match fields {
            Some([b"X", rank, reason]) => health.end(parse_rank(rank), &String::from_utf8_lossy(reason)),
            Some([b"L", rank, _]) => {
                if let Some(rank) = parse_rank(rank) {
                    health.left(rank);
                }
            }
            Some([b"C", ..]) => return,
            _ => {
                // Closed: by ourselves, or because the server's process is gone.
                if client.upgrade().is_some_and(|client| !client.gone.load(Ordering::Acquire)) {
                    health.end(None, "the job's store is gone: the launcher, or the process of rank 0, died");
                }
                return;
            }
        }
    }
}

/// Goodbyes when the process ends normally with its groups in statics, which Rust never drops.
mod at_exit {
    use super::{Mutex, Once, PoisonError, Served, StoreClient, Weak};

    pub(super) enum Farewell {
        Client(Weak<StoreClient>),
        Server(Weak<Served>),
    }

    static FAREWELLS: Mutex<Vec<Farewell>> = Mutex::new(Vec::new());
    static ONCE: Once = Once::new();

    unsafe extern "C" {
        fn atexit(callback: extern "C" fn()) -> std::ffi::c_int;
    }

    extern "C" fn say() {
        let farewells = std::mem::take(&mut *FAREWELLS.lock().unwrap_or_else(PoisonError::into_inner));
        let (clients, servers): (Vec<_>, Vec<_>) =
            farewells.into_iter().partition(|farewell| matches!(farewell, Farewell::Client(_)));
        for farewell in clients.into_iter().chain(servers) {
            match farewell {
                Farewell::Client(client) => {
                    if let Some(client) = client.upgrade() {
                        client.leave();
                    }
                }
                Farewell::Server(server) => {
                    if let Some(server) = server.upgrade() {
                        server.close();
                    }
                }
            }
        }
    }

    pub(super) fn register(farewell: Farewell) {
        // SAFETY: `atexit` is in every C library; the callback does not unwind: it has no panic to raise.
        ONCE.call_once(|| unsafe {
            atexit(say);
        });
        let mut farewells = FAREWELLS.lock().unwrap_or_else(PoisonError::into_inner);
        farewells.retain(|farewell| match farewell {
            Farewell::Client(client) => client.strong_count() > 0,
            Farewell::Server(server) => server.strong_count() > 0,
        });
        farewells.push(farewell);
    }
}
