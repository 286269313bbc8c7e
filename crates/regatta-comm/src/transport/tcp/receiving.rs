//! The receiving half of a connection: takes frames apart, and puts what is for other groups into their inboxes.

use super::frame::{CLOSE, CREDIT, DATA, HEADER, Header, RETURN, WINDOW};
use super::waker::Waker;
use crate::tls::Stream;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes that are read where it is not known yet what comes: a small message and its header in one call of the system.
const AHEAD: usize = 20 << 10;
/// The longest message that is read like this. For a longer one a second call costs less than a copy: the header is
/// read alone, and the rest goes straight into the caller's memory.
const SMALL: usize = 18 << 10;
/// Bytes that are read for another group at a time.
const FOREIGN: usize = 64 << 10;
/// An inbox that has grown longer is given back to the system once it is empty.
const KEPT: usize = 64 << 10;

/// One group's part of a connection, as its own thread and the reader of the connection know it.
#[derive(Debug)]
pub(super) struct Channel {
    /// The group.
    pub id: u64,
    /// The generation of the job that the group belongs to.
    pub generation: u64,
    pub waker: Arc<Waker>,
    /// Bytes that may be sent before the peer has consumed more.
    pub credit: AtomicUsize,
    /// The peer has left the group.
    pub closed: AtomicBool,
}

impl Channel {
    pub(super) fn new(id: u64, generation: u64, waker: Arc<Waker>) -> Self {
        let (credit, closed) = (AtomicUsize::new(WINDOW), AtomicBool::new(false));
        Self { id, generation, waker, credit, closed }
    }
}

/// What has come for one group and waits for its thread; at most [`WINDOW`] bytes.
#[derive(Default)]
struct Inbox {
    id: u64,
    bytes: Vec<u8>,
    start: usize,
    /// Bytes consumed since the peer was told.
    consumed: usize,
    /// None before the group is made here, and after it has gone.
    channel: Option<Arc<Channel>>,
    /// The thread sleeps, or is about to, and has seen that nothing is there.
    watched: bool,
    /// The peer has left the group.
    closed: bool,
    /// The group has gone here: what still comes is for nobody.
    gone: bool,
}

impl Inbox {
    fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Room for `count` more bytes at the end.
    fn make_room(&mut self, count: usize) {
        if self.start > 0 && self.bytes.len() + count > self.bytes.capacity() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// Moves what is there into `target`.
    fn take(&mut self, target: &mut Target<'_>) {
        let count = target.put(&self.bytes[self.start..]);
        self.start += count;
        self.consumed += count;
        if self.len() == 0 {
            self.start = 0;
            self.bytes.clear();
            if self.bytes.capacity() > KEPT {
                self.bytes = Vec::new();
            }
        }
    }

    /// Wakes the thread where it waits for this.
    fn tell(&mut self) {
        if std::mem::take(&mut self.watched)
            && let Some(channel) = &self.channel
        {
            channel.waker.wake();
        }
    }
}

/// Memory of the caller, in two parts.
pub(super) struct Target<'a> {
    parts: [&'a mut [u8]; 2],
    pub filled: usize,
}

impl<'a> Target<'a> {
    pub(super) fn new(parts: [&'a mut [u8]; 2]) -> Self {
        Self { parts, filled: 0 }
    }

    /// What is still to be filled, at most `most` bytes.
    fn rest(&mut self, most: usize) -> [&mut [u8]; 2] {
        let [one, two] = &mut self.parts;
        let first = self.filled.min(one.len());
        let second = self.filled - first;
        let one = &mut one[first..];
        let one_most = one.len().min(most);
        let two = &mut two[second..];
        let two_most = two.len().min(most - one_most);
        [&mut one[..one_most], &mut two[..two_most]]
    }

    fn missing(&self) -> usize {
        self.parts[0].len() + self.parts[1].len() - self.filled
    }

    fn is_full(&self) -> bool {
        self.missing() == 0
    }

    fn put(&mut self, bytes: &[u8]) -> usize {
        let [one, two] = self.rest(bytes.len());
        let (first, second) = (one.len(), two.len());
        one.copy_from_slice(&bytes[..first]);
        two.copy_from_slice(&bytes[first..first + second]);
        self.filled += first + second;
        first + second
    }
}

/// Everything that is known of what comes over the connection.
pub(super) struct Receiving {
    /// Bytes that have been read and belong to nobody yet.
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    /// The inbox that the frame under way is for, and bytes that it has left.
    frame: Option<(usize, usize)>,
    inboxes: Vec<Inbox>,
    /// The inbox of the last frame.
    last: usize,
    /// Nothing more will come.
    broken: Option<ErrorKind>,
}

impl Default for Receiving {
    fn default() -> Self {
        let ahead = vec![0; AHEAD].into_boxed_slice();
        Self { ahead, start: 0, end: 0, frame: None, inboxes: vec![], last: 0, broken: None }
    }
}

impl Receiving {
    /// The inbox of a group.
    fn inbox(&mut self, id: u64) -> usize {
        if self.inboxes.get(self.last).is_none_or(|inbox| inbox.id != id) {
            self.last = self.inboxes.iter().position(|inbox| inbox.id == id).unwrap_or_else(|| {
                self.inboxes.push(Inbox { id, ..Inbox::default() });
                self.inboxes.len() - 1
            });
        }
        self.last
    }

