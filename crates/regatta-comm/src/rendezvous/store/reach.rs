//! How a rank reaches a store that it knows one or several addresses of.

use super::protocol::{CONFIRMED, Hello, Role, WELCOME};
use crate::error::{Error, Result};
use crate::member::timer::Timer;
use crate::rendezvous::reasons::Unreached;
use crate::rendezvous::{Security, wire};
use crate::tls::Stream;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// What it takes to reach a store.
pub(crate) struct Reach<'a> {
    /// Where it may be.
    pub addresses: &'a dyn Fn() -> Result<Vec<(String, Security)>>,
    pub job: &'a [u8],
    pub rank: usize,
    /// The generation of the job that the rank comes for.
    pub generation: u64,
    /// How long it may take.
    pub timer: &'a Timer,
    /// Nobody else can be at the address.
    pub certain: bool,
    /// How long a wait in an operation may last.
    pub deadline: Duration,
}

impl Reach<'_> {
    /// One connection to the store at `address`.
    pub(super) fn open(
        &self,
        address: &str,
        security: &Security,
        role: Role,
        patience: Duration,
    ) -> Result<Stream, Unreached> {
        let mut last = Unreached::Io(ErrorKind::AddrNotAvailable.into());
        for address in std::net::ToSocketAddrs::to_socket_addrs(address)? {
            match self.greet(address, security, role, patience) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn greet(
        &self,
        address: SocketAddr,
        security: &Security,
        role: Role,
        patience: Duration,
    ) -> Result<Stream, Unreached> {
        let identity = security.for_store(address.ip()).map_err(Unreached::Never)?;
        let socket = TcpStream::connect_timeout(&address, patience).map_err(|error| match error.kind() {
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
        let Self { job, rank, generation, .. } = *self;
        let hello = Hello { job, role, rank, generation, who: &who };
        wire::write(&mut &stream, &hello.encode())?;
        match wire::read(&mut &stream)?.as_slice() {
            WELCOME => {
                stream.set_read_timeout(None);
                if role == Role::Watch {
                    wire::write(&mut &stream, CONFIRMED)?;
                }
                Ok(stream)
            }
            why => Err(Unreached::Refused(String::from_utf8_lossy(why).into_owned())),
        }
    }
}
