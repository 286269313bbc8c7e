//! One connection to a peer, which all groups of the two ranks share.

use super::frame::{CLOSE, CREDIT, DATA, Header, LONGEST};
use super::receiving::{Channel, Receiving, Target};
use super::waker::Waker;
use crate::tls::Stream;
#[cfg(target_os = "linux")]
use crate::transport::zero_copy::ZeroCopy;
use std::io::{self, ErrorKind};
#[cfg(target_os = "linux")]
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A first part of a message that is copied behind the header of its frame, in bytes.
const SHORT: usize = 128;

/// Why a send does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blocked {
    /// The socket takes no more.
    Full,
    /// Another group has begun a frame.
    Turn,
    /// The peer has not consumed what was sent.
    Credit,
}

/// What came of a send.
pub(super) struct Sent {
    pub taken: usize,
    pub blocked: Option<Blocked>,
    /// Memory was lent, until [`Connection::is_back`] with this number.
    pub lent: Option<u32>,
}

/// One connection.
pub(super) struct Connection {
    pub stream: Stream,
    sending: Mutex<Sending>,
    receiving: Mutex<Receiving>,
    /// Something is to be sent that belongs to no frame under way.
    owes: AtomicBool,
    /// Connections of the rank that owe something.
    owing: Arc<AtomicUsize>,
}

/// The sending half.
#[derive(Default)]
struct Sending {
    /// Headers, and short parts of messages, that go before anything else.
    pending: Vec<u8>,
    at: usize,
    /// The group whose frame is under way, and bytes that it has yet to give.
    owner: Option<u64>,
    left: usize,
    /// What goes after that frame.
    control: Vec<u8>,
    /// Those who wait for the end of that frame.
    turn: Vec<Arc<Waker>>,
    /// Groups of earlier generations of the job begin no frame.
    generation: u64,
    broken: bool,
    /// Where the kernel can send without a copy.
    #[cfg(target_os = "linux")]
    zero: Option<ZeroCopy>,
}

impl Sending {
    fn pending(&self) -> &[u8] {
        &self.pending[self.at..]
    }

    /// Writes what is pending, and `bytes` after it; how many of these were taken, and whether all was.
    fn write(&mut self, stream: &Stream, bytes: &[u8]) -> io::Result<(usize, bool)> {
        let pending = self.pending();
        let wanted = pending.len() + bytes.len();
        if wanted == 0 {
            return Ok((0, true));
        }
        let outcome = match pending.is_empty() {
            true => stream.try_write([bytes, &[]]),
            false => stream.try_write([pending, bytes]),
        };
        let count = outcome.inspect_err(|_| self.broken = true)?;
        let of_pending = count.min(wanted - bytes.len());
        self.at += of_pending;
        if self.at == self.pending.len() {
            self.at = 0;
            self.pending.clear();
        }
        Ok((count - of_pending, count == wanted))
    }

    /// The frame under way is complete: others may go on.
    fn end(&mut self) {
        self.owner = None;
        self.pending.append(&mut self.control);
        self.turn.drain(..).for_each(|waker| waker.wake());
    }
}

