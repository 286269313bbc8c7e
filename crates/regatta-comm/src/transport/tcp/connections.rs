//! The connections of a rank to the other ranks of its job: made when a pair first talks, and shared by all groups.
//!
//! Either rank of a pair may dial, as it may be the only one that talks. The one with the lower number gives the other a
//! moment first, and where both dial, the connections of the one with the higher number stay: a rank that dials refuses
//! those with lower numbers. So there is one dialler in the end, and the other side hears of it by its acceptor, a
//! thread of the rank.

use super::connection::Connection;
use super::greeting::{Contact, GREETING_TIME, Listening, answer, call, greeting, hear, is_cut};
use super::linger::linger;
use super::waker::Waker;
use crate::error::{Error, Result};
use crate::member::health::Health;
use crate::member::timer::Timer;
use crate::rendezvous::Security;
use crate::tls::{Identity, Stream};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long the rank with the lower number waits for the other to dial.
const GRACE: Duration = Duration::from_millis(20);
/// The pause between attempts to dial.
const AGAIN: Duration = Duration::from_millis(50);
/// Unknown clients that are heard at a time; more have to wait in the queue of the system.
const MOST_UNIDENTIFIED: usize = 64;

/// The connections to one peer.
pub(super) type Pair = Arc<[Arc<Connection>]>;

/// What it takes to make connections.
pub(crate) struct Settings {
    /// This rank in the job.
    pub rank: usize,
    /// How each rank is dialled, where that is known.
    pub contacts: Vec<Option<Contact>>,
    /// Why this rank cannot be dialled, where that is so.
    pub listening: Result<Listening>,
    pub security: Security,
    pub health: Arc<Health>,
    /// Connections for each pair.
    pub streams: usize,
    /// How long it may take to connect.
    pub join: Duration,
}

/// All connections of a rank.
pub(crate) struct Connections {
    pub(super) rank: usize,
    own: Result<Contact>,
    security: Security,
    pub(super) streams: usize,
    join: Duration,
    /// Until the first group needs it.
    listener: Mutex<Option<TcpListener>>,
    state: Mutex<State>,
    changed: Condvar,
    closing: AtomicBool,
    /// Connections that have something to send which belongs to no frame under way.
    pub(super) owing: Arc<AtomicUsize>,
}

struct State {
    /// For each rank of the job.
    slots: Vec<Slot>,
    /// Of the present generation.
    health: Arc<Health>,
    generation: u64,
    /// Of all groups.
    wakers: Vec<Weak<Waker>>,
    /// Unknown clients that are heard.
    hearing: usize,
}

#[derive(Default)]
struct Slot {
    /// How the rank is dialled, where that is known.
    contact: Option<Contact>,
    /// How often the connections have been given up, so that others may be made.
    epoch: u32,
    stage: Stage,
    /// What the peer has dialled so far.
    dialled: Vec<Option<Stream>>,
}

#[derive(Default)]
enum Stage {
    #[default]
    Idle,
    Dialling,
    /// The peer dials, too, and its connections are those that stay.
    Expecting,
    Connected(Pair),
    Failed(Error),
}

