//! Ranks as processes anywhere: TCP connections between each pair, encrypted where others could listen.
//!
//! **Connections belong to the job.** Two ranks have one connection (or `tcp_streams` of them), made when they first
//! talk and shared by all groups that hold both. What goes over it are frames of one group each: [`frame`]. Every group
//! sees a stream of bytes of its own, as if the connection were its own: [`connection`], [`receiving`]. Where a pair has
//! several connections, a group's bytes take turns on them, and each connection knows nothing of the others.
//!
//! **A slow group holds no other up.** A group has at most [`frame::WINDOW`] bytes on its way to a peer that the peer's
//! group has not consumed. So whoever reads a connection can always take everything from it: what is for another group
//! goes to that group's inbox, which never holds more than the window.
//!
//! **Nobody waits for ever, and nobody spins.** There is no thread that reads for all: each thread that waits in a
//! group polls the connections that it needs, and its [`waker`]. A thread waits for one of these:
//!
//! - *Bytes of its group.* They come over the socket, which it polls, or another thread has read them. Under the lock
//!   of the receiving half a thread that finds nothing marks its inbox as watched before it sleeps, and whoever puts
//!   something there, or leaves something unread that no poll would show (in TLS, or read ahead), wakes those that
//!   watch. Both are under one lock, so one of the two sees the other.
//! - *Room in the socket.* It polls for that.
//! - *The end of another group's frame.* Under the lock of the sending half it puts its waker down, and the owner of the
//!   frame wakes all of these when it has given the last byte. The owner has a thread in an operation that polls for
//!   room until then; if the operation fails, the job ends, and if the group is dropped, the connection breaks.
//! - *Credit.* It reads, as a receiver does, whatever comes, and polls the socket; where another thread has read the
//!   credit, that thread wakes it. A receiver owes credit where its own sending half is taken: the owner of the frame
//!   under way sends it behind the frame. Where the socket is full, every thread of the rank that waits polls for room
//!   there as long as something is owed.
//! - *A connection.* Whoever makes one, or fails to, wakes all groups of the rank.
//!
//! A waker that is set between a thread's last look and its sleep ends the sleep at once, see there. A thread that looks
//! for its peers before it sleeps reads its waker's state, and polls the connections only.
//!
//! **A small message costs one write and one read**, as over a connection of its own: whoever reads takes the next frame
//! for its own, and has it put where its group wants it. What turns out to be another group's is moved.
//!
//! So no circle of waiting threads can come from sharing: a frame under way ends when its peer reads, and the peer's
//! threads read that connection whenever they need anything of it - bytes, credit - no matter for which group.

mod connection;
mod connections;
mod frame;
mod greeting;
mod line;
mod linger;
mod receiving;
#[cfg(test)]
mod tests;
mod waker;

pub(crate) use connections::{Connections, Settings};
pub(crate) use greeting::{Contact, Listening};
#[cfg(fuzzing)]
pub(crate) use greeting::{GREETING, recognise};

use super::lateness::{DEEP_OPERATIONS, Lateness};
use super::patience::Patience;
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::member::context::Context;
use crate::open_files;
use connection::{Blocked, Connection};
use connections::Pair;
use greeting::SHALLOW_BUFFER;
use line::{Line, Link};
use receiving::Channel;
#[cfg(unix)]
use rustix::event::{PollFd, PollFlags, Timespec, poll};
#[cfg(unix)]
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use waker::Waker;

/// The endpoint of one process in one group.
pub(crate) struct TcpTransport {
    connections: Arc<Connections>,
    /// The group.
    id: u64,
    /// The generation of the job that it belongs to.
    generation: u64,
    waker: Arc<Waker>,
    /// To each rank of the group.
    links: Vec<Link>,
    names: Arc<[usize]>,
    /// What is sent may leave later: it is encrypted, or lent.
    deferring: bool,
    encrypted: bool,
    lends: bool,
    /// The last bytes of something may not have left.
    unfinished: bool,
    /// Memory may be lent in the present operation.
    lending: bool,
    /// How long to look before sleeping.
    patience: Patience,
    lateness: Lateness,
    /// Operations to come with deep buffers within this host.
    deep: u32,
}

impl TcpTransport {
    /// The endpoint of a group that talks with `peers` over TCP. Nobody need be connected yet.
    pub(crate) fn new(
        connections: &Arc<Connections>,
        id: u64,
        context: &Context,
        peers: &[usize],
    ) -> Result<Self> {
        let waker = Arc::new(Waker::new().map_err(Error::system("make a group's signal"))?);
        let others: Vec<usize> = peers.iter().map(|&peer| context.names[peer]).collect();
        let missing = connections.enter(&waker, &others)?;
        open_files::prepare(missing * connections.streams + 1, missing)?;
        Ok(Self {
            connections: connections.clone(),
            id,
            generation: context.generation,
            waker,
            links: (0..context.size).map(|_| Link::default()).collect(),
            names: context.names.clone(),
            deferring: false,
            encrypted: false,
            lends: false,
            unfinished: false,
            lending: false,
            patience: Patience::new(context.size),
            lateness: Lateness::new(context.size),
            deep: 0,
        })
    }

