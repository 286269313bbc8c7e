//! The job's directory: a small key/value store over TCP, run by the launcher or by rank 0.
//!
//! Every rank keeps two connections: one for requests, one to *watch*. The watch connection is how the death of
//! a process is noticed at once: when it closes without a goodbye, the server tells all others. Whatever fails
//! first is what every rank reports.
//!
//! A rank is present from the moment at which it has said that it knows: the server answers its greeting, and the rank
//! confirms. A rank that gave up in between leaves nothing behind and may try again.

use super::knocks::Knocks;
use super::reasons::{Reasons, Unreached};
use super::{Security, wire};
use crate::error::{Error, Result};
use crate::member::health::Health;
use crate::member::notes::Directory;
use crate::member::timer::Timer;
use crate::open_files;
use crate::tls::{Identity, Stream};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

pub(crate) const MAGIC: &[u8] = b"regatta-store-3";
/// How long a stranger may take to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long one of several possible stores may take to answer.
const PROBE_TIME: Duration = Duration::from_millis(500);
/// Longest time a get waits on the server before the client asks again.
const GET_SLICE: Duration = Duration::from_secs(2);
/// How long an answer may take, beside what it waits on the server.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How long a rank's host may be silent until it counts as gone, at most.
const SILENCE: Duration = Duration::from_secs(10);
/// Connections that have not said yet who they are, beside two for each rank; more throw the oldest out.
const STRANGERS: usize = 64;
/// Most bytes of all entries, with what it takes to keep them: some two million operations that are announced to a
/// joined rank, which are most of what a job ever leaves here.
const MOST: usize = 256 << 20;
/// Bytes that an entry takes beside its key and its value.
pub(crate) const ENTRY: usize = 64;
/// Longest reason of a failure that is passed on, in bytes.
const REASON: usize = 64 << 10;
/// The ranks that are present are under these keys, with the process that each is.
pub(crate) const PRESENT: &str = "present/";
/// What the server has to say to those who wait in vain.
pub(crate) const TROUBLE: &str = "trouble";
/// What a rank says once it knows that it is admitted.
const CONFIRMED: &[u8] = b"here";
/// How long the acceptor rests where the system lets it accept nothing.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
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
    /// Most bytes of all entries.
    most: usize,
    identity: Option<Identity>,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while news is told, beside the state: a watcher that takes none must not hold requests up.
    watchers: Mutex<Vec<Arc<Stream>>>,
    closing: AtomicBool,
    strangers: Mutex<Strangers>,
    knocks: Knocks,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Vec<u8>>,
    /// Bytes of all entries.
    bytes: usize,
    failure: Option<(Option<usize>, String)>,
    /// Ranks that hold a watch connection, or have held one, with the process that each is.
    seats: BTreeMap<usize, String>,
    /// How many of them are told what happens, or have been.
    heard: usize,
    /// Ranks that have said goodbye. Who comes later hears of them, too.
    left: Vec<usize>,
}

impl State {
    /// Sets an entry, where that leaves no more than `most` bytes of entries.
    fn set(&mut self, key: String, value: Vec<u8>, most: usize) -> bool {
        let before = self.entries.get(&key).map_or(0, |value| ENTRY + key.len() + value.len());
        let bytes = self.bytes - before + ENTRY + key.len() + value.len();
        if bytes > most {
            return false;
        }
        self.bytes = bytes;
        self.entries.insert(key, value);
        true
    }

    fn remove(&mut self, key: &str) {
        if let Some(value) = self.entries.remove(key) {
            self.bytes -= ENTRY + key.len() + value.len();
        }
    }
}

/// Connections that have not said yet who they are.
#[derive(Default)]
struct Strangers {
    next: u64,
    waiting: VecDeque<(u64, TcpStream)>,
}

impl Strangers {
    /// Takes note of a connection; when there are more than `most`, the oldest is ended.
    fn admit(&mut self, stream: &TcpStream, most: usize) -> io::Result<u64> {
        self.next += 1;
        self.waiting.push_back((self.next, stream.try_clone()?));
        if self.waiting.len() > most
            && let Some((_, oldest)) = self.waiting.pop_front()
        {
            // It may have ended by itself.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Ok(self.next)
    }

    fn known(&mut self, number: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != number);
    }
}

