//! TLS 1.3 between the ranks of a job that share a *job secret*.
//!
//! Every rank derives the same Ed25519 key from the secret and shows it, as a raw public key (RFC 7250),
//! both as client and as server. Each side accepts that key and no other, so a handshake completes only
//! between two holders of the secret. It does not tell ranks apart: which rank is on the other side is
//! for the messages that follow.
//!
//! Anyone who can connect is shown the public key and can test guesses of the secret against it at
//! leisure: the secret has to be random (16 bytes or more), not a word that people remember.
//!
//! A [`Stream`] is a TCP connection, plain or under TLS, with one face for both.

mod identity;
mod session;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::member::timer::Timer;
use rustls::Error;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;

pub(crate) use identity::Identity;
use session::{Parts, Send, Side, Tls, broken};

/// How long a blocking write waits for the peer to take more.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest sleep of a wait with a limit, so that its timer sees when this process was stopped.
const SLICE: Duration = Duration::from_millis(250);

/// A TCP connection, plain or under TLS, that threads share by reference.
///
/// The `try_` calls never wait. [`Read`] and [`Write`], on `&Stream`, do; one thread may read while others write.
/// Where several threads write, each has to keep the others out until its message is complete.
///
/// The end of a TLS stream that the peer did not announce is an error of kind `UnexpectedEof`.
pub(crate) struct Stream {
    /// Never blocks: whoever has to wait does so in [`wait`], without the lock of `tls`.
    socket: TcpStream,
    tls: Option<Mutex<Tls>>,
    read_timeout: Mutex<Option<Duration>>,
}

impl Stream {
    /// The connection as it is. It becomes non-blocking, for its clones too.
    pub(crate) fn plain(socket: TcpStream) -> Stream {
        // This fails only for what is no socket, and then so does the first read or write.
        let _ = socket.set_nonblocking(true);
        Stream::new(socket, None)
    }

    /// The client's handshake; done once the server has accepted the job's key.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` where the other side holds another secret, `InvalidData` where it does not speak
    /// TLS, `TimedOut` at the deadline, and those of the socket.
    pub(crate) fn connect(socket: TcpStream, identity: &Identity, deadline: Instant) -> io::Result<Stream> {
        // rustls wants a name for the server. No certificate bears one here, and it is not sent.
        let name = ServerName::try_from("regatta").expect("a host name");
        let client = UnbufferedClientConnection::new(Arc::clone(&identity.client), name).map_err(broken)?;
        Stream::shake_hands(socket, Side::Client(client), deadline)
    }

    /// The server's handshake; done once the client has proved that it holds the job's key.
    ///
    /// # Errors
    ///
    /// As [`connect`](Stream::connect).
    pub(crate) fn accept(socket: TcpStream, identity: &Identity, deadline: Instant) -> io::Result<Stream> {
        let server = UnbufferedServerConnection::new(Arc::clone(&identity.server)).map_err(broken)?;
        Stream::shake_hands(socket, Side::Server(server), deadline)
    }

    fn shake_hands(socket: TcpStream, side: Side, deadline: Instant) -> io::Result<Stream> {
        socket.set_nonblocking(true)?;
        let mut tls = Tls::new(side);
        if let Err(error) = tls.shake_hands(&socket, deadline) {
            // The alert says why to the other side; there is nobody to tell if it does not get out.
            let _ = tls.flush(&socket);
            return Err(explain(error));
        }
        Ok(Stream::new(socket, Some(tls)))
    }

    fn new(socket: TcpStream, tls: Option<Tls>) -> Stream {
        let tls = tls.map(Mutex::new);
        Stream { socket, tls, read_timeout: Mutex::new(None) }
    }

    fn tls(&self) -> Option<MutexGuard<'_, Tls>> {
        self.tls.as_ref().map(|tls| tls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long [`Read`] waits for a byte before it gives `TimedOut`; without a time-out, for ever.
    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) {
        *self.read_timeout.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
    }

