//! A worker's mail: one thread sends, so that the backward pass goes on, the most urgent first; another one receives, so
//! that no server waits for a worker that computes.

use super::link::{ServerLink, Wire};
use super::message::Kind;
use crate::error::{Error, Result};
use regatta_comm::{Buffer, Message};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a thread that waits looks whether it is still needed.
const LOOK: Duration = Duration::from_millis(50);

/// Longest sleep of a wait for an answer.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// See the [module](self).
pub(crate) struct Courier {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    link: ServerLink,
    wire: Wire,
    /// By unit and server: the elements that the server keeps.
    parts: Vec<Vec<Range<usize>>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is to be sent: by step, then gradients before anything else, then the units that forward uses first.
    outgoing: BTreeMap<(u64, bool, usize), Parcel>,
    /// Whether the sender is at work on a parcel.
    sending: bool,
    /// Buffers of gradients that were sent, by unit.
    returned: BTreeMap<usize, Buffer<f32>>,
    /// By kind, unit and server: the newest message, and how many came.
    arrived: BTreeMap<(u32, usize), (Option<Message>, u64)>,
    /// The worker that a server has said it waits for.
    awaited: Option<usize>,
    /// The time that the sender was at work.
    busy: Duration,
    failed: Option<Error>,
    ended: bool,
}

enum Parcel {
    Gradients(usize, Buffer<f32>),
    /// The same numbers for all servers.
    Numbers(Kind, Vec<f64>),
}

impl Courier {
    /// Starts the threads of a worker. `parts` are, by unit and server, the elements that the server keeps.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(link: ServerLink, parts: Vec<Vec<Range<usize>>>) -> Result<Self> {
        let shared = Arc::new(Shared {
            wire: link.wire(),
            link,
            parts,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = |name: &str, work: fn(&Shared) -> Result<()>| {
            let shared = shared.clone();
            let run = move || {
                if let Err(error) = work(&shared) {
                    shared.lock().failed.get_or_insert(error);
                    shared.changed.notify_all();
                }
            };
            std::thread::Builder::new().name(name.into()).spawn(run).map_err(Error::io("start", name))
        };
        let threads =
            vec![thread("to servers", Shared::send_all)?, thread("from servers", Shared::receive_all)?];
        Ok(Self { shared, threads })
    }

    /// Hands over the gradients of `unit` of a step.
    ///
    /// # Errors
    /// An earlier failure of communication.
    pub(crate) fn push(&self, step: u64, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        self.post((step, false, unit), Parcel::Gradients(unit, gradients))
    }

    /// Tells all servers `numbers`, after what was pushed in this step.
    ///
    /// # Errors
    /// An earlier failure of communication.
    pub(crate) fn tell(&self, step: u64, kind: Kind, numbers: &[f64]) -> Result<()> {
        self.post((step, true, kind as usize), Parcel::Numbers(kind, numbers.to_vec()))
    }

    fn post(&self, key: (u64, bool, usize), parcel: Parcel) -> Result<()> {
        let mut state = self.shared.lock();
        state.check()?;
        state.outgoing.insert(key, parcel);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A buffer whose gradients were sent.
    pub(crate) fn returned(&self, unit: usize) -> Option<Buffer<f32>> {
        self.shared.lock().returned.remove(&unit)
    }

    /// Waits until `count` messages of this kind about `unit` have come from the `server`-th server in all, and returns the
    /// newest; none if it was returned before.
    ///
    /// # Errors
    /// Communication fails, the server refuses what was pushed, or it does not answer until the deadline.
    pub(crate) fn wait(&self, kind: Kind, unit: usize, server: usize, count: u64) -> Result<Option<Message>> {
        let key = (kind.tag(unit), server);
        let (begun, deadline) = (Instant::now(), self.shared.wire.deadline());
        let mut state = self.shared.lock();
        loop {
            state.check()?;
            let (message, came) = state.arrived.entry(key).or_default();
            if *came >= count {
                return Ok(message.take());
            }
            let waited = begun.elapsed();
            // The first worker evaluates alone, and that takes as long as it takes.
            let evaluates = self.shared.link.servers.is_free() && state.awaited == Some(0);
            let deadline = if evaluates { Duration::MAX } else { deadline };
            let Some(left) = deadline.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let rank = state.awaited.unwrap_or(self.shared.link.rank_of(server));
                let call = "an exchange with the parameter servers".into();
                return Err(regatta_comm::Error::Deadline { rank, call, waited }.into());
            };
            let woken = self.shared.changed.wait_timeout(state, left.min(LONGEST_WAIT));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until everything has been sent.
    ///
    /// # Errors
    /// Communication fails.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut state = self.shared.lock();
        while !state.outgoing.is_empty() || state.sending {
            state.check()?;
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.check()
    }

    /// The time that sending took since the last call.
    pub(crate) fn take_busy(&self) -> Duration {
        std::mem::take(&mut self.shared.lock().busy)
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to send.
            let _ = thread.join();
        }
    }
}

impl State {
    fn check(&self) -> Result<()> {
        match &self.failed {
            Some(Error::Comm(error)) => Err(Error::Comm(error.clone())),
            Some(error) => Err(Error::Numeric(error.to_string())),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_all(&self) -> Result<()> {
        let mut state = self.lock();
        loop {
            match state.outgoing.pop_first() {
                Some((_, parcel)) => {
                    state.sending = true;
                    drop(state);
                    let begun = Instant::now();
                    let sent = self.send(parcel);
                    state = self.lock();
                    state.sending = false;
                    state.busy += begun.elapsed();
                    state.returned.extend(sent?);
                    self.changed.notify_all();
                }
                None if state.ended => return Ok(()),
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Sends a parcel, and returns its buffer.
    fn send(&self, parcel: Parcel) -> Result<Option<(usize, Buffer<f32>)>> {
        let mailbox = self.wire.requests();
        match parcel {
            Parcel::Gradients(unit, gradients) => {
                for (server, part) in self.parts[unit].iter().enumerate() {
                    mailbox.send(
                        &gradients[part.clone()],
                        self.wire.place(self.link.rank_of(server))?,
                        Kind::Push.tag(unit),
                    )?;
                }
                Ok(Some((unit, gradients)))
            }
            Parcel::Numbers(kind, numbers) => {
                for server in 0..self.link.servers.count {
                    mailbox.send(&numbers, self.wire.place(self.link.rank_of(server))?, kind.tag(0))?;
                }
                Ok(None)
            }
        }
    }

    fn receive_all(&self) -> Result<()> {
        loop {
            let message = self.wire.answers().recv_timeout(None, None, LOOK)?;
            let mut state = self.lock();
            if let Some(message) = message {
                let server = self.wire.sender(&message) - self.link.workers;
                if let Some((Kind::Refused, _)) = Kind::of(message.tag()) {
                    let reason = String::from_utf8_lossy(message.numbers::<u8>()?).into_owned();
                    return Err(Error::Numeric(reason));
                }
                if let Some((Kind::Waits, _)) = Kind::of(message.tag()) {
                    state.awaited = message.numbers::<f64>()?.first().map(|rank| *rank as usize);
                    continue;
                }
                state.awaited = None;
                let (newest, count) = state.arrived.entry((message.tag(), server)).or_default();
                *newest = Some(message);
                *count += 1;
                self.changed.notify_all();
            } else if state.ended {
                return Ok(());
            }
        }
    }
}