impl StoreServer {
    /// Starts a server for a job of `size` ranks on `address` (port 0: any free one).
    ///
    /// # Errors
    /// When the address is in use or not this host's, or others could reach it without the job's secret.
    pub fn start(address: &str, size: usize, security: &Security) -> Result<Self> {
        Self::start_for(address, size, security, b"")
    }

    /// As [`start`](Self::start), serving only clients that name the same `job`.
    pub(crate) fn start_for(address: &str, size: usize, security: &Security, job: &[u8]) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::Rendezvous(format!(
                "port {address} is in use by another program: set MASTER_PORT to a free one"
            )),
            _ => Error::Rendezvous(format!(
                "cannot listen on {address} ({error}): MASTER_ADDR must be an address of rank 0's host"
            )),
        })?;
        let address = listener.local_addr().map_err(Error::system("listen"))?;
        let identity = security.for_store(address.ip())?;
        // Every rank keeps two connections here, and needs more while it joins.
        open_files::prepare(2 * size, 2 * size)?;
        let shared = Arc::new(Served::new(address, size, identity, job));
        at_exit::register(at_exit::Farewell::Server(Arc::downgrade(&shared)));
        let served = shared.clone();
        std::thread::Builder::new()
            .name("regatta-store".into())
            .spawn(move || {
                for stream in listener.incoming() {
                    if served.closing.load(Ordering::Acquire) {
                        return;
                    }
                    let stream = match stream {
                        Ok(stream) => stream,
                        Err(error) => {
                            served.cannot_accept(&error);
                            continue;
                        }
                    };
                    let most = STRANGERS + 2 * served.size;
                    let number = served.strangers().admit(&stream, most);
                    let served = served.clone();
                    // A connection that no thread can be had for is dropped; its owner tries again.
                    let _ = std::thread::Builder::new().spawn(move || served.serve(stream, number.ok()));
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

    /// Ranks that have come so far, and so have been told of the first failure, where there is one.
    pub(crate) fn heard(&self) -> usize {
        self.shared.lock().heard
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
    fn new(address: SocketAddr, size: usize, identity: Option<Identity>, job: &[u8]) -> Self {
        Self {
            address,
            job: job.to_vec(),
            size,
            most: MOST,
            identity,
            state: Mutex::default(),
            changed: Condvar::new(),
            watchers: Mutex::default(),
            closing: AtomicBool::new(false),
            strangers: Mutex::default(),
            knocks: Knocks::default(),
        }
    }

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
        // Every rank has to hear of it: the news has to fit into a frame.
        let reason = &reason[..reason.floor_char_boundary(REASON)];
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
        self.watchers().retain(|watcher| {
            let told = wire::write(&mut &**watcher, &message);
            if told.is_err() {
                // It is gone, or took a part of the message only. Its own thread notices the end, and first reads what
                // the rank has said: that may be its goodbye.
                watcher.stop_sending();
            }
            told.is_ok()
        });
    }

    fn watchers(&self) -> MutexGuard<'_, Vec<Arc<Stream>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One connection, to its end.
    fn serve(&self, stream: TcpStream, number: Option<u64>) {
        // A stranger's connection ends here, without a word and without harm.
        let admitted = self.admit(stream);
        if let Some(number) = number {
            self.strangers().known(number);
        }
        let Ok(Some((stream, guest))) = admitted else { return };
        let _ = match guest.role {
            Role::Watch => self.watch(&stream, guest.rank, &guest.who),
            Role::Requests => self.requests(&stream),
        };
        stream.shutdown();
    }

    /// No connection can be accepted at the moment: says why, to those who wait and to whoever runs the server.
    fn cannot_accept(&self, error: &io::Error) {
        let trouble = crate::error::explain(&format!("the job's store cannot accept connections: {error}"));
        if self.lock().set(TROUBLE.into(), trouble.clone().into_bytes(), self.most) {
            crate::say::say(format_args!("warning: {trouble}"));
        }
        // Connections may end meanwhile; there is no event to wait for.
        std::thread::sleep(ACCEPT_PAUSE);
    }

    /// Finds out who is there.
    fn admit(&self, stream: TcpStream) -> io::Result<Option<(Arc<Stream>, Guest)>> {
        stream.set_nodelay(true)?;
        let from = stream.peer_addr()?.ip();
        let knocked = |error: io::Error| {
            self.knocks.heard(from, self.identity.is_some(), &error, |text| {
                self.lock().set(TROUBLE.into(), text.into(), self.most);
            });
            error
        };
        let stream = Arc::new(match &self.identity {
            Some(identity) => {
                Stream::accept(stream, identity, Instant::now() + HELLO_TIME).map_err(knocked)?
            }
            None => Stream::plain(stream),
        });
        stream.set_read_timeout(Some(HELLO_TIME));
        let hello = match wire::read(&mut &*stream) {
            Err(error) if self.identity.is_none() => return Err(knocked(error)),
            hello => hello?,
        };
        let guest = match self.greet(&hello) {
            Ok(guest) => guest,
            Err(refusal) => {
                wire::write(&mut &*stream, refusal.as_bytes())?;
                return Ok(None);
            }
        };
        // As long as the rank likes: it may be stopped, and holds nothing up.
        stream.set_read_timeout(None);
        let confirmed = wire::write(&mut &*stream, b"ok").and_then(|()| match guest.role {
            Role::Requests => Ok(()),
            Role::Watch => match wire::read(&mut &*stream)? == CONFIRMED {
                true => Ok(()),
                false => Err(ErrorKind::InvalidData.into()),
            },
        });
        if guest.role == Role::Watch {
            let mut state = self.lock();
            if confirmed.is_err() {
                state.seats.remove(&guest.rank);
            } else {
                state.set(format!("{PRESENT}{}", guest.rank), guest.who.clone().into_bytes(), self.most);
            }
            drop(state);
            self.changed.notify_all();
        }
        confirmed.map(|()| Some((stream, guest)))
    }

    /// What a hello says, where it is one of this job's, or why it is refused.
    fn greet(&self, hello: &[u8]) -> Result<Guest, String> {
        let stranger = || "the store there is of another job".to_string();
        let [magic, job, role, rank, who] = wire::unpack::<5>(hello).ok_or_else(stranger)?;
        if magic != MAGIC || job != self.job {
            return Err(stranger());
        }
        let rank = parse_rank(rank).ok_or_else(stranger)?;
        if rank >= self.size {
            return Err(format!(
                "the job there has {} ranks: WORLD_SIZE must be the same for all its ranks",
                self.size
            ));
        }
        let who = String::from_utf8_lossy(who).into_owned();
        let role = if role == b"watch" { Role::Watch } else { Role::Requests };
        if role == Role::Watch {
            // Two processes that take themselves for the same rank: the later one is turned away.
            let mut state = self.lock();
            if let Some(holder) = state.seats.get(&rank) {
                return Err(format!("another process is rank {rank} of the job there ({holder})"));
            }
            state.seats.insert(rank, who.clone());
        }
        Ok(Guest { role, rank, who })
    }

    /// Holds a rank's watch connection until it says goodbye or dies.
    fn watch(&self, stream: &Arc<Stream>, rank: usize, who: &str) -> io::Result<()> {
        super::keepalive(&**stream, SILENCE);
        {
            let mut watchers = self.watchers();
            let (failure, left) = {
                let state = self.lock();
                (state.failure.clone(), state.left.clone())
            };
            for other in left {
                wire::write(&mut &**stream, &wire::pack(&[b"L", &rank_code(Some(other)), b""]))?;
            }
            if let Some((rank, reason)) = failure {
                wire::write(&mut &**stream, &wire::pack(&[b"X", &rank_code(rank), reason.as_bytes()]))?;
            }
            watchers.push(stream.clone());
        }
        self.lock().heard += 1;
        loop {
            let message = wire::read(&mut &**stream);
            match message.as_deref().ok().and_then(wire::unpack::<2>) {
                Some([b"X", reason]) => self.fail(Some(rank), &String::from_utf8_lossy(reason)),
                Some(_) => {
                    {
                        let mut state = self.lock();
                        state.remove(&format!("{PRESENT}{rank}"));
                        state.left.push(rank);
                    }
                    self.tell(&[b"L", &rank_code(Some(rank))]);
                    return Ok(());
                }
                None if self.closing.load(Ordering::Acquire) => return Ok(()),
                None => {
                    let silent = message.is_err_and(|error| error.kind() == ErrorKind::TimedOut);
                    let how = match silent {
                        true => "is cut off: its host has not answered for too long",
                        false => "died: its connections closed without a goodbye",
                    };
                    self.fail(Some(rank), &format!("rank {rank} ({who}) {how}"));
                    return Ok(());
                }
            }
        }
    }

    fn requests(&self, stream: &Stream) -> io::Result<()> {
        loop {
            let request = wire::read(&mut &*stream)?;
            let Some(answer) = self.answer(&request, GET_SLICE) else { return Ok(()) };
            wire::write(&mut &*stream, &answer)?;
        }
    }

    /// The answer to a request; none to what is no request. Waits at most `most`.
    fn answer(&self, request: &[u8], most: Duration) -> Option<Vec<u8>> {
        let [kind, key, value] = wire::unpack::<3>(request)?;
        let key = String::from_utf8_lossy(key).into_owned();
        Some(match kind {
            b"S" => {
                if !self.lock().set(key, value.to_vec(), self.most) {
                    return Some(full());
                }
                self.changed.notify_all();
                wire::pack(&[b"k", b""])
            }
            b"A" => {
                let amount = u64::from_le_bytes(value.try_into().ok()?);
                let mut state = self.lock();
                let number = |entry: &Vec<u8>| entry.as_slice().try_into().map_or(0, u64::from_le_bytes);
                let sum = state.entries.get(&key).map_or(0, number).wrapping_add(amount);
                if !state.set(key, sum.to_le_bytes().to_vec(), self.most) {
                    return Some(full());
                }
                drop(state);
                self.changed.notify_all();
                wire::pack(&[b"v", &sum.to_le_bytes()])
            }
            b"P" => {
                let state = self.lock();
                let entries =
                    state.entries.range(key.clone()..).take_while(|(name, _)| name.starts_with(&key));
                let mut room = wire::LONGEST - wire::pack(&[b"v", b""]).len();
                let mut fields: Vec<&[u8]> = vec![];
                for (name, value) in entries {
                    let Some(left) = room.checked_sub(8 + name.len() + value.len()) else {
                        return Some(refusal("more entries than an answer holds"));
                    };
                    room = left;
                    fields.extend([name.as_bytes(), value.as_slice()]);
                }
                wire::pack(&[b"v", &wire::pack(&fields)])
            }
            b"J" => {
                let sequence: [u8; 4] = value.try_into().ok()?;
                let token = u64::from_str_radix(&key, 16).ok()?;
                self.tell(&[b"J", format!("{token:x}").as_bytes(), &sequence]);
                wire::pack(&[b"k", b""])
            }
            b"T" => wire::pack(&[b"v", &unix_us().to_le_bytes()]),
            b"G" => {
                let patience =
                    Duration::from_millis(u32::from_le_bytes(value.try_into().ok()?).into()).min(most);
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
            _ => return None,
        })
    }
}

/// The answer to a request that is one, but not granted.
fn refusal(why: &str) -> Vec<u8> {
    wire::pack(&[b"e", why.as_bytes()])
}

fn full() -> Vec<u8> {
    refusal("it is full: the job's ranks have left more there than any job needs")
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Watch,
    Requests,
}

/// Whoever has shown to be of the job.
struct Guest {
    role: Role,
    rank: usize,
    /// Host and process, for errors.
    who: String,
}

/// A server without a socket.
#[cfg(any(test, fuzzing))]
pub(crate) struct Bare(Served);

#[cfg(any(test, fuzzing))]
impl Bare {
    /// For at most `most` bytes of entries.
    pub(crate) fn new(size: usize, job: &[u8], most: usize) -> Self {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        Self(Served { most, ..Served::new(address, size, None, job) })
    }

    /// Whether a hello is one of this job's.
    pub(crate) fn greet(&self, hello: &[u8]) -> bool {
        self.0.greet(hello).is_ok()
    }

    /// The answer at once.
    pub(crate) fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        self.0.answer(request, Duration::ZERO)
    }

    /// Bytes of all entries.
    pub(crate) fn bytes(&self) -> usize {
        self.0.lock().bytes
    }
}

fn unix_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64
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
    requests: Mutex<Stream>,
    /// Carries the server's news to us, and our end, in either form, to the server.
    watch: Arc<Stream>,
    /// One message at a time.
    saying: Mutex<()>,
    health: Arc<Health>,
    local_ip: IpAddr,
    gone: AtomicBool,
    /// Longest time a get waits on the server, in milliseconds.
    slice_ms: AtomicU32,
    /// What to add to this host's clock to get the server's, in microseconds.
    clock_offset_us: i64,
    /// It has not answered once.
    lost: AtomicBool,
    /// The store's own address.
    store_ip: Option<IpAddr>,
    /// A rank on the store's host, where that is not this host.
    beside: AtomicU32,
}

/// What it takes to reach a store.
pub(crate) struct Reach<'a> {
    /// Where it may be.
    pub addresses: &'a dyn Fn() -> Result<Vec<(String, Security)>>,
    pub job: &'a [u8],
    pub rank: usize,
    /// How long it may take.
    pub timer: &'a Timer,
    /// Nobody else can be at the address.
    pub certain: bool,
    /// How long a wait in an operation may last.
    pub deadline: Duration,
}