    /// From here on the group takes part.
    pub(super) fn join(&mut self, channel: &Arc<Channel>) -> usize {
        let index = self.inbox(channel.id);
        let inbox = &mut self.inboxes[index];
        inbox.channel = Some(channel.clone());
        channel.closed.store(inbox.closed, Ordering::Release);
        index
    }

    /// From here on the group takes part no longer.
    pub(super) fn leave(&mut self, index: usize) {
        let inbox = &mut self.inboxes[index];
        *inbox = Inbox { id: inbox.id, gone: true, closed: inbox.closed, ..Inbox::default() };
    }

    /// Whether nothing more will come.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Fills `target` with what has come for the group with the inbox `own`: at most one read that brings something.
    ///
    /// # Errors
    /// The connection broke, or the peer has left the group; what came before has been consumed.
    pub(super) fn receive(&mut self, stream: &Stream, own: usize, target: &mut Target<'_>) -> io::Result<()> {
        self.inboxes[own].watched = false;
        if self.inboxes[own].len() > 0 {
            self.inboxes[own].take(target);
        }
        let before = target.filled;
        if !target.is_full() {
            match self.advance(stream, own, target) {
                Err(error) if target.filled == 0 => return Err(error),
                _ => {}
            }
        }
        self.inboxes[own].consumed += target.filled - before;
        if target.filled == 0 && !target.is_full() && self.inboxes[own].closed {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads what is there, into inboxes.
    pub(super) fn pump(&mut self, stream: &Stream) -> io::Result<()> {
        self.advance(stream, usize::MAX, &mut Target::new([&mut [], &mut []]))
    }

    /// Credit that is to be returned for the inbox.
    pub(super) fn due(&mut self, own: usize) -> Option<usize> {
        let consumed = &mut self.inboxes[own].consumed;
        (*consumed >= RETURN).then(|| std::mem::take(consumed))
    }

    fn advance(&mut self, stream: &Stream, own: usize, target: &mut Target<'_>) -> io::Result<()> {
        let outcome = self.read(stream, own, target);
        if let Err(error) = &outcome
            && self.broken.replace(error.kind()).is_none()
        {
            self.inboxes.iter_mut().for_each(Inbox::tell);
        }
        if self.is_left(stream) {
            // A poll of the socket would not show it to the others.
            for (index, inbox) in self.inboxes.iter_mut().enumerate() {
                if index != own {
                    inbox.tell();
                }
            }
        }
        outcome
    }

    fn read(&mut self, stream: &Stream, own: usize, target: &mut Target<'_>) -> io::Result<()> {
        if let Some(kind) = self.broken {
            return Err(kind.into());
        }
        loop {
            let Some((index, left)) = self.frame else {
                if self.end - self.start >= HEADER {
                    self.begin()?;
                    continue;
                }
                if target.filled > 0 {
                    return Ok(());
                }
                self.ahead.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
                let most = if target.missing() > SMALL { HEADER } else { AHEAD };
                let count = stream.try_read([&mut self.ahead[self.end..most], &mut []])?;
                if count == 0 {
                    return Ok(());
                }
                self.end += count;
                continue;
            };
            let for_caller = index == own;
            if for_caller && target.is_full() {
                return Ok(());
            }
            if self.start < self.end {
                let part = &self.ahead[self.start..self.end.min(self.start + left)];
                let count = if for_caller { target.put(part) } else { part.len() };
                if !for_caller && !self.inboxes[index].gone {
                    let inbox = &mut self.inboxes[index];
                    inbox.make_room(part.len());
                    inbox.bytes.extend_from_slice(part);
                    inbox.tell();
                }
                self.start += count;
                self.took(index, left, count);
                continue;
            }
            if target.filled > 0 {
                return Ok(());
            }
            // The next header is read along.
            (self.start, self.end) = (0, 0);
            let next = &mut self.ahead[..HEADER];
            let (asked, count);
            if for_caller {
                let parts = target.rest(left);
                asked = parts[0].len() + parts[1].len();
                let with_next = parts[0].is_empty() && asked == left;
                let [one, two] = parts;
                count =
                    if with_next { stream.try_read([two, next])? } else { stream.try_read([one, two])? };
                target.filled += count.min(asked);
            } else {
                let inbox = &mut self.inboxes[index];
                asked = left.min(FOREIGN);
                inbox.make_room(asked);
                let before = inbox.bytes.len();
                inbox.bytes.resize(before + asked, 0);
                let next = if asked == left { next } else { &mut [] };
                let outcome = stream.try_read([&mut inbox.bytes[before..], next]);
                inbox.bytes.truncate(before + outcome.as_ref().map_or(0, |count| (*count).min(asked)));
                count = outcome?;
                if inbox.gone {
                    inbox.bytes.clear();
                } else if count > 0 {
                    inbox.tell();
                }
            }
            if count == 0 {
                return Ok(());
            }
            self.end = count.saturating_sub(asked);
            self.took(index, left, count.min(asked));
        }
    }

    fn took(&mut self, index: usize, left: usize, count: usize) {
        self.frame = (left > count).then_some((index, left - count));
    }

    /// Reads the header that lies ahead.
    fn begin(&mut self) -> io::Result<()> {
        let header = self.ahead[self.start..].first_chunk().ok_or(ErrorKind::InvalidData)?;
        let Header { group, len, kind } = Header::read(header);
        self.start += HEADER;
        let index = self.inbox(group);
        let inbox = &mut self.inboxes[index];
        match kind {
            // Whoever sends more than it may is no rank of ours.
            DATA if inbox.len() + len as usize > WINDOW => return Err(ErrorKind::InvalidData.into()),
            DATA => self.frame = (len > 0).then_some((index, len as usize)),
            CREDIT => {
                if let Some(channel) = &inbox.channel {
                    let credit = channel.credit.load(Ordering::Acquire);
                    if credit + len as usize > WINDOW {
                        return Err(ErrorKind::InvalidData.into());
                    }
                    channel.credit.fetch_add(len as usize, Ordering::AcqRel);
                    channel.waker.wake();
                }
            }
            CLOSE => {
                inbox.closed = true;
                if let Some(channel) = &inbox.channel {
                    channel.closed.store(true, Ordering::Release);
                    channel.waker.wake();
                }
            }
            _ => return Err(ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    /// Whether something has been read from the socket that has not gone on to its group.
    fn is_left(&self, stream: &Stream) -> bool {
        let least = if self.frame.is_some() { 1 } else { HEADER };
        self.broken.is_none()
            && (self.end - self.start >= least || stream.is_encrypted() && stream.has_plaintext())
    }

    /// Whether the group can go on without a wait; else it is woken when it can, as far as the socket does not show it.
    pub(super) fn watch(&mut self, stream: &Stream, own: usize, receives: bool) -> bool {
        let inbox = &self.inboxes[own];
        let ready =
            receives && (inbox.len() > 0 || inbox.closed) || self.broken.is_some() || self.is_left(stream);
        self.inboxes[own].watched = !ready;
        ready
    }

    /// Bytes in all inboxes.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.inboxes.iter().map(Inbox::len).sum()
    }
}