    /// Takes bytes of the two slices, one after the other, as far as that needs no waiting, and says how
    /// many. Under TLS a part of them may be encrypted but not sent: see [`flush`](Stream::flush).
    pub(crate) fn try_write(&self, parts: [&[u8]; 2]) -> io::Result<usize> {
        if let Some(mut tls) = self.tls() {
            return tls.send(&self.socket, parts);
        }
        let parts = parts.map(IoSlice::new);
        without_waiting(|| (&self.socket).write_vectored(&parts)).map(|count| count.unwrap_or(0))
    }

    /// Sends what is encrypted already, as far as that needs no waiting; true when nothing is left.
    pub(crate) fn flush(&self) -> io::Result<bool> {
        self.tls().map_or(Ok(true), |mut tls| tls.flush(&self.socket))
    }

    /// Whether something is encrypted but not sent.
    #[cfg(unix)]
    pub(crate) fn wants_write(&self) -> bool {
        self.tls().is_some_and(|tls| !tls.outgoing.is_empty())
    }

    /// Fills the two slices, one after the other, with what is there, and says how much that was.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` at the end of the stream, and those of the socket and of TLS.
    pub(crate) fn try_read(&self, parts: [&mut [u8]; 2]) -> io::Result<usize> {
        if parts.iter().all(|part| part.is_empty()) {
            return Ok(0);
        }
        match self.receive(parts)? {
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => Ok(count),
            None => Ok(0),
        }
    }

    /// Fills `into`; `TimedOut` at the deadline, even where byte after byte comes.
    pub(crate) fn read_exact_by(&self, into: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            match self.receive([&mut into[filled..], &mut []])? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(count) => filled += count,
                None => wait(&self.socket, Wait::Readable, Some(deadline))?,
            }
        }
        Ok(())
    }

    /// Whether [`try_read`](Stream::try_read) has something to give that a poll of the socket would not
    /// tell of.
    pub(crate) fn has_plaintext(&self) -> bool {
        self.tls().is_some_and(|mut tls| tls.has_plaintext())
    }

    /// `None` where nothing is there now, `Some(0)` at the end of the stream.
    fn receive(&self, parts: [&mut [u8]; 2]) -> io::Result<Option<usize>> {
        let Some(mut tls) = self.tls() else {
            let mut parts = parts.map(IoSliceMut::new);
            return without_waiting(|| (&self.socket).read_vectored(&mut parts));
        };
        let mut parts = Parts { parts, filled: 0 };
        match tls.receive(&self.socket, &mut parts) {
            // What came before an error is the caller's; the error comes again.
            _ if parts.filled > 0 => Ok(Some(parts.filled)),
            Ok(()) => Ok(tls.closed.then_some(0)),
            Err(error) => {
                // An alert may tell the peer what is wrong with what it sent.
                let _ = tls.flush(&self.socket);
                Err(error)
            }
        }
    }

    /// Ends both directions; a thread that waits in [`Read`] comes back.
    pub(crate) fn shutdown(&self) {
        self.say_goodbye();
        // The one error there is says that the connection has ended already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends this side's sending without a word: the peer sees that the connection broke. What the peer has sent can
    /// still be read.
    pub(crate) fn stop_sending(&self) {
        // The one error there is says that the connection has ended already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// As [`stop_sending`](Stream::stop_sending), with a word where there are words.
    pub(crate) fn end_sending(&self) {
        self.say_goodbye();
        self.stop_sending();
    }

    /// Reads what is there from the socket and forgets it; true at the end of the stream.
    pub(crate) fn discard(&self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match without_waiting(|| (&self.socket).read(&mut bytes)) {
                Ok(Some(0)) | Err(_) => return true,
                Ok(Some(_)) => {}
                Ok(None) => return false,
            }
        }
    }

    /// Whether it is under TLS.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Announces the end to the peer, where the socket takes the announcement at once.
    fn say_goodbye(&self) {
        if let Some(mut tls) = self.tls() {
            // After a fatal alert there is nothing more to say.
            if std::mem::replace(&mut tls.closed, true) || tls.failed.is_some() {
                return;
            }
            let _ = tls.seal(Send::Close).and_then(|()| tls.flush(&self.socket));
        }
    }

    /// This side's address.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The other side's address.
    pub(crate) fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.socket.peer_addr()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.say_goodbye();
    }
}