impl StoreClient {
    /// Connects to the store.
    pub(crate) fn connect(reach: &Reach<'_>, health: Arc<Health>) -> Result<Arc<Self>> {
        let Reach { rank, timer, .. } = *reach;
        let mut reasons = Reasons::default();
        // What may be a stranger's address need not ever answer, so it gets less time, at first.
        let mut patience = if reach.certain { HELLO_TIME } else { PROBE_TIME };
        loop {
            for (address, security) in (reach.addresses)()? {
                let left = patience.min(timer.left().max(PROBE_TIME));
                let open = |role| open(&address, &security, reach, role, left);
                match open("request").and_then(|requests| Ok((requests, open("watch")?))) {
                    Ok((requests, watch)) => return Self::start(requests, watch, health, reach.deadline),
                    Err(error) => reasons.add(&address, error)?,
                }
            }
            if timer.is_over() || reach.certain && reasons.is_hopeless() {
                return Err(reasons.into_error(rank, timer.used()));
            }
            patience = (2 * patience).min(HELLO_TIME);
            // The store may not have been started yet; there is no event to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(requests: Stream, watch: Stream, health: Arc<Health>, deadline: Duration) -> Result<Arc<Self>> {
        let local_ip = requests.local_addr().map_err(Error::system("connect to the store"))?.ip();
        let mut client = Self {
            requests: Mutex::new(requests),
            watch: Arc::new(watch),
            saying: Mutex::default(),
            health,
            local_ip,
            gone: AtomicBool::new(false),
            slice_ms: AtomicU32::new(0),
            clock_offset_us: 0,
            lost: AtomicBool::new(false),
            store_ip: None,
            beside: AtomicU32::new(NOBODY),
        };
        client.keep_time(deadline);
        client.store_ip = client.watch.peer_addr().ok().map(|address| address.ip());
        let before = unix_us();
        if let (_, Ok(theirs)) = client.ask([b"T", b"", b""]).map(|(kind, time)| (kind, time.try_into()))? {
            // The answer was written half-way, about.
            let middle = before / 2 + unix_us() / 2;
            client.clock_offset_us = u64::from_le_bytes(theirs).wrapping_sub(middle).cast_signed();
        }
        let client = Arc::new(client);
        at_exit::register(at_exit::Farewell::Client(Arc::downgrade(&client)));
        let (health, weak) = (client.health.clone(), Arc::downgrade(&client));
        let news = client.watch.clone();
        std::thread::Builder::new()
            .name("regatta-watch".into())
            .spawn(move || watch_news(&news, &health, &weak))
            .map_err(Error::system("start a thread"))?;
        Ok(client)
    }

    /// Sets how long a wait in an operation may last: a store that is cut off must not hold a rank up for longer.
    pub(crate) fn keep_time(&self, deadline: Duration) {
        let answer = ANSWER_TIME.min(deadline / 2).max(Duration::from_millis(200));
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).set_read_timeout(Some(answer));
        self.slice_ms.store(GET_SLICE.min(answer / 2).as_millis() as u32, Ordering::Relaxed);
        super::keepalive(&*self.watch, SILENCE.min(deadline.max(Duration::from_secs(2))));
    }

