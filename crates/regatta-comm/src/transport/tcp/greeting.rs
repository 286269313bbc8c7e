//! How a connection begins: one rank dials, says who it is, and is let in, or not.

use crate::error::{Error, Result};
use crate::tls::{Identity, Stream};
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"rgtta-p4";
/// Bytes of a listener's secret.
pub(crate) const SECRET: usize = 16;
/// Magic and secret; the rank and the number of the connection follow.
pub(crate) const GREETING: usize = 8 + SECRET;
/// How long an unknown client may take to say who it is.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(5);
/// How long one connection may take.
const LONGEST_CALL: Duration = Duration::from_secs(3600);
/// The answers to a greeting.
const WELCOME: u8 = b'y';
const NOT_NOW: u8 = b'n';

/// Bytes that a connection within a host buffers (the kernel doubles it): on two cores this took half the time of what
/// the kernel comes to by itself.
pub(super) const SHALLOW_BUFFER: usize = 256 << 10;

/// The same where peers are late.
#[cfg(target_os = "linux")]
const DEEP_BUFFER: usize = 8 << 20;

/// What every connection to a listener with this secret begins with.
pub(super) fn greeting(secret: &[u8; SECRET]) -> Vec<u8> {
    [MAGIC.as_slice(), secret].concat()
}

/// The rank and the number of the connection in a greeting of this job.
pub(crate) fn recognise(said: &[u8; GREETING + 8], expected: &[u8]) -> Option<(usize, usize)> {
    let (greeting, who) = said.split_at(GREETING);
    let (rank, number) = who.split_first_chunk::<4>()?;
    let number = u32::from_le_bytes(number.try_into().ok()?);
    (greeting == expected).then_some((u32::from_le_bytes(*rank) as usize, number as usize))
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

/// How much a connection within this host buffers for its peer. Best effort, as in [`prepare`].
#[cfg(target_os = "linux")]
pub(super) fn set_send_buffer(socket: &impl std::os::fd::AsFd, deep: bool) {
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

/// Whether the other side has ended a handshake, which need not be so the next time.
pub(super) fn is_cut(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::TimedOut
    )
}

/// One connection to a peer, after the greeting; none where the peer dials, too, and its connections are those that
/// stay.
pub(super) fn call(
    address: SocketAddr,
    identity: Option<&Identity>,
    greeting: &[u8],
    (rank, number): (usize, usize),
    patience: Duration,
) -> io::Result<Option<Stream>> {
    let left = patience.clamp(Duration::from_millis(100), LONGEST_CALL);
    let until = Instant::now() + left;
    let socket = TcpStream::connect_timeout(&address, left)?;
    prepare(&socket)?;
    let stream = match identity {
        Some(identity) => Stream::connect(socket, identity, until)?,
        None => Stream::plain(socket),
    };
    let who = [rank as u32, number as u32].map(u32::to_le_bytes).concat();
    (&stream).write_all(&[greeting, &who].concat())?;
    let mut answer = [0];
    stream.read_exact_by(&mut answer, until)?;
    match answer {
        [WELCOME] => Ok(Some(stream)),
        [NOT_NOW] => Ok(None),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// Hears who calls; none where it is an unknown client.
pub(super) fn hear(
    socket: TcpStream,
    identity: Option<&Identity>,
    expected: &[u8],
) -> io::Result<Option<(usize, usize, Stream)>> {
    socket.set_nonblocking(false)?;
    prepare(&socket)?;
    let stream = match identity {
        Some(identity) => Stream::accept(socket, identity, Instant::now() + GREETING_TIME)?,
        None => Stream::plain(socket),
    };
    let mut said = [0; GREETING + 8];
    stream.read_exact_by(&mut said, Instant::now() + GREETING_TIME)?;
    Ok(recognise(&said, expected).map(|(rank, number)| (rank, number, stream)))
}

/// Answers a greeting.
pub(super) fn answer(mut stream: &Stream, welcome: bool) -> io::Result<()> {
    stream.write_all(&[if welcome { WELCOME } else { NOT_NOW }])
}

/// Where a rank of a job is dialled.
pub(crate) struct Listening {
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) secret: [u8; SECRET],
}

impl Listening {
    /// Listens where peers can reach this host: at the address that the store is reached from.
    ///
    /// # Errors
    /// `REGATTA_IFACE_ADDR` is no address of this host, or the system refuses.
    pub(crate) fn new(ip: IpAddr) -> Result<Self> {
        const VARIABLE: &str = "REGATTA_IFACE_ADDR";
        let ip = match std::env::var(VARIABLE) {
            Ok(text) => text.parse::<IpAddr>().map_err(|_| Error::Env {
                variable: VARIABLE.into(),
                problem: format!("{text:?} is no IP address"),
            })?,
            Err(_) => ip,
        };
        let listener = TcpListener::bind((ip, 0)).map_err(Error::system(format!("listen on {ip}")))?;
        let address = listener.local_addr().map_err(Error::system("listen"))?;
        let mut secret = [0; SECRET];
        let words = [crate::rendezvous::random(), crate::rendezvous::random()];
        secret.copy_from_slice(&words.map(u64::to_le_bytes).concat());
        Ok(Self { listener, address, secret })
    }

    /// What peers must know to dial.
    pub(crate) fn contact(&self) -> Contact {
        Contact { address: self.address, secret: self.secret }
    }
}

/// What it takes to dial a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Contact {
    pub(super) address: SocketAddr,
    pub(super) secret: [u8; SECRET],
}

impl std::fmt::Display for Contact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{:032x}", self.address, u128::from_be_bytes(self.secret))
    }
}

impl Contact {
    /// Reads what [`Display`](std::fmt::Display) writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (address, secret) = text.split_once('/')?;
        let secret = u128::from_str_radix(secret, 16).ok()?.to_be_bytes();
        Some(Self { address: address.parse().ok()?, secret })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_comes_back() {
        let listening = Listening::new(IpAddr::from([127, 0, 0, 1])).unwrap();
        let contact = listening.contact();
        assert_eq!(Contact::parse(&contact.to_string()), Some(contact));
        for bad in ["", "-", "1.2.3.4:5", "1.2.3.4:5/x", "/00", "x/00"] {
            assert_eq!(Contact::parse(bad), None, "{bad}");
        }
    }
}
