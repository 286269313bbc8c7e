//! Ranks as processes anywhere: TCP connections between each pair, encrypted where others could listen.

use super::lateness::{LESSON, Lateness};
use super::patience::Patience;
#[cfg(target_os = "linux")]
use super::zero_copy::ZeroCopy;
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::member::context::Context;
use crate::member::health::SLICE;
use crate::member::timer::Timer;
use crate::open_files;
use crate::rendezvous::Security;
use crate::rendezvous::store::StoreClient;
use crate::tls::{Identity, Stream};
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"rgtta-p3";
/// Magic, secret, group; the rank and the number of the connection follow.
pub(crate) const GREETING: usize = 8 + 16 + 8;
/// How long a stranger may take to say who it is.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// How long one connection may take.
const LONGEST_CALL: Duration = Duration::from_secs(3600);
/// Strangers that are heard at a time; more have to wait in the queue of the system.
const STRANGERS: usize = 64;
/// Bytes that go over one connection before the next one's turn comes, where a pair has several.
const STRIPE: u64 = 256 << 10;

/// Bytes that a connection within a host buffers (the kernel doubles it): on two cores this took half the time of what
/// the kernel comes to by itself.
const SHALLOW_BUFFER: usize = 256 << 10;

/// The same where peers are late.
#[cfg(target_os = "linux")]
const DEEP_BUFFER: usize = 8 << 20;

/// The endpoint of one process.
pub(crate) struct TcpTransport {
    links: Vec<Option<Link>>,
    names: Arc<[usize]>,
    encrypted: bool,
    /// What is sent may leave later: it is encrypted, or lent.
    deferring: bool,
    /// Memory may be lent in the present operation.
    lending: bool,
    /// How long to look before sleeping.
    patience: Patience,
    lateness: Lateness,
    /// Operations to come with deep buffers within this host.
    deep: u32,
}

/// The connections to one peer, which take turns.
struct Link {
    streams: Vec<Stream>,
    /// Of each stream, where the kernel can send without a copy.
    #[cfg(target_os = "linux")]
    lent: Vec<Option<ZeroCopy>>,
    /// Bytes ever sent.
    sent: u64,
    /// Bytes ever received.
    received: u64,
}

impl Link {
    fn new(streams: Vec<Stream>) -> Self {
        #[cfg(target_os = "linux")]
        let lent = {
            let far = |stream: &Stream| stream.peer_addr().is_ok_and(|peer| !peer.ip().is_loopback());
            let zero = |stream: &Stream| {
                (!stream.is_encrypted() && far(stream)).then(|| ZeroCopy::new(stream.as_fd())).flatten()
            };
            streams.iter().map(zero).collect()
        };
        Self {
            streams,
            #[cfg(target_os = "linux")]
            lent,
            sent: 0,
            received: 0,
        }
    }

    /// The connection whose turn it is after `bytes`, and how many bytes it has left.
    fn turn(&self, bytes: u64) -> (usize, usize) {
        let index = (bytes / STRIPE) as usize % self.streams.len();
        let left = match self.streams.len() {
            1 => usize::MAX,
            _ => (STRIPE - bytes % STRIPE) as usize,
        };
        (index, left)
    }

    /// The connection to send on.
    #[cfg(unix)]
    fn sending(&self) -> &Stream {
        &self.streams[self.turn(self.sent).0]
    }

    /// The connection to receive from.
    fn receiving(&self) -> &Stream {
        &self.streams[self.turn(self.received).0]
    }

    fn write(&mut self, index: usize, parts: [&[u8]; 2], lending: bool) -> io::Result<usize> {
        #[cfg(target_os = "linux")]
        if let Some(zero) = &mut self.lent[index]
            && lending
            && zero.is_for(parts[0].len() + parts[1].len())
        {
            return zero.send(self.streams[index].as_fd(), parts);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = lending;
        self.streams[index].try_write(parts)
    }

    /// Whether something is encrypted but not sent, or memory is lent; gets on with both.
    fn unsent(&mut self) -> io::Result<bool> {
        let mut unsent = false;
        for stream in &self.streams {
            unsent |= stream.wants_write() && !stream.flush()?;
        }
        #[cfg(target_os = "linux")]
        for (stream, zero) in self.streams.iter().zip(&mut self.lent) {
            if let Some(zero) = zero
                && zero.is_out()
            {
                zero.reap(stream.as_fd())?;
                unsent |= zero.is_out();
            }
        }
        Ok(unsent)
    }
}

/// How a group's connections are made.
pub(crate) struct Settings<'a> {
    pub store: &'a StoreClient,
    /// The group.
    pub id: u64,
    pub timer: &'a Timer,
    /// Connections for each pair.
    pub streams: usize,
    pub security: &'a Security,
}