    /// Learns from which address each rank reaches the store: those who do so from its own are on its host.
    pub(crate) fn learn_hosts(&self, addresses: &[Option<IpAddr>]) {
        let beside = addresses.iter().position(|address| {
            address.is_some() && *address == self.store_ip && self.store_ip != Some(self.local_ip)
        });
        self.beside.store(beside.map_or(NOBODY, |rank| rank as u32), Ordering::Relaxed);
    }

    /// What to add to this host's clock to get the store's, in microseconds.
    pub(crate) fn clock_offset_us(&self) -> i64 {
        self.clock_offset_us
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The address of this host from which the store is reached.
    pub(crate) fn local_ip(&self) -> IpAddr {
        self.local_ip
    }

    fn ask(&self, request: [&[u8]; 3]) -> Result<(u8, Vec<u8>)> {
        let stream = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::Rendezvous("the job's store does not answer".into()));
        }
        let answer =
            wire::write(&mut &*stream, &wire::pack(&request)).and_then(|()| wire::read(&mut &*stream));
        if answer.is_err() {
            // An answer that comes late must not be taken for that to the next request, and waiting once is enough.
            self.lost.store(true, Ordering::Relaxed);
            stream.shutdown();
        }
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
            Some([b"e", why]) => {
                let why = String::from_utf8_lossy(why);
                Err(Error::Rendezvous(format!("the job's store refuses a request: {why}")))
            }
            Some([[kind], value]) => Ok((*kind, value.to_vec())),
            _ => Err(Error::Rendezvous("the job's store gave an answer that is none".into())),
        }
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        Directory::set(self, key, value)
    }

    /// The value of `key`, which `rank` publishes, waiting for it as long as `timer` allows.
    pub(crate) fn get(&self, key: &str, rank: usize, timer: &Timer) -> Result<Vec<u8>> {
        loop {
            let left = timer.left();
            // Asked for before the answer: what it published last has come by then.
            let has_left = self.health.has_left(rank);
            if let Some(value) = self.try_get(key, Instant::now() + left.min(GET_SLICE))? {
                return Ok(value);
            }
            self.health.check()?;
            let problem = match has_left {
                true => "has left the job before it came".into(),
                false if left.is_zero() => format!(
                    "did not come within {:.1} s: it is late, stopped, or makes other calls (the time can be set by \
                     REGATTA_JOIN_S)",
                    timer.used().as_secs_f64()
                ),
                false => continue,
            };
            return Err(Error::Rendezvous(format!("a group is being made, and rank {rank} {problem}")));
        }
    }

    /// Tells all ranks that this one gives up. Goes beside the requests, one of which may be waiting.
    pub(crate) fn abort(&self, reason: &str) {
        // Without a store there is nobody to tell.
        let _ = self.say(&[b"X", reason.as_bytes()]);
    }

    fn say(&self, message: &[&[u8]; 2]) -> io::Result<()> {
        let _one_at_a_time = self.saying.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut &*self.watch, &wire::pack(message))
    }

    /// Says goodbye, once: from here on this rank is not missed.
    fn leave(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            let _ = self.say(&[b"L", b""]);
            self.watch.shutdown();
        }
    }
}

