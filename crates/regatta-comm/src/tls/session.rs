//! The TLS state of one connection, and the socket calls that it needs.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use rustls::Error;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};

use super::{Wait, wait};

/// Ciphertext gathered before the socket is tried, in bytes: large enough that a system call costs
/// little per byte, small enough to be in the cache still when the kernel copies it.
const CHUNK: usize = 128 << 10;
/// The largest TLS record, in bytes of plaintext.
const RECORD: usize = 16 << 10;
/// Ciphertext asked of the socket at a time, in bytes: the first for a connection that carries little,
/// doubled up to the second while reads come back full.
const READ: [usize; 2] = [16 << 10, 256 << 10];
/// What the server says once it has accepted the client's key. A TLS 1.3 client is done before that.
const ACCEPTED: u8 = b'k';

/// Bytes between a producer and a consumer that each take what they can.
#[derive(Default)]
pub(super) struct Queue {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Queue {
    pub(super) fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// At least `least` bytes to write into; `self.end` moves by what is written.
    fn room(&mut self, least: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < least {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            self.bytes.resize(self.bytes.len().max(self.end + least), 0);
        }
        &mut self.bytes[self.end..]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }
}

pub(super) enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What to encrypt when the connection is ready for it.
#[derive(Clone, Copy)]
pub(super) enum Send<'a> {
    Nothing,
    Data(&'a [u8]),
    Close,
}

/// What one step of the connection came to.
enum Step {
    /// Something was done; there may be more to do.
    Again,
    /// The peer said that it sends no more.
    PeerClosed,
    /// No whole record is left, and what was to be sent is encrypted.
    Ready,
    /// Only bytes from the peer can lead on.
    Blocked,
}

/// The TLS state of one connection. rustls' unbuffered interface is used because it takes records from
/// large reads as they lie; its buffered one reads 4 KiB at a time.
pub(super) struct Tls {
    side: Side,
    incoming: Queue,
    pub(super) outgoing: Queue,
    /// Decrypted bytes that did not fit where they were wanted.
    plain: Queue,
    read_size: usize,
    /// No more is to be read: the peer said so, or this side gave up.
    pub(super) closed: bool,
    pub(super) failed: Option<Error>,
}

impl Tls {
    pub(super) fn new(side: Side) -> Tls {
        let [read_size, _] = READ;
        let (incoming, outgoing, plain) = Default::default();
        Tls { side, incoming, outgoing, plain, read_size, closed: false, failed: None }
    }

    fn is_handshaking(&self) -> bool {
        match &self.side {
            Side::Client(connection) => connection.is_handshaking(),
            Side::Server(connection) => connection.is_handshaking(),
        }
    }

    /// Whether rustls has something to encode.
    fn has_queued(&self) -> bool {
        match &self.side {
            Side::Client(connection) => connection.wants_write(),
            Side::Server(connection) => connection.wants_write(),
        }
    }

    /// One state of the connection; decrypted bytes go to `take`.
    fn step(&mut self, send: Send<'_>, take: &mut dyn FnMut(&mut Queue, &[u8])) -> Result<Step, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let step = self.advance(send, take);
        if let Err(error) = &step {
            self.failed = Some(error.clone());
            // The alert that tells the peer why is still to be encoded. What came in is not to be looked at again:
            // rustls would fail a second time, and takes that for a mistake of ours.
            while self.has_queued() && matches!(self.advance(Send::Nothing, take), Ok(Step::Again)) {}
        }
        step
    }

    fn advance(&mut self, send: Send<'_>, take: &mut dyn FnMut(&mut Queue, &[u8])) -> Result<Step, Error> {
        let mut take = |bytes: &[u8]| take(&mut self.plain, bytes);
        let incoming = self.incoming.filled();
        let (discard, step) = match &mut self.side {
            Side::Client(c) => handle(c.process_tls_records(incoming), &mut self.outgoing, send, &mut take),
            Side::Server(s) => handle(s.process_tls_records(incoming), &mut self.outgoing, send, &mut take),
        };
        self.incoming.consume(discard);
        self.closed |= matches!(step, Ok(Step::PeerClosed));
        step
    }

