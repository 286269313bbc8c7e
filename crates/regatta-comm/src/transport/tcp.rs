//! Ranks as processes anywhere: a TCP connection between each pair.

use super::patience::Patience;
use super::shared::Shared;
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::health::SLICE;
use crate::rendezvous::store::StoreClient;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"rgtta-p2";
/// Magic, secret, group; the rank follows.
const GREETING: usize = 8 + 16 + 8;
/// How long a stranger may take to say who it is.
const GREETING_TIME: Duration = Duration::from_secs(5);

/// The endpoint of one process.
pub(crate) struct TcpTransport {
    streams: Vec<Option<TcpStream>>,
    names: Arc<[usize]>,
    /// How long to look before sleeping.
    patience: Patience,
}

impl TcpTransport {
    /// Connects every pair of the group `id`, with the store as the directory.
    pub(crate) fn connect(
        store: &StoreClient,
        id: u64,
        rank: usize,
        names: Arc<[usize]>,
        until: Instant,
    ) -> Result<Self> {
        let listener = listen(store)?;
        let address = listener.local_addr().map_err(Error::system("listen"))?;
        let key = |rank: usize| format!("tcp/{id:x}/{rank}");
        let secret_key = format!("tcp/{id:x}/secret");
        if rank == 0 {
            let secret =
                [crate::rendezvous::random(), crate::rendezvous::random()].map(u64::to_le_bytes).concat();
            store.set(&secret_key, &secret)?;
        }
        store.set(&key(rank), address.to_string().as_bytes())?;
        let secret = store.get(&secret_key, until)?;
        let greeting: Arc<Vec<u8>> = Arc::new([MAGIC.as_slice(), &secret, &id.to_le_bytes()].concat());
        let mut streams: Vec<Option<TcpStream>> = (0..names.len()).map(|_| None).collect();
        // A connection is established as soon as the peer listens, so nobody waits for an acceptor here.
        for peer in 0..rank {
            let text = String::from_utf8(store.get(&key(peer), until)?).unwrap_or_default();
            let address: SocketAddr = text
                .parse()
                .map_err(|_| Error::Rendezvous(format!("rank {peer} published {text:?}, no address")))?;
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
            let connected = TcpStream::connect_timeout(&address, left).and_then(|mut stream| {
                stream.write_all(&greeting)?;
                stream.write_all(&(rank as u32).to_le_bytes())?;
                Ok(stream)
            });
            streams[peer] = Some(connected.map_err(Error::system(format!(
                "connect to rank {} at {address} (set REGATTA_IFACE_ADDR to an address its host can be reached at)",
                names[peer]
            )))?);
        }
        accept(&listener, &greeting, rank, &mut streams, || {
            store.health().check()?;
            match Instant::now() < until {
                true => Ok(()),
                false => Err(Error::Rendezvous("a rank did not connect in time".into())),
            }
        })?;
        for stream in streams.iter().flatten() {
            let prepared = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true));
            prepared.map_err(Error::system("set up a connection"))?;
        }
        let patience = Patience::new(names.len());
        Ok(Self { streams, names, patience })
    }

    fn stream(&self, peer: usize) -> Result<&TcpStream> {
        let stream = self.streams.get(peer).and_then(Option::as_ref);
        stream.ok_or_else(|| Error::Usage(format!("there is no connection to rank {peer} of the group")))
    }

    fn gone(&self, peer: usize) -> Error {
        Error::PeerDied { rank: self.names[peer], call: String::new() }
    }
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

/// Fills the streams of all ranks above `rank`. Every connection is greeted in a thread of its own, so that a
/// silent stranger holds nobody up; one without the secret is dropped.
fn accept(
    listener: &TcpListener,
    greeting: &Arc<Vec<u8>>,
    rank: usize,
    streams: &mut [Option<TcpStream>],
    mut check: impl FnMut() -> Result<()>,
) -> Result<()> {
    listener.set_nonblocking(true).map_err(Error::system("listen"))?;
    let (sender, greeted) = channel();
    while streams.iter().skip(rank + 1).any(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => greet(stream, greeting.clone(), sender.clone()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(Error::system("accept a connection")(error)),
        }
        if let Ok((peer, stream)) = greeted.recv_timeout(SLICE / 10)
            && peer > rank
            && let Some(slot) = streams.get_mut(peer)
        {
            *slot = Some(stream);
        }
        check()?;
    }
    Ok(())
}

fn greet(mut stream: TcpStream, expected: Arc<Vec<u8>>, sender: Sender<(usize, TcpStream)>) {
    std::thread::spawn(move || {
        let mut said = [0; GREETING + 4];
        let read = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(GREETING_TIME)))
            .and_then(|()| stream.read_exact(&mut said));
        let (greeting, rank) = said.split_at(GREETING);
        if read.is_ok() && greeting == expected.as_slice() {
            let rank = u32::from_le_bytes([rank[0], rank[1], rank[2], rank[3]]) as usize;
            // The group may be complete, or have given up.
            let _ = sender.send((rank, stream));
        }
    });
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn try_send(&mut self, to: usize, bytes: &[u8]) -> Result<usize> {
        match self.stream(to)?.write(bytes) {
            Ok(count) => Ok(count),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            Err(_) => Err(self.gone(to)),
        }
    }

    fn try_recv(&mut self, from: usize, buffer: &mut [u8]) -> Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        match self.stream(from)?.read(buffer) {
            Ok(0) => Err(self.gone(from)),
            Ok(count) => Ok(count),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            Err(_) => Err(self.gone(from)),
        }
    }

    #[cfg(unix)]
    fn wait(&mut self, to: Option<usize>, from: Option<usize>, timeout: Duration) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = Vec::with_capacity(2);
        if let Some(from) = from {
            fds.push(PollFd::new(self.stream(from)?, PollFlags::IN));
        }
        if let Some(to) = to {
            fds.push(PollFd::new(self.stream(to)?, PollFlags::OUT));
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Errors show again in the sleeping poll.
        if self.patience.look(|| poll(&mut fds, Some(&none)).is_ok_and(|ready| ready > 0)) {
            return Ok(());
        }
        let timeout =
            Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            // Ready, timed out or interrupted: the caller tries again in any case.
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::system("wait for a connection")(error)),
        }
    }

    #[cfg(not(unix))]
    fn wait(&mut self, _: Option<usize>, _: Option<usize>, timeout: Duration) -> Result<()> {
        // No portable way to wait for several sockets in std: look again soon.
        std::thread::sleep(timeout.min(Duration::from_micros(50)));
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience.set(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let rank = |rank: u32| rank.to_le_bytes();
        let wrong = [MAGIC.as_slice(), &[8; 16], &[0; 8], &rank(1)].concat();
        let mut held = vec![say(b""), say(b"GET / HTTP/1.1\r\n\r\n"), say(&[255; 100]), say(&wrong)];
        // Of our job, but none of the ranks that are still to come.
        held.push(say(&[greeting.as_slice(), &rank(0)].concat()));
        held.push(say(&[greeting.as_slice(), &rank(9)].concat()));
        let mut right = say(&[greeting.as_slice(), &rank(1)].concat());
        right.write_all(b"!").unwrap();
        let mut streams = vec![None, None];
        let until = Instant::now() + GREETING_TIME;
        let in_time = || match Instant::now() < until {
            true => Ok(()),
            false => Err(Error::Rendezvous("rank 1 was held up".into())),
        };
        accept(&listener, &greeting, 0, &mut streams, in_time).unwrap();
        let mut byte = [0];
        streams[1].as_mut().unwrap().read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
        assert!(streams[0].is_none());
    }
}