impl Connections {
    pub(crate) fn new(settings: Settings) -> Arc<Self> {
        let Settings { rank, contacts, listening, security, health, streams, join } = settings;
        let slot = |contact| Slot { contact, ..Slot::default() };
        let slots = contacts.into_iter().map(slot).collect();
        let (listener, own) = match listening {
            Ok(listening) => {
                let contact = listening.contact();
                (Some(listening.listener), Ok(contact))
            }
            Err(error) => (None, Err(error)),
        };
        Arc::new(Self {
            rank,
            own,
            security,
            streams,
            join,
            listener: Mutex::new(listener),
            state: Mutex::new(State { slots, health, generation: 0, wakers: vec![], hearing: 0 }),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
            owing: Arc::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A group begins, whose thread is woken by `waker` when a connection is there. Returns how many of `peers` are
    /// not connected yet.
    ///
    /// # Errors
    /// This rank cannot be dialled.
    pub(super) fn enter(self: &Arc<Self>, waker: &Arc<Waker>, peers: &[usize]) -> Result<usize> {
        let contact = self.own.clone()?;
        let identity = self.security.for_data(contact.address.ip())?;
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(listener) = listener {
            let this = self.clone();
            let expected = greeting(&contact.secret);
            std::thread::Builder::new()
                .name("regatta-accept".into())
                .spawn(move || this.accept(&listener, identity.as_ref(), &expected))
                .map_err(Error::system("start a thread"))?;
        }
        let mut state = self.lock();
        state.wakers.retain(|waker| waker.strong_count() > 0);
        state.wakers.push(Arc::downgrade(waker));
        let connected = |peer: &&usize| matches!(state.slots[**peer].stage, Stage::Connected(_));
        Ok(peers.len() - peers.iter().filter(connected).count())
    }

    /// The connections to a rank; none yet, where they are being made.
    ///
    /// # Errors
    /// They cannot be made.
    pub(super) fn get(self: &Arc<Self>, peer: usize) -> Result<Option<Pair>> {
        let mut state = self.lock();
        let slot = &mut state.slots[peer];
        match &slot.stage {
            Stage::Connected(pair) => return Ok(Some(pair.clone())),
            Stage::Failed(error) => return Err(error.clone()),
            Stage::Idle if slot.dialled.is_empty() => {}
            _ => return Ok(None),
        }
        slot.stage = Stage::Dialling;
        let (this, contact, epoch) = (self.clone(), slot.contact, slot.epoch);
        let (health, generation) = (state.health.clone(), state.generation);
        let dialling = std::thread::Builder::new().name("regatta-dial".into()).spawn(move || {
            let outcome = this.dial(peer, contact, epoch, &health);
            this.dialled(peer, (epoch, generation), outcome);
        });
        match dialling {
            Ok(_) => Ok(None),
            Err(error) => {
                state.slots[peer].stage = Stage::Idle;
                Err(Error::system("start a thread")(error))
            }
        }
    }

    /// The connections to a rank, where there are some.
    pub(super) fn connected(&self, peer: usize) -> Option<Pair> {
        match &self.lock().slots.get(peer)?.stage {
            Stage::Connected(pair) => Some(pair.clone()),
            _ => None,
        }
    }

    /// All connections that there are.
    pub(super) fn all(&self) -> Vec<Arc<Connection>> {
        let state = self.lock();
        let pair = |slot: &Slot| match &slot.stage {
            Stage::Connected(pair) => pair.to_vec(),
            _ => vec![],
        };
        state.slots.iter().flat_map(pair).collect()
    }

    /// The connections of this rank to `peer`; none where the peer's are those that stay.
    fn dial(
        &self,
        peer: usize,
        contact: Option<Contact>,
        epoch: u32,
        health: &Health,
    ) -> Result<Option<Vec<Stream>>> {
        let contact =
            contact.ok_or_else(|| Error::Rendezvous(format!("rank {peer} has published no address")))?;
        let identity = self.security.for_data(contact.address.ip())?;
        let first = self.rank < peer;
        if first && self.pause(peer, epoch, GRACE) {
            return Ok(None);
        }
        let timer = Timer::with_pauses(self.join, Duration::from_secs(12));
        let greeting = greeting(&contact.secret);
        loop {
            let one = |number| {
                call(contact.address, identity.as_ref(), &greeting, (self.rank, number), timer.left())
            };
            let error = match (0..self.streams).map(one).collect::<std::io::Result<Option<Vec<_>>>>() {
                Ok(streams) => return Ok(streams),
                Err(error) => error,
            };
            health.check()?;
            // A peer that was stopped, or does not get its turn, ends a handshake that takes too long. One that
            // cannot be reached may still reach this rank.
            if !timer.is_over() && (first || is_cut(&error)) && !health.has_left(peer) {
                if self.pause(peer, epoch, AGAIN) {
                    return Ok(None);
                }
                continue;
            }
            let unreached = Error::system(format!(
                "connect to rank {peer} at {} (set REGATTA_IFACE_ADDR to an address its host can be reached at)",
                contact.address
            ))(error);
            // The news of a peer that is gone comes soon.
            let verdict = health.verdict(unreached);
            return Err(match health.has_left(peer) {
                true => Error::PeerDied { rank: peer, call: String::new() },
                false => verdict,
            });
        }
    }

    /// Waits; whether this rank need not dial any longer.
    fn pause(&self, peer: usize, epoch: u32, time: Duration) -> bool {
        let over = |state: &mut State| {
            let slot = &state.slots[peer];
            self.closing.load(Ordering::Acquire)
                || slot.epoch != epoch
                || matches!(slot.stage, Stage::Connected(_) | Stage::Failed(_))
        };
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !over(state));
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        over(&mut state)
    }

    /// Takes note of what came of dialling.
    fn dialled(&self, peer: usize, (epoch, begun): (u32, u64), outcome: Result<Option<Vec<Stream>>>) {
        let mut state = self.lock();
        let generation = state.generation;
        let slot = &mut state.slots[peer];
        if slot.epoch == epoch && matches!(slot.stage, Stage::Dialling) {
            slot.stage = match outcome {
                Ok(Some(streams)) => Stage::Connected(self.pair(streams, generation)),
                Ok(None) => Stage::Expecting,
                // It was given up with its generation, perhaps: the present one tries again.
                Err(_) if begun < generation => Stage::Idle,
                Err(error) => Stage::Failed(error),
            };
            self.tell(&state);
        }
    }

    fn pair(&self, streams: Vec<Stream>, generation: u64) -> Pair {
        let one = |stream| Arc::new(Connection::new(stream, self.owing.clone(), generation));
        streams.into_iter().map(one).collect()
    }

    /// Wakes everyone who may wait for a connection.
    fn tell(&self, state: &State) {
        self.changed.notify_all();
        state.wakers.iter().filter_map(Weak::upgrade).for_each(|waker| waker.wake());
    }

    /// Hears those who dial this rank, each in a thread of its own, so that a silent client holds nobody up.
    fn accept(self: &Arc<Self>, listener: &TcpListener, identity: Option<&Identity>, expected: &[u8]) {
        loop {
            let accepted = listener.accept();
            if self.closing.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok((socket, _)) => self.hear(socket, identity.cloned(), expected.to_vec()),
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => return self.fail(&Error::system("accept a connection")(error)),
            }
        }
    }

    fn hear(self: &Arc<Self>, socket: TcpStream, identity: Option<Identity>, expected: Vec<u8>) {
        // Each is heard for a limited time, so a crowd of unknown clients cannot shut ranks out for long.
        let most = |state: &State| MOST_UNIDENTIFIED + state.slots.len() * self.streams;
        let crowded =
            |state: &mut State| state.hearing >= most(state) && !self.closing.load(Ordering::Acquire);
        let waited = self.changed.wait_while(self.lock(), crowded);
        waited.unwrap_or_else(PoisonError::into_inner).hearing += 1;
        let this = self.clone();
        let hearing = std::thread::Builder::new().spawn(move || {
            // An unknown client's connection ends here, without a word and without harm.
            if let Ok(Some((peer, number, stream))) = hear(socket, identity.as_ref(), &expected) {
                this.admit(peer, number, stream);
            }
            this.heard();
        });
        if hearing.is_err() {
            // A connection that no thread can be had for is dropped; its owner tries again.
            self.heard();
        }
    }

    fn heard(&self) {
        self.lock().hearing -= 1;
        self.changed.notify_all();
    }

    /// Takes a connection that a peer has dialled, where it is one that stays.
    fn admit(&self, peer: usize, number: usize, stream: Stream) {
        let mut state = self.lock();
        let generation = state.generation;
        let Some(slot) = state.slots.get_mut(peer).filter(|_| peer != self.rank && number < self.streams)
        else {
            return;
        };
        let welcome = match slot.stage {
            Stage::Idle | Stage::Expecting => true,
            Stage::Dialling => self.rank < peer,
            Stage::Connected(_) | Stage::Failed(_) => false,
        };
        // It has sent a greeting, so there is room for a byte.
        if answer(&stream, welcome).is_err() || !welcome {
            return;
        }
        slot.dialled.resize_with(self.streams, || None);
        slot.dialled[number] = Some(stream);
        if slot.dialled.iter().all(Option::is_some) {
            let streams = std::mem::take(&mut slot.dialled).into_iter().flatten().collect();
            slot.stage = Stage::Connected(self.pair(streams, generation));
            self.tell(&state);
        }
    }

    /// How this rank is dialled, where it can be.
    pub(crate) fn own(&self) -> Option<Contact> {
        self.own.as_ref().ok().copied()
    }

    /// The ranks to which there are connections that no other generation can use: broken, half made, or with a frame that
    /// will not be complete.
    pub(crate) fn broken(&self) -> Vec<usize> {
        let is_broken = |slot: &Slot| match &slot.stage {
            Stage::Connected(pair) => pair.iter().any(|connection| !connection.is_whole()),
            Stage::Idle => !slot.dialled.is_empty(),
            Stage::Dialling | Stage::Expecting | Stage::Failed(_) => true,
        };
        let state = self.lock();
        (0..state.slots.len()).filter(|&rank| is_broken(&state.slots[rank])).collect()
    }

    /// Groups of earlier generations begin no frame any more; a rank calls it before it looks for what is
    /// [`broken`](Self::broken).
    pub(crate) fn begin(&self, generation: u64, health: &Arc<Health>) {
        let mut state = self.lock();
        (state.generation, state.health) = (generation, health.clone());
        for slot in &state.slots {
            if let Stage::Connected(pair) = &slot.stage {
                pair.iter().for_each(|connection| connection.begin(generation));
            }
        }
    }

    /// Learns how a rank is dialled from now on. Where that is another process, or the connections are `broken`, others
    /// are made when the pair talks next.
    pub(crate) fn renew(&self, rank: usize, contact: Option<Contact>, broken: bool) {
        let mut state = self.lock();
        if state.slots.len() <= rank {
            state.slots.resize_with(rank + 1, Slot::default);
        }
        let slot = &mut state.slots[rank];
        if slot.contact != contact || broken {
            *slot = Slot { contact, epoch: slot.epoch + 1, ..Slot::default() };
            self.tell(&state);
        }
    }

    #[cfg(test)]
    pub(super) fn contact(&self, rank: usize) -> Contact {
        self.lock().slots[rank].contact.unwrap()
    }

    /// No more connections can be made.
    fn fail(&self, error: &Error) {
        let mut state = self.lock();
        for slot in &mut state.slots {
            if !matches!(slot.stage, Stage::Connected(_) | Stage::Failed(_)) {
                slot.stage = Stage::Failed(error.clone());
            }
        }
        self.tell(&state);
    }

    /// Ends all connections, once what was sent has left this host or `patience` is over.
    pub(crate) fn close(&self, patience: Duration) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        let ended = Error::Rendezvous("this rank has left the job".into());
        let mut ending = vec![];
        let mut state = self.lock();
        let health = state.health.clone();
        for (peer, slot) in state.slots.iter_mut().enumerate() {
            slot.dialled.clear();
            if let Stage::Connected(pair) = std::mem::replace(&mut slot.stage, Stage::Failed(ended.clone())) {
                ending.extend(pair.iter().map(|connection| (peer, connection.clone())));
            }
        }
        self.tell(&state);
        drop(state);
        if let (Ok(contact), true) =
            (&self.own, self.listener.lock().unwrap_or_else(PoisonError::into_inner).is_none())
        {
            // Wakes the acceptor, which sees the flag.
            let _ = TcpStream::connect_timeout(&here(contact.address), GREETING_TIME);
        }
        linger(ending, patience, &health);
    }
}

/// Where this process reaches what it listens at.
fn here(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        let loopback =
            if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
        address.set_ip(loopback);
    }
    address
}