#[cfg(unix)]
impl std::os::fd::AsFd for Stream {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for &Stream {
    /// Waits for at least a byte; 0 is the end of the stream. One thread at a time.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let timeout = *self.read_timeout.lock().unwrap_or_else(PoisonError::into_inner);
        let timer = timeout.map(Timer::new);
        loop {
            match self.receive([into, &mut []])? {
                Some(count) => return Ok(count),
                None => wait_a_while(&self.socket, Wait::Readable, timer.as_ref())?,
            }
        }
    }
}

impl Write for &Stream {
    /// Writes and sends everything; `TimedOut` where the peer takes nothing for ten seconds.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = 0;
        let mut timer = Timer::new(WRITE_TIMEOUT);
        loop {
            let count = self.try_write([&bytes[taken..], &[]])?;
            taken += count;
            if taken == bytes.len() && Stream::flush(self)? {
                return Ok(taken);
            }
            if count > 0 {
                timer = Timer::new(WRITE_TIMEOUT);
            }
            wait_a_while(&self.socket, Wait::Writable, Some(&timer))?;
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write(&[]).map(drop)
    }
}

/// `None` where the call would have had to wait.
fn without_waiting(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
}

#[derive(Clone, Copy)]
enum Wait {
    Readable,
    Writable,
}

/// As [`wait`], within a limit that does not count time in which this process was stopped.
fn wait_a_while(socket: &TcpStream, what: Wait, timer: Option<&Timer>) -> io::Result<()> {
    match timer.map(Timer::left) {
        None => wait(socket, what, None),
        Some(left) if left.is_zero() => Err(io::ErrorKind::TimedOut.into()),
        Some(left) => wait(socket, what, Some(Instant::now() + left.min(SLICE))),
    }
}

/// Waits for the socket, perhaps in vain: the caller tries again and comes back. `TimedOut` when called
/// after the deadline.
fn wait(socket: &TcpStream, what: Wait, deadline: Option<Instant>) -> io::Result<()> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    if left.is_some_and(|left| left.is_zero()) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    #[cfg(unix)]
    {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let what = match what {
            Wait::Readable => PollFlags::IN,
            Wait::Writable => PollFlags::OUT,
        };
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(socket, what)], left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(unix))]
    {
        let (_, _) = (socket, what);
        std::thread::sleep(left.unwrap_or(Duration::MAX).min(Duration::from_millis(1)));
        Ok(())
    }
}

/// Says what is likely wrong when a handshake fails.
fn explain(error: io::Error) -> io::Error {
    let kind = error.kind();
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match (tls, kind) {
        (Some(Error::InvalidCertificate(_) | Error::AlertReceived(_)), _) => io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the other side does not hold the job's secret (REGATTA_SECRET): {error}"),
        ),
        (Some(_), _) => io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the other side does not speak TLS as a rank of this job does: was it started without \
                 the job's secret (REGATTA_SECRET)? ({error})"
            ),
        ),
        (None, io::ErrorKind::TimedOut) => io::Error::new(
            kind,
            "no TLS handshake within the time allowed: the other side does not answer, or was started \
             without the job's secret (REGATTA_SECRET)",
        ),
        (None, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
            io::Error::new(
                kind,
                "the other side closed the connection during the TLS handshake: has it ended, or was it \
                 started without the job's secret (REGATTA_SECRET)?",
            )
        }
        (None, _) => error,
    }
}

#[cfg(test)]
mod tests;
