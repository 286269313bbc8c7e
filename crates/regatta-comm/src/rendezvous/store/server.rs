//! The store's server: one thread for each connection.

use super::at_exit::{self, Leaving, Turn};
use super::protocol::{Answer, CONFIRMED, Farewell, Hello, News, Request, Role, WELCOME};
use super::state::Shared;
use super::unidentified::Unidentified;
use super::{HELLO_TIME, PRESENT, SILENCE, TROUBLE};
use crate::error::{Error, Result};
use crate::open_files;
use crate::rendezvous::Security;
use crate::rendezvous::failed_handshakes::FailedHandshakes;
use crate::rendezvous::{keepalive, wire};
use crate::tls::{Identity, Stream};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Longest time a request waits on the server before the client asks again.
pub(super) const SLICE: Duration = Duration::from_secs(2);
/// Connections that have not said yet who they are, beside two for each rank; more throw the oldest out.
const MOST_UNIDENTIFIED: usize = 64;
/// Most bytes of all that ranks leave here, with what it takes to keep it: far more than any job needs.
pub(super) const MOST: usize = 256 << 20;
/// Longest reason of a failure that is passed on, in bytes.
pub(super) const REASON: usize = 64 << 10;
/// How long the acceptor rests where the system lets it accept nothing.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The server. Dropping it ends the job's directory; ranks that are still working go on without.
pub struct StoreServer {
    served: Arc<Served>,
}

/// What has gone through a job's store so far, and what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreTraffic {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that ranks have sent, before encryption.
    pub bytes_in: u64,
    /// Bytes that ranks were sent, before encryption.
    pub bytes_out: u64,
    /// Entries that it holds.
    pub entries: usize,
    /// Bytes of these, with what it takes to keep them.
    pub entry_bytes: usize,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

struct Served {
    address: SocketAddr,
    job: Vec<u8>,
    size: usize,
    identity: Option<Identity>,
    state: Shared,
    /// Held while news is told, beside the state: a watcher that takes none must not hold requests up.
    watchers: Mutex<Vec<Arc<Stream>>>,
    closing: AtomicBool,
    unidentified: Mutex<Unidentified>,
    failed: FailedHandshakes,
    counters: Counters,
}

/// Whoever has shown to be of the job.
struct Guest {
    role: Role,
    rank: usize,
    /// Host and process, for errors.
    who: String,
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
        let served = Arc::new(Served::new(address, size, identity, job, MOST));
        let leaving: Weak<Served> = Arc::downgrade(&served);
        at_exit::register(Turn::Server, leaving);
        let accepting = served.clone();
        std::thread::Builder::new()
            .name("regatta-store".into())
            .spawn(move || accepting.accept(&listener))
            .map_err(Error::system("start a thread"))?;
        Ok(Self { served })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.served.address
    }

    /// The first failure of the job: the rank, where one is known, and what happened.
    pub fn first_failure(&self) -> Option<(Option<usize>, String)> {
        self.served.state.lock().generations.first_end().cloned()
    }

    /// What has gone through it so far, and what it holds.
    pub fn traffic(&self) -> StoreTraffic {
        self.served.traffic()
    }

    /// Ranks that have come so far, and so have been told of the first failure, where there is one.
    pub(crate) fn heard(&self) -> usize {
        self.served.state.lock().heard
    }

    /// Ends the job: every rank's calls return an error with this reason.
    pub fn abort(&self, rank: Option<usize>, reason: &str) {
        self.served.end(None, rank, reason);
    }

    /// Ends one generation of the job.
    pub(crate) fn end(&self, generation: u64, rank: usize, reason: &str) {
        self.served.end(Some(generation), Some(rank), reason);
    }

    #[cfg(test)]
    pub(super) fn hold_watchers(&self) -> MutexGuard<'_, Vec<Arc<Stream>>> {
        self.served.watchers()
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.served.goodbye();
    }
}

impl Leaving for Served {
    /// Says goodbye to the watchers and stops accepting.
    fn goodbye(&self) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.tell(&News::Closing);
        let ip = if self.address.ip().is_unspecified() {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            self.address.ip()
        };
        // Wakes the acceptor, which sees the flag.
        let _ = TcpStream::connect_timeout(&SocketAddr::new(ip, self.address.port()), Duration::from_secs(1));
    }
}

impl Served {
    /// For at most `most` bytes of what ranks leave.
    fn new(address: SocketAddr, size: usize, identity: Option<Identity>, job: &[u8], most: usize) -> Self {
        Self {
            address,
            job: job.to_vec(),
            size,
            identity,
            state: Shared::new(size, most),
            watchers: Mutex::default(),
            closing: AtomicBool::new(false),
            unidentified: Mutex::default(),
            failed: FailedHandshakes::default(),
            counters: Counters::default(),
        }
    }

