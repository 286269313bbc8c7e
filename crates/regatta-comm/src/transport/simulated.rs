//! A network in memory for tests: ranks are threads that take turns, and a script of bytes says how much of what they
//! send and receive goes through at a time, so that the same script is the same run.

use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Waits of each rank in a row, in which no byte moves, that are a deadlock.
const PATIENCE: usize = 8;

/// One byte on its way that arrives as another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Garbled {
    pub from: usize,
    pub to: usize,
    /// Its place in all that goes from rank to rank.
    pub at: usize,
    pub mask: u8,
}

struct State {
    script: VecDeque<u8>,
    /// Bytes on their way, by sender and receiver.
    queues: Vec<VecDeque<u8>>,
    sent: Vec<usize>,
    garbled: Option<Garbled>,
    turn: usize,
    ended: Vec<bool>,
    /// Waits in a row in which no byte has moved.
    idle: usize,
    stuck: bool,
}

/// What connects the ranks.
pub(crate) struct Network {
    size: usize,
    /// Bytes that one queue holds.
    capacity: usize,
    state: Mutex<State>,
    turns: Vec<Condvar>,
}

impl Network {
    pub(crate) fn new(
        size: usize,
        capacity: usize,
        script: impl Into<Vec<u8>>,
        garbled: Option<Garbled>,
    ) -> Self {
        let state = State {
            script: script.into().into(),
            queues: vec![VecDeque::new(); size * size],
            sent: vec![0; size * size],
            garbled,
            turn: 0,
            ended: vec![false; size],
            idle: 0,
            stuck: false,
        };
        let turns = (0..size).map(|_| Condvar::new()).collect();
        Self { size, capacity: capacity.max(1), state: Mutex::new(state), turns }
    }

    /// The endpoint of `rank`, on the rank's own thread: comes back when it is the rank's turn.
    pub(crate) fn endpoint(self: &Arc<Self>, rank: usize) -> Simulated {
        drop(self.turn(self.lock(), rank));
        Simulated { network: self.clone(), rank }
    }

    /// Whether no rank could go on.
    pub(crate) fn is_stuck(&self) -> bool {
        self.lock().stuck
    }

    /// Whether the byte that is to be garbled has been.
    pub(crate) fn is_garbled(&self) -> bool {
        self.lock().garbled.is_none()
    }

    /// Bytes that nobody has received.
    pub(crate) fn left(&self) -> usize {
        self.lock().queues.iter().map(VecDeque::len).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `rank`'s turn.
    fn turn<'a>(&self, state: MutexGuard<'a, State>, rank: usize) -> MutexGuard<'a, State> {
        let waited = self.turns[rank].wait_while(state, |state| state.turn != rank);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the turn to the next rank that has not ended.
    fn pass(&self, mut state: MutexGuard<'_, State>) {
        let next = (1..=self.size).map(|step| (state.turn + step) % self.size);
        if let Some(next) = next.into_iter().find(|&rank| !state.ended[rank]) {
            state.turn = next;
            // Whoever is woken need not wait for the lock.
            drop(state);
            self.turns[next].notify_one();
        }
    }

    /// How many of `wanted` bytes go through now; perhaps others come first.
    fn limit(&self, rank: usize, wanted: usize) -> (usize, MutexGuard<'_, State>) {
        let mut state = self.lock();
        let Some(word) = state.script.pop_front() else { return (wanted, state) };
        state.idle = 0;
        if word & 0x80 != 0 {
            self.pass(state);
            state = self.turn(self.lock(), rank);
        }
        (wanted.min((word & 0x7f).into()), state)
    }
}

/// One rank's endpoint. Dropping it lets the others go on without the rank.
pub(crate) struct Simulated {
    network: Arc<Network>,
    rank: usize,
}

impl Drop for Simulated {
    fn drop(&mut self) {
        let mut state = self.network.lock();
        state.ended[self.rank] = true;
        state.idle = 0;
        self.network.pass(state);
    }
}

impl Transport for Simulated {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        let network = &self.network;
        let (limit, mut state) = network.limit(self.rank, parts[0].len() + parts[1].len());
        let index = self.rank * network.size + to;
        let count = limit.min(network.capacity - state.queues[index].len());
        for &byte in parts.into_iter().flatten().take(count) {
            let place = state.sent[index];
            let here = |garbled: &mut Garbled| {
                (garbled.from, garbled.to, garbled.at) == (self.rank, to, place) && garbled.mask != 0
            };
            let mask = state.garbled.take_if(here).map_or(0, |garbled| garbled.mask);
            state.queues[index].push_back(byte ^ mask);
            state.sent[index] += 1;
        }
        if count > 0 {
            state.idle = 0;
        }
        Ok(count)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let network = &self.network;
        let (limit, mut state) = network.limit(self.rank, parts[0].len() + parts[1].len());
        let queue = &mut state.queues[from * network.size + self.rank];
        let count = limit.min(queue.len());
        for (into, byte) in parts.into_iter().flatten().zip(queue.drain(..count)) {
            *into = byte;
        }
        if count > 0 {
            state.idle = 0;
        }
        Ok(count)
    }

    fn wait(&mut self, _: &[usize], _: &[usize], _: Duration) -> Result<()> {
        let mut state = self.network.lock();
        state.idle += 1;
        state.stuck |= state.idle > PATIENCE * self.network.size;
        if !state.stuck {
            self.network.pass(state);
            state = self.network.turn(self.network.lock(), self.rank);
        }
        match state.stuck {
            true => Err(Error::Internal("no rank can go on".into())),
            false => Ok(()),
        }
    }

    fn set_patience(&mut self, _: Duration) {}
}