    /// Makes connections within this host buffer little, which stays in the cache, or much, so that a rank gets far
    /// before it needs its peer on a processor.
    #[cfg(target_os = "linux")]
    fn set_depth(&mut self, deep: bool) {
        for line in self.links.iter().flat_map(|link| &link.lines) {
            let stream = &line.connection.stream;
            if stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback()) {
                greeting::set_send_buffer(stream, deep);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn set_depth(&mut self, _: bool) {}

    /// The link to a peer; none where the pair is not connected yet.
    fn link(&mut self, peer: usize) -> Result<Option<&mut Link>> {
        if self.links[peer].lines.is_empty() {
            if self.names[peer] == self.connections.rank {
                return Err(Error::Usage(format!("there is no connection to rank {peer} of the group")));
            }
            let Some(pair) = self.connections.get(self.names[peer])? else { return Ok(None) };
            self.attach(peer, &pair);
        }
        Ok(Some(&mut self.links[peer]))
    }

    /// The group takes part in the connections to a peer.
    fn attach(&mut self, peer: usize, pair: &Pair) {
        for connection in pair.iter() {
            let channel = Arc::new(Channel::new(self.id, self.generation, self.waker.clone()));
            let inbox = connection.join(&channel);
            self.encrypted |= connection.stream.is_encrypted();
            #[cfg(target_os = "linux")]
            {
                self.lends |= connection.lends();
            }
            self.links[peer].lines.push(Line { connection: connection.clone(), channel, inbox, lent: None });
        }
        self.deferring = self.encrypted || self.lends;
    }

    fn gone(&self, peer: usize) -> Error {
        Error::PeerDied { rank: self.names[peer], call: String::new() }
    }

    /// Whether what a wait for these waits for has come without a wait. If not, this group is told when it comes.
    fn watch(&self, to: &[usize], from: &[usize]) -> bool {
        let mut ready = false;
        for line in from.iter().filter_map(|&peer| self.links[peer].receiving()) {
            ready |= line.connection.watch(line.inbox, true);
        }
        for (peer, link) in to.iter().map(|&peer| (peer, &self.links[peer])) {
            if link.blocked == Some(Blocked::Credit)
                && let Some(line) = link.sending()
            {
                // The credit may be there already, behind what others have sent. Where this group receives over the same
                // connection, it finds the credit itself, and its data need not go through an inbox. A failure shows at
                // the next send.
                let receives = from.contains(&peer)
                    && link.receiving().is_some_and(|other| Arc::ptr_eq(&other.connection, &line.connection));
                if !receives {
                    let _ = line.connection.pump();
                }
                ready |= line.connection.watch(line.inbox, false);
            }
        }
        ready
    }

    /// Gets on with what is owed to peers; the connections that still owe something.
    fn repay(&self) -> Vec<Arc<Connection>> {
        if self.connections.owing.load(Ordering::Acquire) == 0 {
            return vec![];
        }
        let mut owing = self.connections.all();
        // One that is broken owes nothing.
        owing.retain(|connection| connection.owes() && !connection.flush().unwrap_or(true));
        owing
    }

    /// What shows whether an operation with one of the peers can go on, as far as the sockets know.
    #[cfg(unix)]
    fn sockets<'a>(&'a self, to: &[usize], from: &[usize], owing: &'a [Arc<Connection>]) -> Vec<PollFd<'a>> {
        // One more, for the waker.
        let mut fds = Vec::with_capacity(to.len() + from.len() + owing.len() + 1);
        for line in from.iter().filter_map(|&peer| self.links[peer].receiving()) {
            fds.push(PollFd::new(&line.connection.stream, PollFlags::IN));
        }
        for link in to.iter().map(|&peer| &self.links[peer]) {
            let flags = match link.blocked {
                Some(Blocked::Turn) => continue,
                Some(Blocked::Credit) => PollFlags::IN,
                Some(Blocked::Full) | None => PollFlags::OUT,
            };
            if let Some(line) = link.sending() {
                fds.push(PollFd::new(&line.connection.stream, flags));
            }
        }
        if self.encrypted {
            for line in self.links.iter().flat_map(|link| &link.lines) {
                if line.connection.stream.wants_write() {
                    fds.push(PollFd::new(&line.connection.stream, PollFlags::OUT));
                }
            }
        }
        for connection in owing {
            fds.push(PollFd::new(&connection.stream, PollFlags::OUT));
        }
        fds
    }

    /// Whether one of the peers may be ready.
    pub(super) fn is_ready(&mut self, to: &[usize], from: &[usize]) -> Result<bool> {
        if self.watch(to, from) || self.waker.is_notified() {
            return Ok(true);
        }
        #[cfg(unix)]
        return Ok(looks_ready(&mut self.sockets(to, from, &[])));
        #[cfg(not(unix))]
        return Ok(!to.is_empty());
    }

    /// Sleeps until one of the peers may be ready, at most `timeout`; looks first where `patient`.
    pub(super) fn sleep(
        &mut self,
        to: &[usize],
        from: &[usize],
        timeout: Duration,
        patient: bool,
    ) -> Result<()> {
        if self.deferring || self.unfinished {
            self.unsent()?;
        }
        let owing = self.repay();
        if self.watch(to, from) {
            return Ok(());
        }
        self.sleep_on(to, from, &owing, timeout, patient)
    }

    #[cfg(unix)]
    fn sleep_on(
        &self,
        to: &[usize],
        from: &[usize],
        owing: &[Arc<Connection>],
        timeout: Duration,
        patient: bool,
    ) -> Result<()> {
        let mut fds = self.sockets(to, from, owing);
        let ready = || self.waker.is_notified() || looks_ready(&mut fds);
        if patient && self.patience.look(ready) || !self.waker.doze() {
            return Ok(());
        }
        fds.push(PollFd::from_borrowed_fd(self.waker.fd(), PollFlags::IN));
        let timeout =
            Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
        let outcome = poll(&mut fds, Some(&timeout));
        self.waker.rise();
        match outcome {
            // Ready, timed out or interrupted: the caller tries again in any case.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(Error::system("wait for a connection")(error)),
        }
    }

    #[cfg(not(unix))]
    fn sleep_on(
        &self,
        _: &[usize],
        _: &[usize],
        _: &[Arc<Connection>],
        timeout: Duration,
        _: bool,
    ) -> Result<()> {
        // No portable way to wait for several sockets in std: look again soon.
        if self.waker.doze() {
            std::thread::sleep(timeout.min(Duration::from_micros(50)));
            self.waker.rise();
        }
        Ok(())
    }
}

/// Whether one of the sockets is ready now. Errors show again in the poll that sleeps.
#[cfg(unix)]
fn looks_ready(fds: &mut [PollFd<'_>]) -> bool {
    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(fds, Some(&NOW)).is_ok_and(|ready| ready > 0)
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        let gone = self.gone(to);
        let lending = self.lending;
        let Some(link) = self.link(to)? else {
            // Whoever makes the connection tells.
            self.links[to].blocked = Some(Blocked::Turn);
            return Ok(0);
        };
        let mut parts = parts;
        let mut taken = 0;
        let mut full = false;
        link.blocked = None;
        while parts.iter().any(|part| !part.is_empty()) {
            let (index, left) = link.turn(link.sent);
            let first = parts[0].len().min(left);
            let second = parts[1].len().min(left - first);
            let now = [&parts[0][..first], &parts[1][..second]];
            let line = &mut link.lines[index];
            let sent = line.connection.send(&line.channel, now, lending).map_err(|_| gone.clone())?;
            line.lent = sent.lent.or(line.lent);
            link.sent += sent.taken as u64;
            taken += sent.taken;
            full |= sent.blocked == Some(Blocked::Full);
            let of_first = sent.taken.min(first);
            parts = [&parts[0][of_first..], &parts[1][sent.taken - of_first..]];
            if sent.taken < first + second {
                link.blocked = sent.blocked;
                break;
            }
        }
        self.unfinished |= full;
        Ok(taken)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let gone = self.gone(from);
        let id = self.id;
        let Some(link) = self.link(from)? else { return Ok(0) };
        let [mut one, mut two] = parts;
        let mut got = 0;
        while !one.is_empty() || !two.is_empty() {
            let (index, left) = link.turn(link.received);
            let first = one.len().min(left);
            let second = two.len().min(left - first);
            let now = [&mut one[..first], &mut two[..second]];
            let line = &link.lines[index];
            let count = match line.connection.receive(id, line.inbox, now) {
                Ok(count) => count,
                // What has come is the caller's; the error comes again.
                Err(_) if got > 0 => break,
                Err(_) => return Err(gone),
            };
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
        if !self.deferring && !self.unfinished {
            return Ok(None);
        }
        let mut unsent = None;
        for peer in 0..self.links.len() {
            let gone = self.gone(peer);
            for line in &mut self.links[peer].lines {
                if line.unsent().map_err(|_| gone.clone())? {
                    unsent = Some(peer);
                }
            }
        }
        self.unfinished = unsent.is_some();
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
            self.deep = DEEP_OPERATIONS;
            self.set_depth(true);
        }
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience.set(patience);
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        for peer in 0..self.links.len() {
            // Those that it has not talked with may wait for it, too.
            if self.links[peer].lines.is_empty()
                && let Some(pair) = self.connections.connected(self.names[peer])
            {
                self.attach(peer, &pair);
            }
            for line in &self.links[peer].lines {
                line.connection.leave(self.id, line.inbox);
            }
        }
    }
}