    fn traffic(&self) -> StoreTraffic {
        let Counters { requests, bytes_in, bytes_out } = &self.counters;
        let [requests, bytes_in, bytes_out] =
            [requests, bytes_in, bytes_out].map(|counter| counter.load(Ordering::Relaxed));
        let state = self.state.lock();
        StoreTraffic { requests, bytes_in, bytes_out, entries: state.len(), entry_bytes: state.bytes() }
    }

    fn read(&self, stream: &Stream) -> io::Result<Vec<u8>> {
        let message = wire::read(&mut &*stream)?;
        self.counters.bytes_in.fetch_add(wire::framed(&message), Ordering::Relaxed);
        Ok(message)
    }

    fn write(&self, stream: &Stream, message: &[u8]) -> io::Result<()> {
        self.counters.bytes_out.fetch_add(wire::framed(message), Ordering::Relaxed);
        wire::write(&mut &*stream, message)
    }

    /// Takes connections until the server closes.
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.closing.load(Ordering::Acquire) {
                return;
            }
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    self.cannot_accept(&error);
                    continue;
                }
            };
            let number = self.unidentified().admit(&stream, MOST_UNIDENTIFIED + 2 * self.size);
            let served = self.clone();
            // A connection that no thread can be had for is dropped; its owner tries again.
            let _ = std::thread::Builder::new().spawn(move || served.serve(stream, number.ok()));
        }
    }

    fn end(&self, generation: Option<u64>, rank: Option<usize>, reason: &str) {
        // Every rank has to hear of it: the news has to fit into a frame.
        let reason = &reason[..reason.floor_char_boundary(REASON)];
        if self.state.lock().end(generation, &(rank, reason.into())) {
            self.tell(&News::End { generation, rank, reason: reason.into() });
        }
    }

    fn tell(&self, news: &News) {
        let message = news.encode();
        self.watchers().retain(|watcher| {
            let told = self.write(watcher, &message);
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

    fn unidentified(&self) -> MutexGuard<'_, Unidentified> {
        self.unidentified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One connection, to its end.
    fn serve(&self, stream: TcpStream, number: Option<u64>) {
        // An unknown client's connection ends here, without a word and without harm.
        let admitted = self.admit(stream);
        if let Some(number) = number {
            self.unidentified().known(number);
        }
        let Ok(Some((stream, guest))) = admitted else { return };
        let _ = match guest.role {
            Role::Watch => self.watch(&stream, guest.rank, &guest.who),
            Role::Requests => self.requests(&stream, guest.rank),
        };
        stream.shutdown();
    }

    /// No connection can be accepted at the moment: says why, to those who wait and to whoever runs the server.
    fn cannot_accept(&self, error: &io::Error) {
        let trouble = crate::error::explain(&format!("the job's store cannot accept connections: {error}"));
        if self.state.lock().set(TROUBLE, trouble.as_bytes()) {
            crate::say::say(format_args!("warning: {trouble}"));
        }
        // Connections may end meanwhile; there is no event to wait for.
        std::thread::sleep(ACCEPT_PAUSE);
    }

    /// Finds out who is there.
    fn admit(&self, stream: TcpStream) -> io::Result<Option<(Arc<Stream>, Guest)>> {
        stream.set_nodelay(true)?;
        let from = stream.peer_addr()?.ip();
        let note = |error: io::Error| {
            self.failed.heard(from, self.identity.is_some(), &error, |text| {
                self.state.lock().set(TROUBLE, text.as_bytes());
            });
            error
        };
        let stream = Arc::new(match &self.identity {
            Some(identity) => Stream::accept(stream, identity, Instant::now() + HELLO_TIME).map_err(note)?,
            None => Stream::plain(stream),
        });
        stream.set_read_timeout(Some(HELLO_TIME));
        let hello = match self.read(&stream) {
            Err(error) if self.identity.is_none() => return Err(note(error)),
            hello => hello?,
        };
        let guest = match self.greet(&hello) {
            Ok(guest) => guest,
            Err(refusal) => {
                self.write(&stream, refusal.as_bytes())?;
                return Ok(None);
            }
        };
        // As long as the rank likes: it may be stopped, and holds nothing up.
        stream.set_read_timeout(None);
        let confirmed = self.write(&stream, WELCOME).and_then(|()| match guest.role {
            Role::Requests => Ok(()),
            Role::Watch => match self.read(&stream)? == CONFIRMED {
                true => Ok(()),
                false => Err(ErrorKind::InvalidData.into()),
            },
        });
        if guest.role == Role::Watch {
            let mut state = self.state.lock();
            if confirmed.is_err() {
                state.generations.give_back(guest.rank);
            } else {
                state.set(&format!("{PRESENT}{}", guest.rank), guest.who.as_bytes());
            }
        }
        confirmed.map(|()| Some((stream, guest)))
    }

    /// What a hello says, where it is one of this job's, or why it is refused.
    fn greet(&self, hello: &[u8]) -> Result<Guest, String> {
        let hello = Hello::decode(hello).filter(|hello| hello.job == self.job);
        let Hello { role, rank, generation, who, .. } = hello.ok_or("the store there is of another job")?;
        if generation == 0 && rank >= self.size {
            return Err(format!(
                "the job there has {} ranks: WORLD_SIZE must be the same for all its ranks",
                self.size
            ));
        }
        if role == Role::Watch {
            // Two processes that take themselves for the same rank: the later one is turned away.
            let seat = self.state.lock().generations.sit(rank, who, generation);
            seat.map_err(|holder| format!("another process is rank {rank} of the job there ({holder})"))?;
        }
        Ok(Guest { role, rank, who: who.into() })
    }

    /// Holds a rank's watch connection until it says goodbye or dies.
    fn watch(&self, stream: &Arc<Stream>, rank: usize, who: &str) -> io::Result<()> {
        keepalive(&**stream, SILENCE);
        {
            let mut watchers = self.watchers();
            let past = self.state.lock().generations.past();
            for news in past {
                self.write(stream, &news.encode())?;
            }
            watchers.push(stream.clone());
        }
        self.state.lock().heard += 1;
        loop {
            let message = self.read(stream);
            match message.as_deref().ok().and_then(Farewell::decode) {
                Some(Farewell::GivesUp { generation, reason }) => {
                    self.end(Some(generation), Some(rank), &reason);
                }
                Some(Farewell::Goodbye) => {
                    let left = self.stand_up(rank, true);
                    self.leave(&left, rank);
                    return Ok(());
                }
                None if self.closing.load(Ordering::Acquire) => return Ok(()),
                None => {
                    let silent = message.is_err_and(|error| error.kind() == ErrorKind::TimedOut);
                    let how = match silent {
                        true => "is cut off: its host has not answered for too long",
                        false => "died: its connections closed without a goodbye",
                    };
                    for generation in self.stand_up(rank, false) {
                        self.end(Some(generation), Some(rank), &format!("rank {rank} ({who}) {how}"));
                    }
                    return Ok(());
                }
            }
        }
    }

    /// The process of a rank has gone; the generations that it concerns.
    fn stand_up(&self, rank: usize, by_itself: bool) -> Vec<u64> {
        let mut state = self.state.lock();
        state.entries.remove(&format!("{PRESENT}{rank}"));
        state.generations.stand_up(rank, by_itself)
    }

    /// Says that a rank makes no more calls in some generations.
    fn leave(&self, generations: &[u64], rank: usize) {
        generations.iter().for_each(|&generation| self.tell(&News::Left { generation, rank }));
    }

    fn requests(&self, stream: &Stream, rank: usize) -> io::Result<()> {
        loop {
            let request = self.read(stream)?;
            let Some(answer) = self.answer(&request, rank, SLICE) else { return Ok(()) };
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            self.write(stream, &answer)?;
        }
    }

    /// The answer to a request of `rank`; none to what is no request. Waits at most `most`.
    fn answer(&self, request: &[u8], rank: usize, most: Duration) -> Option<Vec<u8>> {
        let request = Request::decode(request)?;
        if let Request::Begin { generation, members } = &request {
            let begun = self.state.lock().begin(rank, *generation, members);
            return Some(match begun {
                Ok(left) => {
                    self.leave(&left, rank);
                    Answer::Done.encode()
                }
                Err(why) => {
                    // Those who have begun it, with other members, wait in vain.
                    if self.state.lock().generations.of(rank) <= *generation {
                        self.end(Some(*generation), Some(rank), &why);
                    }
                    Answer::Refused(why).encode()
                }
            });
        }
        let answer = self.state.answer(&request, rank, most);
        if let (Request::Join { round, sequence }, Answer::Number(_)) = (request, &answer) {
            self.tell(&News::Joined { token: round.token, sequence });
        }
        Some(answer.encode())
    }
}

/// A server without a socket.
#[cfg(any(test, fuzzing))]
pub(crate) struct Bare(Served);

#[cfg(any(test, fuzzing))]
impl Bare {
    /// For at most `most` bytes of what ranks leave.
    pub(crate) fn new(size: usize, job: &[u8], most: usize) -> Self {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        Self(Served::new(address, size, None, job, most))
    }

    /// Whether a hello is one of this job's.
    pub(crate) fn greet(&self, hello: &[u8]) -> bool {
        self.0.greet(hello).is_ok()
    }

    /// The answer at once.
    pub(crate) fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        self.0.answer(request, 0, Duration::ZERO)
    }

    /// What it holds.
    pub(crate) fn traffic(&self) -> StoreTraffic {
        self.0.traffic()
    }
}