impl TcpTransport {
    /// Connects this rank with `peers`, who connect with it; with the store as the directory.
    pub(crate) fn connect(context: &Context, peers: &[usize], settings: &Settings<'_>) -> Result<Self> {
        let Settings { store, id, timer, .. } = *settings;
        let (rank, names) = (context.rank, &context.names);
        open_files::prepare(peers.len() * settings.streams + 1, peers.len())?;
        let listener = listen(store)?;
        let address = listener.local_addr().map_err(Error::system("listen"))?;
        let identity = settings.security.for_data(address.ip())?;
        let prefix = format!("tcp/{id:x}/");
        // Rank 0's tells a stranger's connection from one of this group.
        let secret = match rank {
            0 => format!("{:016x}{:016x}", crate::rendezvous::random(), crate::rendezvous::random()),
            _ => String::new(),
        };
        store
            .set(&format!("{prefix}{rank}"), format!("{address} {} {secret}", settings.streams).as_bytes())?;
        let published = store.gather(&prefix, names, timer)?;
        let published: Vec<_> = published.iter().map(|text| String::from_utf8_lossy(text)).collect();
        let secret = published[0].rsplit(' ').next().and_then(|secret| u128::from_str_radix(secret, 16).ok());
        let secret = secret.ok_or_else(|| {
            Error::Rendezvous(format!("rank {} published {:?}, no secret", names[0], published[0]))
        })?;
        let greeting: Arc<Vec<u8>> =
            Arc::new([MAGIC.as_slice(), &secret.to_le_bytes(), &id.to_le_bytes()].concat());
        let mut links: Vec<Vec<Option<Stream>>> = (0..context.size).map(|_| vec![]).collect();
        // A connection is established as soon as the peer listens, so nobody waits for an acceptor here.
        for &peer in peers.iter().filter(|&&peer| peer < rank) {
            let text = &published[peer];
            let mut words = text.split(' ');
            let mut parsed = || {
                let address = words.next()?.parse::<SocketAddr>().ok()?;
                let streams: usize = words.next()?.parse().ok()?;
                (1..=64).contains(&streams).then_some((address, streams))
            };
            let (address, streams) = parsed().ok_or_else(|| {
                Error::Rendezvous(format!("rank {} published {text:?}, no address", names[peer]))
            })?;
            let identity = settings.security.for_data(address.ip())?;
            for number in 0..streams {
                let connected = loop {
                    match call(address, identity.as_ref(), &greeting, (rank, number), timer) {
                        // A peer that was stopped, or does not get its turn, ends a handshake that takes too long.
                        Err(error) if is_cut(&error) && !timer.is_over() => store.health().check()?,
                        outcome => break outcome,
                    }
                };
                links[peer].push(Some(connected.map_err(Error::system(format!(
                    "connect to rank {} at {address} (set REGATTA_IFACE_ADDR to an address its host can be reached at)",
                    names[peer]
                )))?));
            }
        }
        for &peer in peers.iter().filter(|&&peer| peer > rank) {
            links[peer].resize_with(settings.streams, || None);
        }
        let mut left_for = None;
        accept(&listener, identity.as_ref(), &greeting, rank, &mut links, |missing| {
            store.health().check()?;
            // What it has sent before may still be in the system's queue.
            let left = store.health().has_left(names[missing]);
            if left && left_for.get_or_insert_with(|| Timer::new(GREETING_TIME)).is_over() {
                return Err(Error::Rendezvous(format!(
                    "rank {} has left the job before it connected",
                    names[missing]
                )));
            }
            match timer.is_over() {
                false => Ok(()),
                true => Err(Error::Rendezvous(format!(
                    "rank {} did not connect within {:.1} s (the time can be set by REGATTA_JOIN_S)",
                    names[missing],
                    timer.used().as_secs_f64()
                ))),
            }
        })?;
        let link = |streams: Vec<Option<Stream>>| {
            let streams: Vec<Stream> = streams.into_iter().flatten().collect();
            (!streams.is_empty()).then(|| Link::new(streams))
        };
        let patience = Patience::new(context.size);
        let links: Vec<Option<Link>> = links.into_iter().map(link).collect();
        // Each connection is encrypted or not by the address that it goes to.
        let encrypted = links.iter().flatten().flat_map(|link| &link.streams).any(Stream::is_encrypted);
        #[cfg(target_os = "linux")]
        let lends = links.iter().flatten().any(|link| link.lent.iter().any(Option::is_some));
        #[cfg(not(target_os = "linux"))]
        let lends = false;
        let deferring = encrypted || lends;
        let lateness = Lateness::new(context.size);
        let names = names.clone();
        Ok(Self { links, names, encrypted, deferring, lending: false, patience, lateness, deep: 0 })
    }