impl Drop for StoreClient {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Directory for StoreClient {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask([b"S", key.as_bytes(), value]).map(|_| ())
    }

    fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            let slice = Duration::from_millis(self.slice_ms.load(Ordering::Relaxed).into());
            let left = until.saturating_duration_since(Instant::now()).min(slice).as_millis() as u32;
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

    fn add(&self, key: &str, amount: u64) -> Result<u64> {
        let (_, sum) = self.ask([b"A", key.as_bytes(), &amount.to_le_bytes()])?;
        sum.try_into().map(u64::from_le_bytes).map_err(|_| no_answer())
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let (_, fields) = self.ask([b"P", prefix.as_bytes(), b""])?;
        let fields = wire::unpack_all(&fields).ok_or_else(no_answer)?;
        let entry = |pair: &[&[u8]]| (String::from_utf8_lossy(pair[0]).into_owned(), pair[1].to_vec());
        Ok(fields.chunks_exact(2).map(entry).collect())
    }

    fn lost(&self) -> Option<Option<usize>> {
        let beside = self.beside.load(Ordering::Relaxed);
        self.lost.load(Ordering::Relaxed).then_some((beside != NOBODY).then_some(beside as usize))
    }

    fn announce(&self, token: u64, sequence: u32) -> Result<()> {
        self.ask([b"J", format!("{token:x}").as_bytes(), &sequence.to_le_bytes()]).map(|_| ())
    }
}