    /// Encrypts into `outgoing`. Records that have come in meanwhile are decrypted on the way.
    pub(super) fn seal(&mut self, send: Send<'_>) -> io::Result<()> {
        loop {
            match self.step(send, &mut Queue::push).map_err(broken)? {
                Step::Again | Step::PeerClosed => (),
                Step::Ready => return Ok(()),
                Step::Blocked => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }

    /// Encrypts the next chunk of the two slices, one after the other, and says how much that was.
    fn seal_chunk(&mut self, [first, second]: [&[u8]; 2]) -> io::Result<usize> {
        let room = RECORD.saturating_sub(first.len()).min(second.len());
        if !first.is_empty() && room > 0 {
            // A short header shares a record with what follows it: a record costs more than the copy.
            let record = [first, &second[..room]].concat();
            self.seal(Send::Data(&record))?;
            return Ok(record.len());
        }
        let chunk = if first.is_empty() { second } else { first };
        let chunk = &chunk[..chunk.len().min(CHUNK)];
        if chunk.is_empty() {
            return Ok(0);
        }
        self.seal(Send::Data(chunk))?;
        Ok(chunk.len())
    }

    /// Encrypts and sends until the socket is full; says how much plaintext was taken.
    pub(super) fn send(&mut self, socket: &TcpStream, parts: [&[u8]; 2]) -> io::Result<usize> {
        let mut taken = 0_usize;
        while self.flush(socket)? {
            let start = taken;
            while self.outgoing.len() < CHUNK {
                let [first, second] = parts;
                let skip = taken.saturating_sub(first.len());
                match self.seal_chunk([&first[taken.min(first.len())..], &second[skip..]])? {
                    0 => break,
                    count => taken += count,
                }
            }
            if taken == start {
                break;
            }
        }
        Ok(taken)
    }

    /// Sends buffered ciphertext as far as the socket takes it; true when nothing is left.
    pub(super) fn flush(&mut self, mut socket: &TcpStream) -> io::Result<bool> {
        while !self.outgoing.is_empty() {
            match socket.write(self.outgoing.filled()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.outgoing.consume(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Reads ciphertext once; true when nothing more is there now.
    fn fill(&mut self, mut socket: &TcpStream) -> io::Result<bool> {
        loop {
            let room = self.incoming.room(self.read_size);
            let asked = room.len();
            match socket.read(room) {
                // A clean end is announced under encryption. Without that, the stream was cut.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.incoming.end += count;
                    if count == asked {
                        self.read_size = (self.read_size * 2).min(READ[1]);
                    }
                    return Ok(count < asked);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `parts` with what has come in. An error does not undo what was filled before it.
    pub(super) fn receive(&mut self, socket: &TcpStream, parts: &mut Parts<'_>) -> io::Result<()> {
        let count = parts.put(self.plain.filled());
        self.plain.consume(count);
        let mut drained = false;
        while !parts.is_full() && !self.closed {
            let step = self.step(Send::Nothing, &mut |plain, bytes| {
                let count = parts.put(bytes);
                plain.push(&bytes[count..]);
            });
            match step.map_err(broken)? {
                Step::Again | Step::PeerClosed => (),
                Step::Ready | Step::Blocked if drained => break,
                Step::Ready | Step::Blocked => drained = self.fill(socket)?,
            }
        }
        Ok(())
    }

    /// Whether a read would yield something, or the end, without the socket.
    pub(super) fn has_plaintext(&mut self) -> bool {
        // A record has five bytes of header, the last two of them its length.
        let incoming = self.incoming.filled();
        let whole = matches!(incoming, [_, _, _, high, low, body @ ..]
            if body.len() >= usize::from(u16::from_be_bytes([*high, *low])));
        whole || !self.plain.is_empty() || self.closed
    }

    /// Asks for new keys in both directions, as rustls does by itself after 2^24 records.
    #[cfg(test)]
    pub(super) fn renew_keys(&mut self) {
        fn renew<Data>(status: UnbufferedStatus<'_, '_, Data>) -> usize {
            match status.state.unwrap() {
                ConnectionState::WriteTraffic(state) => state.refresh_traffic_keys().unwrap(),
                state => panic!("{state:?}"),
            }
            status.discard
        }
        let discard = match &mut self.side {
            Side::Client(connection) => renew(connection.process_tls_records(self.incoming.filled())),
            Side::Server(connection) => renew(connection.process_tls_records(self.incoming.filled())),
        };
        self.incoming.consume(discard);
    }

    /// The handshake, over when both sides know that the other accepts them.
    pub(super) fn shake_hands(&mut self, socket: &TcpStream, deadline: Instant) -> io::Result<()> {
        while self.is_handshaking() || !self.outgoing.is_empty() {
            match self.step(Send::Nothing, &mut Queue::push).map_err(broken)? {
                Step::Again => continue,
                Step::PeerClosed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Step::Ready | Step::Blocked => (),
            }
            if !self.flush(socket)? {
                wait(socket, Wait::Writable, Some(deadline))?;
            } else if self.is_handshaking() {
                wait(socket, Wait::Readable, Some(deadline))?;
                self.fill(socket)?;
            }
        }
        if matches!(self.side, Side::Server(_)) {
            self.seal(Send::Data(&[ACCEPTED]))?;
            while !self.flush(socket)? {
                wait(socket, Wait::Writable, Some(deadline))?;
            }
            return Ok(());
        }
        let mut said = [0];
        loop {
            let mut parts = Parts { parts: [&mut said, &mut []], filled: 0 };
            self.receive(socket, &mut parts)?;
            match (parts.filled, self.closed) {
                (0, true) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (0, false) => wait(socket, Wait::Readable, Some(deadline))?,
                _ if said == [ACCEPTED] => return Ok(()),
                _ => return Err(broken(Error::General("not the greeting of a rank".into()))),
            }
        }
    }
}

/// Handles one state of a client or server connection: the bytes used up of what came in, and the step.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Queue,
    send: Send<'_>,
    take: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut state)) => encode(outgoing, 0, |room| {
            state.encode(room).map_err(|error| match error {
                EncodeError::InsufficientSize(size) => Ok(size.required_size),
                EncodeError::AlreadyEncoded => Err(Error::General(error.to_string())),
            })
        })
        .map(|()| Step::Again),
        Ok(ConnectionState::TransmitTlsData(state)) => {
            // What was encoded is in `outgoing`, which is sent in order.
            state.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::ReadTraffic(mut state)) => loop {
            match state.next_record() {
                None => break Ok(Step::Again),
                Some(Err(error)) => break Err(error),
                Some(Ok(record)) => {
                    take(record.payload);
                    discard += record.discard;
                }
            }
        },
        Ok(ConnectionState::PeerClosed) => Ok(Step::PeerClosed),
        Ok(ConnectionState::WriteTraffic(mut state)) => {
            let least = match send {
                Send::Data(data) => data.len() + data.len() / 64 + 64,
                Send::Nothing | Send::Close => 0,
            };
            encode(outgoing, least, |room| {
                match send {
                    Send::Nothing => Ok(0),
                    Send::Data(data) => state.encrypt(data, room),
                    Send::Close => state.queue_close_notify(room),
                }
                .map_err(|error| match error {
                    EncryptError::InsufficientSize(size) => Ok(size.required_size),
                    EncryptError::EncryptExhausted => Err(Error::EncryptError),
                })
            })
            .map(|()| Step::Ready)
        }
        Ok(_) => Ok(Step::Blocked),
    };
    (discard, step)
}

/// Lets rustls write into the queue; `write` answers `Err(Ok(size))` where it needs that much room.
fn encode(
    outgoing: &mut Queue,
    mut least: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Result<usize, Error>>,
) -> Result<(), Error> {
    loop {
        match write(outgoing.room(least)) {
            Ok(count) => {
                outgoing.end += count;
                return Ok(());
            }
            Err(size) => least = size?,
        }
    }
}

pub(super) fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Two buffers filled one after the other.
pub(super) struct Parts<'a> {
    pub(super) parts: [&'a mut [u8]; 2],
    pub(super) filled: usize,
}

impl Parts<'_> {
    fn is_full(&self) -> bool {
        self.filled == self.parts[0].len() + self.parts[1].len()
    }

    /// Copies as much as fits and says how much that was.
    fn put(&mut self, bytes: &[u8]) -> usize {
        let [first, second] = &mut self.parts;
        let split = first.len();
        let rest_of_first = &mut first[self.filled.min(split)..];
        let (head, tail) = bytes.split_at(rest_of_first.len().min(bytes.len()));
        rest_of_first[..head.len()].copy_from_slice(head);
        self.filled += head.len();
        let rest_of_second = &mut second[self.filled.saturating_sub(split)..];
        let tail = &tail[..rest_of_second.len().min(tail.len())];
        rest_of_second[..tail.len()].copy_from_slice(tail);
        self.filled += tail.len();
        head.len() + tail.len()
    }
}