    /// Makes connections within this host buffer little, which stays in the cache, or much, so that a rank gets far
    /// before it needs its peer on a processor.
    #[cfg(target_os = "linux")]
    fn set_depth(&mut self, deep: bool) {
        for stream in self.links.iter().flatten().flat_map(|link| &link.streams) {
            if stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback()) {
                set_send_buffer(stream, deep);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn set_depth(&mut self, _: bool) {}

    fn link(&mut self, peer: usize) -> Result<&mut Link> {
        let link = self.links.get_mut(peer).and_then(Option::as_mut);
        link.ok_or_else(|| Error::Internal(format!("there is no connection to rank {peer} of the group")))
    }

    fn gone(&self, peer: usize) -> Error {
        Error::PeerDied { rank: self.names[peer], call: String::new() }
    }

    /// Whether what a wait for these waits for has come without a wait, in a TLS buffer.
    fn buffered(&mut self, from: &[usize]) -> Result<bool> {
        for &peer in from {
            let link = self.link(peer)?;
            if link.receiving().has_plaintext() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether an operation with one of the peers can go on, as far as the sockets know.
    #[cfg(unix)]
    fn poll(&self, to: &[usize], from: &[usize], timeout: Duration) -> rustix::io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = Vec::with_capacity(to.len() + from.len());
        let links =
            |peers: &[usize]| peers.iter().filter_map(|&peer| self.links[peer].as_ref()).collect::<Vec<_>>();
        for link in links(from) {
            fds.push(PollFd::new(link.receiving(), PollFlags::IN));
        }
        for link in links(to) {
            fds.push(PollFd::new(link.sending(), PollFlags::OUT));
        }
        if self.encrypted {
            for stream in self.links.iter().flatten().flat_map(|link| &link.streams) {
                if stream.wants_write() {
                    fds.push(PollFd::new(stream, PollFlags::OUT));
                }
            }
        }
        let timeout =
            Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
        poll(&mut fds, Some(&timeout)).map(|ready| ready > 0)
    }

    /// Whether one of the peers may be ready.
    pub(super) fn is_ready(&mut self, to: &[usize], from: &[usize]) -> Result<bool> {
        if self.encrypted && self.buffered(from)? {
            return Ok(true);
        }
        #[cfg(unix)]
        return Ok(self.poll(to, from, Duration::ZERO).unwrap_or(false));
        #[cfg(not(unix))]
        return Ok(!to.is_empty());
    }

    /// Sleeps until one of the peers may be ready, at most `timeout`; looks first where `patient`.
    #[cfg(unix)]
    pub(super) fn sleep(
        &mut self,
        to: &[usize],
        from: &[usize],
        timeout: Duration,
        patient: bool,
    ) -> Result<()> {
        if self.deferring {
            self.unsent()?;
        }
        if self.encrypted && self.buffered(from)? {
            return Ok(());
        }
        // Errors show again in the sleeping poll.
        let ready = || self.poll(to, from, Duration::ZERO).unwrap_or(false);
        if patient && self.patience.look(ready) {
            return Ok(());
        }
        match self.poll(to, from, timeout) {
            // Ready, timed out or interrupted: the caller tries again in any case.
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::system("wait for a connection")(error)),
        }
    }

    #[cfg(not(unix))]
    pub(super) fn sleep(&mut self, _: &[usize], from: &[usize], timeout: Duration, _: bool) -> Result<()> {
        if self.deferring {
            self.unsent()?;
        }
        if self.encrypted && self.buffered(from)? {
            return Ok(());
        }
        // No portable way to wait for several sockets in std: look again soon.
        std::thread::sleep(timeout.min(Duration::from_micros(50)));
        Ok(())
    }
}

/// Sets a connection up for what ranks send: bulk at full speed, and small messages at once.
fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    // Best effort: a connection without it works, too.
    #[cfg(target_os = "linux")]
    if socket.peer_addr()?.ip().is_loopback() {
        use rustix::net::sockopt::{set_socket_send_buffer_size, set_tcp_congestion};
        // Nothing is congested within a host; what paces its sending (BBR) only costs time there.
        let _ = set_tcp_congestion(socket, "reno");
        // As much as stays in the cache between the copy in and the copy out.
        let _ = set_socket_send_buffer_size(socket, SHALLOW_BUFFER);
    }
    Ok(())
}

/// Whether the other side has ended a handshake, which need not be so the next time.
fn is_cut(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::TimedOut
    )
}