fn no_answer() -> Error {
    Error::Rendezvous("the job's store gave an answer that is none".into())
}

/// One connection to the store at `address`.
fn open(
    address: &str,
    security: &Security,
    reach: &Reach<'_>,
    role: &str,
    patience: Duration,
) -> Result<Stream, Unreached> {
    let mut last = Unreached::Io(ErrorKind::AddrNotAvailable.into());
    for address in std::net::ToSocketAddrs::to_socket_addrs(address)? {
        match greet(&address, security, reach, role, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn greet(
    address: &SocketAddr,
    security: &Security,
    reach: &Reach<'_>,
    role: &str,
    patience: Duration,
) -> Result<Stream, Unreached> {
    let identity = security.for_store(address.ip()).map_err(Unreached::Never)?;
    let socket = TcpStream::connect_timeout(address, patience).map_err(|error| match error.kind() {
        ErrorKind::NetworkUnreachable if address.ip().is_loopback() => Unreached::Never(Error::Rendezvous(
            "the loopback interface of this network namespace is down, and the ranks of a host meet there: switch it \
             on (`ip link set lo up`)"
                .into(),
        )),
        _ => Unreached::Io(error),
    })?;
    socket.set_nodelay(true)?;
    let stream = match identity {
        Some(identity) => Stream::connect(socket, &identity, Instant::now() + patience)?,
        None => Stream::plain(socket),
    };
    stream.set_read_timeout(Some(patience));
    let who = format!("host {}, process {}", crate::host::hostname(), std::process::id());
    let rank = rank_code(Some(reach.rank));
    wire::write(&mut &stream, &wire::pack(&[MAGIC, reach.job, role.as_bytes(), &rank, who.as_bytes()]))?;
    match wire::read(&mut &stream)?.as_slice() {
        b"ok" => {
            stream.set_read_timeout(None);
            if role == "watch" {
                wire::write(&mut &stream, CONFIRMED)?;
            }
            Ok(stream)
        }
        why => Err(Unreached::Refused(String::from_utf8_lossy(why).into_owned())),
    }
}

/// Passes the server's news on, until the connection closes.
fn watch_news(stream: &Stream, health: &Health, client: &Weak<StoreClient>) {
    loop {
        let message = wire::read(&mut &*stream);
        let fields = message.as_deref().ok().and_then(wire::unpack::<3>);
        match fields {
            Some([b"X", rank, reason]) => health.end(parse_rank(rank), &String::from_utf8_lossy(reason)),
            Some([b"L", rank, _]) => {
                if let Some(rank) = parse_rank(rank) {
                    health.left(rank);
                }
            }
            Some([b"J", token, sequence]) => {
                let token =
                    std::str::from_utf8(token).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
                if let (Some(token), Ok(sequence)) = (token, sequence.try_into()) {
                    health.joined(token, u32::from_le_bytes(sequence));
                }
            }
            Some([b"C", ..]) => return health.silent(),
            _ => {
                // Closed: by ourselves, or because the server's process or its host is gone.
                if client.upgrade().is_some_and(|client| !client.gone.load(Ordering::Acquire)) {
                    health.end(
                        None,
                        "the job's store is gone: the launcher, or the process or host of rank 0, died or was cut off",
                    );
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

#[cfg(test)]
mod tests {
    use super::*;

    fn set(store: &Bare, key: &str, value: &[u8]) -> bool {
        let answer = store.answer(&wire::pack(&[b"S", key.as_bytes(), value])).unwrap();
        wire::unpack::<2>(&answer).unwrap()[0] == b"k"
    }

    #[test]
    fn each_rank_of_this_job_watches_once() {
        let store = Bare::new(2, b"job", MOST);
        let greet = |job: &[u8], role: &[u8], rank: usize| {
            store.greet(&wire::pack(&[MAGIC, job, role, &rank_code(Some(rank)), b"who"]))
        };
        assert!(greet(b"job", b"request", 1) && greet(b"job", b"watch", 1) && greet(b"job", b"request", 1));
        assert!(!greet(b"job", b"watch", 1) && !greet(b"job", b"watch", 2) && !greet(b"other", b"watch", 0));
    }

    #[test]
    fn entries_have_a_bound() {
        let store = Bare::new(2, b"", 1000);
        assert!(set(&store, "a", &[0; 100]));
        let stored = (0..100).filter(|n| set(&store, &format!("{n}"), &[0; 100])).count();
        assert_eq!(stored, 5);
        // An entry may still become shorter, and counters are refused alike.
        assert!(!set(&store, "a", &[0; 200]) && set(&store, "a", &[0; 50]));
        assert_eq!(store.bytes(), 6 * (ENTRY + 101) - 50);
        let add = |key: &[u8]| store.answer(&wire::pack(&[b"A", key, &1u64.to_le_bytes()])).unwrap();
        assert!(set(&store, "0", b""));
        assert_eq!(wire::unpack::<2>(&add(b"n")).unwrap()[0], b"v");
        assert_eq!(wire::unpack::<2>(&add(&[b'm'; 200])).unwrap()[0], b"e");
    }

    #[test]
    fn what_no_frame_holds_is_refused() {
        let store = Bare::new(2, b"", MOST);
        for n in 0..3 {
            assert!(set(&store, &format!("list/{n}"), &[0; 500_000]));
        }
        let list = |prefix: &[u8]| store.answer(&wire::pack(&[b"P", prefix, b""])).unwrap();
        assert_eq!(wire::unpack::<2>(&list(b"list/")).unwrap()[0], b"e");
        assert!(list(b"list/1").len() < wire::LONGEST);
        // A token is a number in hexadecimal digits; anything longer is no request.
        assert!(store.answer(&wire::pack(&[b"J", &[b'f'; 17], &[0; 4]])).is_none());
        assert!(store.answer(&wire::pack(&[b"J", b"ff", &[0; 4]])).is_some());
    }

    #[test]
    fn requests_are_answered_while_a_watcher_takes_no_news() {
        let store = Arc::new(Bare::new(2, b"", MOST));
        let telling = store.0.watchers();
        let (sender, answered) = std::sync::mpsc::channel();
        let asked = store.clone();
        std::thread::spawn(move || sender.send(set(&asked, "a", b"b")));
        assert_eq!(answered.recv_timeout(Duration::from_secs(20)), Ok(true));
        drop(telling);
    }

    #[test]
    fn the_longest_reason_reaches_everyone() {
        let security = Security::default();
        let server = StoreServer::start("127.0.0.1:0", 1, &security).unwrap();
        let addresses = || Ok(vec![(server.addr().to_string(), security.clone())]);
        let deadline = Duration::from_secs(20);
        let (until, timer) = (Instant::now() + deadline, Timer::new(deadline));
        let reach =
            Reach { addresses: &addresses, job: b"", rank: 0, timer: &timer, certain: true, deadline };
        let health = Arc::<Health>::default();
        let client = StoreClient::connect(&reach, health.clone()).unwrap();
        // The server's end of the watch connection may come to watch only now, and is told then.
        server.abort(None, &"\u{e9}".repeat(wire::LONGEST));
        let own = || Error::Rendezvous("no news".into());
        let heard = loop {
            match health.verdict(own()) {
                Error::Aborted { reason, .. } => break reason,
                _ => assert!(Instant::now() < until, "nobody has heard of it"),
            }
        };
        assert!(heard.len() <= REASON && heard.chars().all(|c| c == '\u{e9}'));
        drop(client);
    }
}
