//! A network in memory for tests: ranks take turns on one thread, each on a stack of its own, and a script of bytes says
//! how much of what they send and receive goes through at a time, so that the same script is the same run. A switch
//! between threads would take fifty times as long as one between stacks.

use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
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

/// What connects the ranks.
pub(crate) struct Network {
    size: usize,
    /// Bytes that one queue holds.
    capacity: usize,
    script: RefCell<VecDeque<u8>>,
    /// Bytes on their way, by sender and receiver.
    queues: Vec<RefCell<VecDeque<u8>>>,
    sent: Vec<Cell<usize>>,
    garbled: Cell<Option<Garbled>>,
    /// Waits in a row in which no byte has moved.
    idle: Cell<usize>,
    stuck: Cell<bool>,
}

impl Network {
    pub(crate) fn new(
        size: usize,
        capacity: usize,
        script: impl Into<Vec<u8>>,
        garbled: Option<Garbled>,
    ) -> Self {
        Self {
            size,
            capacity: capacity.max(1),
            script: RefCell::new(script.into().into()),
            queues: vec![RefCell::default(); size * size],
            sent: vec![Cell::default(); size * size],
            garbled: Cell::new(garbled),
            idle: Cell::new(0),
            stuck: Cell::new(false),
        }
    }

    /// What `body` comes to on every rank. Ranks go on in turn, whenever one waits or has no more to do.
    pub(crate) fn run<T: 'static>(
        self: Rc<Self>,
        body: impl Fn(&mut Simulated<'_>) -> T + Clone + 'static,
    ) -> Vec<T> {
        let start = |rank: usize| {
            let (network, body) = (self.clone(), body.clone());
            Some(Coroutine::with_stack(stack(), move |turns: &Yielder<(), ()>, ()| {
                body(&mut Simulated { network: &network, rank, turns })
            }))
        };
        let mut ranks: Vec<_> = (0..self.size).map(start).collect();
        let mut outcomes: Vec<Option<T>> = (0..self.size).map(|_| None).collect();
        while ranks.iter().any(Option::is_some) {
            for (rank, outcome) in ranks.iter_mut().zip(&mut outcomes) {
                if let Some(CoroutineResult::Return(value)) = rank.as_mut().map(|rank| rank.resume(())) {
                    *outcome = Some(value);
                    STACKS.with_borrow_mut(|stacks| stacks.extend(rank.take().map(Coroutine::into_stack)));
                    self.idle.set(0);
                }
            }
        }
        outcomes.into_iter().flatten().collect()
    }

    /// Whether no rank could go on.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.get()
    }

    /// Whether the byte that is to be garbled has been.
    pub(crate) fn is_garbled(&self) -> bool {
        self.garbled.get().is_none()
    }

    /// Bytes that nobody has received.
    pub(crate) fn left(&self) -> usize {
        self.queues.iter().map(|queue| queue.borrow().len()).sum()
    }
}

thread_local! {
    /// Stacks that no rank uses: to make one takes longer than many a run.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(vec![]) };
}

fn stack() -> DefaultStack {
    let kept = STACKS.with_borrow_mut(Vec::pop);
    kept.unwrap_or_else(|| DefaultStack::new(1 << 20).expect("memory for a stack"))
}

/// One rank's endpoint.
pub(crate) struct Simulated<'a> {
    network: &'a Network,
    pub rank: usize,
    turns: &'a Yielder<(), ()>,
}

impl Simulated<'_> {
    /// How many of `wanted` bytes go through now; perhaps others come first.
    fn limit(&self, wanted: usize) -> usize {
        let word = self.network.script.borrow_mut().pop_front();
        let Some(word) = word else { return wanted };
        self.network.idle.set(0);
        if word & 0x80 != 0 {
            self.turns.suspend(());
        }
        wanted.min((word & 0x7f).into())
    }
}

impl Transport for Simulated<'_> {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        let limit = self.limit(parts[0].len() + parts[1].len());
        let network = self.network;
        let index = self.rank * network.size + to;
        let mut queue = network.queues[index].borrow_mut();
        let count = limit.min(network.capacity - queue.len());
        let sent = network.sent[index].get();
        network.sent[index].set(sent + count);
        let first = count.min(parts[0].len());
        queue.extend(&parts[0][..first]);
        queue.extend(&parts[1][..count - first]);
        if let Some(garbled) = network.garbled.get()
            && (garbled.from, garbled.to) == (self.rank, to)
            && garbled.mask != 0
            && (sent..sent + count).contains(&garbled.at)
        {
            let place = queue.len() - (sent + count - garbled.at);
            queue[place] ^= garbled.mask;
            network.garbled.set(None);
        }
        if count > 0 {
            network.idle.set(0);
        }
        Ok(count)
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        let limit = self.limit(parts[0].len() + parts[1].len());
        let mut queue = self.network.queues[from * self.network.size + self.rank].borrow_mut();
        let count = limit.min(queue.len());
        for (into, byte) in parts.into_iter().flatten().zip(queue.drain(..count)) {
            *into = byte;
        }
        if count > 0 {
            self.network.idle.set(0);
        }
        Ok(count)
    }

    fn wait(&mut self, _: &[usize], _: &[usize], _: Duration) -> Result<()> {
        let network = self.network;
        network.idle.set(network.idle.get() + 1);
        if network.idle.get() > PATIENCE * network.size {
            network.stuck.set(true);
        }
        if !network.stuck.get() {
            self.turns.suspend(());
        }
        match network.stuck.get() {
            true => Err(Error::Internal("no rank can go on".into())),
            false => Ok(()),
        }
    }

    fn set_patience(&mut self, _: Duration) {}
}