/// How much a connection within this host buffers for its peer. Best effort, as in [`prepare`].
#[cfg(target_os = "linux")]
fn set_send_buffer(socket: &impl AsFd, deep: bool) {
    use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
    if !deep {
        let _ = set_socket_send_buffer_size(socket, SHALLOW_BUFFER);
        return;
    }
    // Without the privilege, as far as the system's limit goes.
    if set_socket_send_buffer_size_force(socket, DEEP_BUFFER).is_err() {
        let _ = set_socket_send_buffer_size(socket, DEEP_BUFFER);
    }
}

/// One connection to a peer, after the greeting.
fn call(
    address: SocketAddr,
    identity: Option<&Identity>,
    greeting: &[u8],
    (rank, number): (usize, usize),
    timer: &Timer,
) -> io::Result<Stream> {
    let left = timer.left().clamp(Duration::from_millis(100), LONGEST_CALL);
    let socket = TcpStream::connect_timeout(&address, left)?;
    prepare(&socket)?;
    let stream = match identity {
        Some(identity) => Stream::connect(socket, identity, Instant::now() + left)?,
        None => Stream::plain(socket),
    };
    let who = [rank as u32, number as u32].map(u32::to_le_bytes).concat();
    (&stream).write_all(&[greeting, &who].concat())?;
    Ok(stream)
}

/// Listens where peers can reach this host: at the address that the store is reached from.
fn listen(store: &StoreClient) -> Result<TcpListener> {
    const VARIABLE: &str = "REGATTA_IFACE_ADDR";
    let ip = match std::env::var(VARIABLE) {
        Ok(text) => text.parse::<IpAddr>().map_err(|_| Error::Env {
            variable: VARIABLE.into(),
            problem: format!("{text:?} is no IP address"),
        })?,
        Err(_) => store.local_ip(),
    };
    TcpListener::bind((ip, 0)).map_err(Error::system(format!("listen on {ip}")))
}

/// Fills the connections that are missing. Every connection is greeted in a thread of its own, so that a silent
/// stranger holds nobody up; one without the secret is dropped.
fn accept(
    listener: &TcpListener,
    identity: Option<&Identity>,
    greeting: &Arc<Vec<u8>>,
    rank: usize,
    links: &mut [Vec<Option<Stream>>],
    mut check: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    listener.set_nonblocking(true).map_err(Error::system("listen"))?;
    let (sender, greeted) = channel();
    let mut hearing = 0;
    while let Some(missing) = links.iter().position(|link| link.iter().any(Option::is_none)) {
        // Each is heard for a limited time, so a crowd of strangers cannot shut ranks out for long.
        if hearing < STRANGERS + links.len() {
            match listener.accept() {
                Ok((stream, _)) => {
                    hearing += 1;
                    greet(stream, identity.cloned(), greeting.clone(), sender.clone());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::system("accept a connection")(error)),
            }
        }
        if let Ok(heard) = greeted.recv_timeout(SLICE / 10) {
            hearing -= 1;
            if let Some((peer, number, stream)) = heard
                && peer > rank
                && let Some(slot) = links.get_mut(peer).and_then(|link| link.get_mut(number))
                && slot.is_none()
            {
                *slot = Some(stream);
            }
        }
        check(missing)?;
    }
    Ok(())
}

/// The peer and the number of its connection.
type Heard = Option<(usize, usize, Stream)>;

fn greet(stream: TcpStream, identity: Option<Identity>, expected: Arc<Vec<u8>>, sender: Sender<Heard>) {
    let unheard = sender.clone();
    let hearing = std::thread::Builder::new().spawn(move || {
        let hear = || -> io::Result<Heard> {
            stream.set_nonblocking(false)?;
            prepare(&stream)?;
            let stream = match identity {
                Some(identity) => Stream::accept(stream, &identity, Instant::now() + GREETING_TIME)?,
                None => Stream::plain(stream),
            };
            let mut said = [0; GREETING + 8];
            stream.read_exact_by(&mut said, Instant::now() + GREETING_TIME)?;
            Ok(recognise(&said, &expected).map(|(rank, number)| (rank, number, stream)))
        };
        // The group may be complete, or have given up.
        let _ = sender.send(hear().ok().flatten());
    });
    if hearing.is_err() {
        // A connection that no thread can be had for is dropped.
        let _ = unheard.send(None);
    }
}

