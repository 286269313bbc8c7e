//! What a store knows, and how connections wait for it to change.

use super::entries::{Entries, Gathered};
use super::generations::{End, Generations};
use super::protocol::{Answer, Request, scope};
use crate::member::rounds::Rounds;
use crate::member::waits::Waits;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Bytes that a note, or a rank's place in a round of joining, takes.
const ITEM: usize = 128;

/// What the store knows.
pub(super) struct State {
    /// Most bytes of all that is kept.
    most: usize,
    pub entries: Entries,
    waits: Waits,
    rounds: Rounds,
    /// What connections wait for.
    topics: BTreeMap<String, Topic>,
    pub generations: Generations,
    /// How many ranks are told what happens, or have been.
    pub heard: usize,
}

/// Something that connections wait for.
#[derive(Default)]
struct Topic {
    waiting: usize,
    /// They need not look before it has come up as often as this.
    missing: usize,
    changed: Arc<Condvar>,
}

impl State {
    fn new(size: usize, most: usize) -> Self {
        Self {
            most,
            entries: Entries::default(),
            waits: Waits::default(),
            rounds: Rounds::default(),
            topics: BTreeMap::new(),
            generations: Generations::new(size),
            heard: 0,
        }
    }

    /// Bytes of all that is kept.
    pub(super) fn bytes(&self) -> usize {
        self.entries.bytes() + ITEM * (self.waits.len() + self.rounds.len())
    }

    /// Entries, notes and places that are kept.
    pub(super) fn len(&self) -> usize {
        self.entries.len() + self.waits.len() + self.rounds.len()
    }

    /// Sets an entry, where there is room for it.
    pub(super) fn set(&mut self, key: &str, value: &[u8]) -> bool {
        let others = self.bytes() - self.entries.bytes();
        let room = self.most.saturating_sub(others);
        let set = self.entries.set(key, value, room);
        if set {
            self.tell(key);
            // Those who wait for all entries of a folder.
            if let Some(at) = key.rfind('/') {
                self.tell(&key[..=at]);
            }
        }
        set
    }

    /// Wakes those who wait for `topic`, when it has come up as often as they need.
    fn tell(&mut self, topic: &str) {
        if let Some(topic) = self.topics.get_mut(topic) {
            topic.missing = topic.missing.saturating_sub(1);
            if topic.missing == 0 {
                topic.changed.notify_all();
            }
        }
    }

    /// Ends a generation, or the job, and wakes all who wait; whether it had not ended.
    pub(super) fn end(&mut self, generation: Option<u64>, end: &End) -> bool {
        let first = match generation {
            Some(generation) => self.generations.end(generation, end),
            None => self.generations.end_all(end),
        };
        if first {
            self.topics.values().for_each(|topic| topic.changed.notify_all());
        }
        first
    }

    /// A rank goes on to another generation; those in which it makes no more calls, or why it may not.
    pub(super) fn begin(
        &mut self,
        rank: usize,
        generation: u64,
        members: &[usize],
    ) -> Result<Vec<u64>, String> {
        let left = self.generations.begin(rank, generation, members)?;
        // Of generation 0 nothing is left when it has begun.
        for over in self.generations.forget().into_iter().filter(|&over| over > 0) {
            self.entries.remove_all(&scope(over));
        }
        Ok(left)
    }

    fn has_room(&self) -> bool {
        self.bytes() + 2 * ITEM <= self.most
    }

    /// What came of a request: an answer, or how often its topic has to come up before there is one.
    fn answer(&mut self, request: &Request<'_>) -> Result<Answer, usize> {
        Ok(match *request {
            Request::Set { key, value } if self.set(key, value) => Answer::Done,
            Request::Set { .. } => full(),
            Request::List { prefix } => match self.entries.list(prefix) {
                Some(entries) => Answer::Entries(entries),
                None => Answer::Refused("more entries than an answer holds".into()),
            },
            Request::Get { key, .. } => Answer::Value(self.entries.get(key).ok_or(1usize)?.clone()),
            Request::Gather { prefix, from, count, .. } => match self.entries.gather(prefix, from, count) {
                Gathered::Values(values) => Answer::Values(values),
                Gathered::Missing(missing) => return Err(missing.len()),
            },
            Request::Say { .. } | Request::Join { .. } | Request::Invite { .. } if !self.has_room() => full(),
            Request::Say { group, note, seen } => Answer::Heard(self.waits.say(group, &note, seen)),
            Request::Unsay { group, rank } => {
                self.waits.unsay(group, rank);
                Answer::Done
            }
            Request::ChainEnd { group, rank, peer } => {
                Answer::Number(self.waits.chain_end(group, rank, peer) as u64)
            }
            Request::Join { round, sequence } => Answer::Number(self.rounds.join(round, sequence) as u64),
            Request::Joined { token } => Answer::Ranks(self.rounds.joined(token)),
            Request::Invite { round, sequence, invitation } => {
                self.rounds.invite(round, sequence, invitation);
                self.tell(&of_round(round.token));
                Answer::Done
            }
            Request::Invited { round, sequence, .. } => {
                Answer::Value(self.rounds.invited(round, sequence).ok_or(1usize)?.to_bytes())
            }
            Request::Time => Answer::Number(unix_us()),
            Request::Begin { .. } => Answer::Refused("only the server itself can do that".into()),
        })
    }

    /// What is said to a request that has waited in vain.
    fn in_vain(&mut self, request: &Request<'_>, rank: usize) -> Answer {
        match *request {
            _ if self.generations.has_ended(rank) => Answer::Ended,
            Request::Gather { prefix, from, count, .. } => match self.entries.gather(prefix, from, count) {
                Gathered::Values(values) => Answer::Values(values),
                Gathered::Missing(missing) => Answer::Missing(missing),
            },
            _ => Answer::NotYet,
        }
    }
}

/// A state that several connections share.
pub(super) struct Shared(Mutex<State>);

impl Shared {
    /// For a job that begins with `size` ranks, and at most `most` bytes.
    pub(super) fn new(size: usize, most: usize) -> Self {
        Self(Mutex::new(State::new(size, most)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a request of `rank`; waits for it as long as the request says, and at most `most`.
    pub(super) fn answer(&self, request: &Request<'_>, rank: usize, most: Duration) -> Answer {
        let (topic, wait) = match *request {
            Request::Get { key, wait } => (key.to_string(), wait),
            Request::Gather { prefix, wait, .. } => (prefix.to_string(), wait),
            Request::Invited { round, wait, .. } => (of_round(round.token), wait),
            _ => (String::new(), Duration::ZERO),
        };
        let until = Instant::now() + wait.min(most);
        let mut state = self.lock();
        loop {
            let missing = match state.answer(request) {
                Ok(answer) => return answer,
                Err(missing) => missing,
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.generations.has_ended(rank) {
                return state.in_vain(request, rank);
            }
            let waits = state.topics.entry(topic.clone()).or_default();
            waits.missing = if waits.waiting == 0 { missing } else { missing.min(waits.missing) };
            waits.waiting += 1;
            let changed = waits.changed.clone();
            state = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            if let Some(waits) = state.topics.get_mut(&topic) {
                waits.waiting -= 1;
                if waits.waiting == 0 {
                    state.topics.remove(&topic);
                }
            }
        }
    }
}

/// What those wait for who have joined a round. No key of an entry begins so.
fn of_round(token: u64) -> String {
    format!("\0{token:x}")
}

fn full() -> Answer {
    Answer::Refused("it is full: the job's ranks have left more there than any job needs".into())
}

/// Microseconds since 1970.
pub(super) fn unix_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}