impl Connection {
    /// For groups of `generation` and later ones.
    pub(super) fn new(stream: Stream, owing: Arc<AtomicUsize>, generation: u64) -> Self {
        #[cfg(target_os = "linux")]
        let sending = {
            let far = stream.peer_addr().is_ok_and(|peer| !peer.ip().is_loopback());
            let zero = (!stream.is_encrypted() && far).then(|| ZeroCopy::new(stream.as_fd())).flatten();
            Sending { generation, zero, ..Sending::default() }
        };
        #[cfg(not(target_os = "linux"))]
        let sending = Sending { generation, ..Sending::default() };
        let (sending, receiving) = (Mutex::new(sending), Mutex::default());
        Self { stream, sending, receiving, owes: AtomicBool::new(false), owing }
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receiving(&self) -> MutexGuard<'_, Receiving> {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether memory may be lent to it.
    #[cfg(target_os = "linux")]
    pub(super) fn lends(&self) -> bool {
        self.sending().zero.is_some()
    }

    /// From here on only groups of this generation and later ones begin frames.
    pub(super) fn begin(&self, generation: u64) {
        self.sending().generation = generation;
    }

    /// Whether all frames that have begun are complete, and more can follow.
    pub(super) fn is_whole(&self) -> bool {
        let sending = self.sending();
        !sending.broken && sending.owner.is_none() && !self.receiving().is_broken()
    }

    /// A group takes part; the number of its inbox.
    pub(super) fn join(&self, channel: &Arc<Channel>) -> usize {
        self.receiving().join(channel)
    }

    /// A group takes part no longer.
    pub(super) fn leave(&self, group: u64, inbox: usize) {
        self.receiving().leave(inbox);
        let mut half = self.sending();
        if half.owner == Some(group) {
            // Its frame will never be complete, so nothing can follow it.
            half.broken = true;
            half.turn.drain(..).for_each(|waker| waker.wake());
            self.stream.stop_sending();
            return;
        }
        self.tell(half, Header { group, len: 0, kind: CLOSE });
    }

    /// Sends a header without bytes as soon as it goes.
    fn tell(&self, mut half: MutexGuard<'_, Sending>, header: Header) {
        if half.owner.is_some() {
            half.control.extend(header.bytes());
            return;
        }
        half.pending.extend(header.bytes());
        // Whoever receives can go on without; whoever sends will see it.
        let _ = half.write(&self.stream, &[]);
        self.settle(&half);
    }

    /// Keeps count of what is owed.
    fn settle(&self, half: &Sending) {
        let owes = half.owner.is_none() && !half.pending().is_empty() && !half.broken;
        if self.owes.load(Ordering::Relaxed) != owes {
            self.owes.store(owes, Ordering::Relaxed);
            match owes {
                true => self.owing.fetch_add(1, Ordering::AcqRel),
                false => self.owing.fetch_sub(1, Ordering::AcqRel),
            };
        }
    }

    pub(super) fn owes(&self) -> bool {
        self.owes.load(Ordering::Relaxed)
    }

    /// Sends as many bytes of `parts` as go without waiting.
    pub(super) fn send(&self, channel: &Channel, parts: [&[u8]; 2], lending: bool) -> io::Result<Sent> {
        let mut half = self.sending();
        let outcome = self.send_by(&mut half, channel, parts, lending);
        self.settle(&half);
        outcome
    }

    fn send_by(
        &self,
        half: &mut Sending,
        channel: &Channel,
        parts: [&[u8]; 2],
        lending: bool,
    ) -> io::Result<Sent> {
        let total = parts[0].len() + parts[1].len();
        let mut sent = Sent { taken: 0, blocked: None, lent: None };
        loop {
            if half.broken || channel.closed.load(Ordering::Acquire) {
                return Err(ErrorKind::BrokenPipe.into());
            }
            if half.owner.is_some_and(|owner| owner != channel.id) {
                if !half.turn.iter().any(|waker| Arc::ptr_eq(waker, &channel.waker)) {
                    half.turn.push(channel.waker.clone());
                }
                sent.blocked = Some(Blocked::Turn);
                return Ok(sent);
            }
            if half.owner.is_none() {
                if channel.generation < half.generation {
                    return Err(ErrorKind::BrokenPipe.into());
                }
                if sent.taken == total {
                    // What others have left for the end of a frame.
                    half.write(&self.stream, &[])?;
                    return Ok(sent);
                }
                let credit = channel.credit.load(Ordering::Acquire);
                let len = (total - sent.taken).min(credit).min(LONGEST);
                if len == 0 {
                    sent.blocked = Some(Blocked::Credit);
                    return Ok(sent);
                }
                channel.credit.fetch_sub(len, Ordering::AcqRel);
                half.pending.extend(Header { group: channel.id, len: len as u32, kind: DATA }.bytes());
                (half.owner, half.left) = (Some(channel.id), len);
                let short = parts[0].get(sent.taken..).unwrap_or_default();
                if short.len() <= SHORT.min(len) {
                    half.pending.extend(short);
                    half.left -= short.len();
                    sent.taken += short.len();
                }
            }
            let [one, two] = parts;
            let rest =
                if sent.taken < one.len() { &one[sent.taken..] } else { &two[sent.taken - one.len()..] };
            let rest = &rest[..rest.len().min(half.left)];
            let (count, all) = self.write(half, rest, lending, &mut sent.lent)?;
            sent.taken += count;
            half.left -= count;
            if half.left == 0 {
                half.end();
            }
            if !all {
                sent.blocked = Some(Blocked::Full);
                return Ok(sent);
            }
            if half.left > 0 && sent.taken == total {
                return Ok(sent);
            }
        }
    }

    /// Writes what is pending, and then `bytes`, which may be lent.
    fn write(
        &self,
        half: &mut Sending,
        bytes: &[u8],
        lending: bool,
        lent: &mut Option<u32>,
    ) -> io::Result<(usize, bool)> {
        #[cfg(target_os = "linux")]
        if lending && half.zero.as_ref().is_some_and(|zero| zero.is_for(bytes.len())) {
            // What is pending does not stay where it is.
            if !half.write(&self.stream, &[])?.1 {
                return Ok((0, false));
            }
            if let Some(zero) = &mut half.zero {
                let outcome = zero.send(self.stream.as_fd(), [bytes, &[]]);
                *lent = Some(zero.mark());
                let count = outcome.inspect_err(|_| half.broken = true)?;
                return Ok((count, count == bytes.len()));
            }
        }
        let _ = (lending, lent);
        half.write(&self.stream, bytes)
    }

    /// Sends what is pending; whether everything has left that a group has given and that is of no frame under way.
    pub(super) fn flush(&self) -> io::Result<bool> {
        let mut half = self.sending();
        let of_frame = half.owner.is_some();
        if !of_frame && !half.broken {
            let outcome = half.write(&self.stream, &[]);
            self.settle(&half);
            outcome?;
        }
        let flushed = self.stream.flush()?;
        Ok(flushed && (of_frame || half.pending().is_empty()))
    }

    /// Whether memory that was lent is no longer.
    #[cfg(target_os = "linux")]
    pub(super) fn is_back(&self, mark: u32) -> io::Result<bool> {
        let mut half = self.sending();
        let Some(zero) = &mut half.zero else { return Ok(true) };
        if zero.is_out() {
            zero.reap(self.stream.as_fd())?;
        }
        Ok(zero.is_back(mark))
    }

    /// Receives as many bytes of the group with this inbox as are there.
    pub(super) fn receive(&self, group: u64, inbox: usize, parts: [&mut [u8]; 2]) -> io::Result<usize> {
        let mut target = Target::new(parts);
        let due = {
            let mut half = self.receiving();
            half.receive(&self.stream, inbox, &mut target)?;
            half.due(inbox)
        };
        if let Some(len) = due {
            self.tell(self.sending(), Header { group, len: len as u32, kind: CREDIT });
        }
        Ok(target.filled)
    }

    /// Reads what is there, for whatever group it is.
    pub(super) fn pump(&self) -> io::Result<()> {
        self.receiving().pump(&self.stream)
    }

    /// Whether the group can go on without a wait; else it is woken when it can, where no poll shows it.
    pub(super) fn watch(&self, inbox: usize, receives: bool) -> bool {
        self.receiving().watch(&self.stream, inbox, receives)
    }

    /// Bytes that have come and nobody has consumed.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.receiving().held()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if *self.owes.get_mut() {
            self.owing.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