/// The rank and the number of the connection in a greeting of this group.
pub(crate) fn recognise(said: &[u8; GREETING + 8], expected: &[u8]) -> Option<(usize, usize)> {
    let (greeting, who) = said.split_at(GREETING);
    let (rank, number) = who.split_first_chunk::<4>()?;
    let number = u32::from_le_bytes(number.try_into().ok()?);
    (greeting == expected).then_some((u32::from_le_bytes(*rank) as usize, number as usize))
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        let gone = self.gone(to);
        let lending = self.lending;
        let link = self.link(to)?;
        let mut parts = parts;
        let mut taken = 0;
        while parts.iter().any(|part| !part.is_empty()) {
            let (stream, left) = link.turn(link.sent);
            let first = parts[0].len().min(left);
            let second = parts[1].len().min(left - first);
            let now = [&parts[0][..first], &parts[1][..second]];
            let count = link.write(stream, now, lending).map_err(|_| gone.clone())?;
            link.sent += count as u64;
            taken += count;
            let of_first = count.min(first);
            parts = [&parts[0][of_first..], &parts[1][count - of_first..]];
            if count < first + second {
                break;
            }
        }
        Ok(taken)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let gone = self.gone(from);
        let link = self.link(from)?;
        let [mut one, mut two] = parts;
        let mut got = 0;
        while !one.is_empty() || !two.is_empty() {
            let (stream, left) = link.turn(link.received);
            let first = one.len().min(left);
            let second = two.len().min(left - first);
            let now = [&mut one[..first], &mut two[..second]];
            let count = link.streams[stream].try_read(now).map_err(|_| gone.clone())?;
            link.received += count as u64;
            got += count;
            let of_first = count.min(first);
            one = &mut one[of_first..];
            two = &mut two[count - of_first..];
            if count < first + second || left == usize::MAX {
                break;
            }
        }
        Ok(got)
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        self.sleep(to, from, timeout, true)
    }

    fn unsent(&mut self) -> Result<Option<usize>> {
        if !self.deferring {
            return Ok(None);
        }
        let mut unsent = None;
        for peer in 0..self.links.len() {
            let gone = self.gone(peer);
            if let Some(link) = &mut self.links[peer]
                && link.unsent().map_err(|_| gone)?
            {
                unsent = Some(peer);
            }
        }
        Ok(unsent)
    }

    fn lend(&mut self, allowed: bool) {
        self.lending = allowed;
    }

    fn enter(&mut self, bytes: usize) {
        if bytes <= SHALLOW_BUFFER {
            return;
        }
        self.lateness.forgive(bytes);
        if self.deep > 0 {
            self.deep -= 1;
            if self.deep == 0 {
                self.set_depth(false);
            }
        }
    }

    fn has_waited(&mut self, waited: Duration) {
        if self.deep > 0 {
            return;
        }
        self.lateness.add(waited);
        if self.lateness.is_too_late() {
            self.lateness.clear();
            self.deep = LESSON;
            self.set_depth(true);
        }
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience.set(patience);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn strangers_are_dropped_and_hold_nobody_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let greeting = Arc::new([MAGIC.as_slice(), &[7; 16], &[0; 8]].concat());
        let say = |bytes: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(bytes).unwrap();
            stream
        };
        let who = |rank: u32, number: u32| [rank, number].map(u32::to_le_bytes).concat();
        let wrong = [MAGIC.as_slice(), &[8; 16], &[0; 8], &who(1, 0)].concat();
        let mut held = vec![say(b""), say(b"GET / HTTP/1.1\r\n\r\n"), say(&[255; 100]), say(&wrong)];
        // Of our job, but none of the ranks that are still to come.
        for (rank, number) in [(0, 0), (9, 0), (1, 5)] {
            held.push(say(&[greeting.as_slice(), &who(rank, number)].concat()));
        }
        let mut right = say(&[greeting.as_slice(), &who(1, 0)].concat());
        right.write_all(b"!").unwrap();
        let mut links = vec![vec![], vec![None]];
        let until = Instant::now() + GREETING_TIME;
        let in_time = |_| match Instant::now() < until {
            true => Ok(()),
            false => Err(Error::Rendezvous("rank 1 was held up".into())),
        };
        accept(&listener, None, &greeting, 0, &mut links, in_time).unwrap();
        let mut byte = [0];
        let stream = links[1][0].as_ref().unwrap();
        stream.set_read_timeout(Some(GREETING_TIME));
        (&*stream).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
        assert!(links[0].is_empty());
    }
}
