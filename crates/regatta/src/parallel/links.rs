//! The links between stages of a pipeline. They send activations forward and gradients backward. The sender does not wait,
//! and the receiver receives ahead of use.

use super::groups::Groups;
use super::wire::{Numbers, Pass};
use crate::error::{Error, Result};
use regatta_comm::Group;
use regatta_kernel::random::Stream;
use regatta_plan::{Axis, CompressKind, Direction, Schedule};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Begins the random numbers that decide how activations are rounded.
const SEED: u64 = 0x6163_7469_7661_7465;
/// Most messages of a link that are received ahead of use.
const RECEIVE_AHEAD: usize = 2;

/// The links of one stage. Each has a group of its own, so that no link waits for another.
pub(crate) struct Links {
    stage: usize,
    /// The group of each link, by sending stage, receiving stage and direction.
    groups: BTreeMap<(usize, usize, Direction), Group>,
    /// The messages of this step to this stage, by sending stage and direction.
    incoming: HashMap<(usize, Direction), Incoming>,
    sending: VecDeque<Pass>,
    /// How numbers go in training.
    coding: CompressKind,
    /// How they go in this step.
    now: CompressKind,
    /// The step, and messages that have been sent in it.
    sent: (u64, u64),
}

/// A message that is being received: its chunk and micro-batch, and its data, so many numbers.
type Receiving = ((usize, usize), Pass, usize);

/// The messages of one link in a step, identified by chunk and micro-batch.
struct Incoming {
    /// Messages whose reception has not started, in the order in which they are sent.
    expected: VecDeque<(usize, usize)>,
    receiving: VecDeque<Receiving>,
    /// Messages that arrived before they were needed.
    received: HashMap<(usize, usize), Numbers>,
}

impl Links {
    /// Connects the links that `schedules` use. All ranks must call it with the same schedules.
    ///
    /// # Errors
    /// A failure of communication.
    pub(crate) fn new(groups: &Groups, schedules: &[&Schedule], coding: CompressKind) -> Result<Self> {
        let stage = groups.coordinate(Axis::Pipe);
        let mut wanted: Vec<_> = schedules.iter().flat_map(|schedule| schedule.links()).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut links = BTreeMap::new();
        // The order is the same on all ranks, so that no two of them wait for each other.
        for (from, to, direction) in wanted {
            if stage == from || stage == to {
                links.insert((from, to, direction), groups.stages(&[from, to])?);
            }
        }
        Ok(Self {
            stage,
            groups: links,
            incoming: HashMap::new(),
            sending: VecDeque::new(),
            coding,
            now: CompressKind::None,
            sent: (0, 0),
        })
    }

    /// Begins a step of `schedule`: of training, where a number is given. In evaluation numbers go as they are.
    pub(crate) fn begin(&mut self, schedule: &Schedule, step: Option<u64>) {
        self.now = step.map_or(CompressKind::None, |_| self.coding);
        self.sent = (step.unwrap_or(0), 0);
        self.incoming.clear();
        for &(from, to, direction) in self.groups.keys().filter(|(_, to, _)| *to == self.stage) {
            let expected = schedule.messages(from, to, direction).into();
            let incoming = Incoming { expected, receiving: VecDeque::new(), received: HashMap::new() };
            self.incoming.insert((from, direction), incoming);
        }
    }

    /// Starts to receive messages from stage `from`, up to [`RECEIVE_AHEAD`]; `len` gives the length of a message by chunk and
    /// micro-batch.
    fn receive_ahead(
        &mut self,
        from: usize,
        direction: Direction,
        len: impl Fn(usize, usize) -> usize,
    ) -> Result<()> {
        let Some(group) = self.groups.get(&(from, self.stage, direction)) else { return Ok(()) };
        let Some(incoming) = self.incoming.get_mut(&(from, direction)) else { return Ok(()) };
        while incoming.receiving.len() < RECEIVE_AHEAD
            && let Some((chunk, micro_batch)) = incoming.expected.pop_front()
        {
            let len = len(chunk, micro_batch);
            let pass = Pass::receive(group, 0, self.now, len)?;
            incoming.receiving.push_back(((chunk, micro_batch), pass, len));
        }
        Ok(())
    }

    /// Waits for the message from stage `from` for a chunk and micro-batch; `len` as for
    /// [`receive_ahead`](Self::receive_ahead).
    pub(crate) fn take(
        &mut self,
        from: usize,
        direction: Direction,
        (chunk, micro_batch): (usize, usize),
        len: impl Fn(usize, usize) -> usize,
    ) -> Result<Numbers> {
        loop {
            self.receive_ahead(from, direction, &len)?;
            let missing = || {
                Error::Usage(format!(
                    "stage {from} sends no message for chunk {chunk}, micro-batch {micro_batch}"
                ))
            };
            let incoming = self.incoming.get_mut(&(from, direction)).ok_or_else(missing)?;
            if let Some(numbers) = incoming.received.remove(&(chunk, micro_batch)) {
                return Ok(numbers);
            }
            let (key, pass, len) = incoming.receiving.pop_front().ok_or_else(missing)?;
            incoming.received.insert(key, pass.received(self.now, len)?);
        }
    }

    /// Starts to send `data` to stage `to`.
    pub(crate) fn send(&mut self, to: usize, direction: Direction, data: Vec<f32>) -> Result<()> {
        if let Some(group) = self.groups.get(&(self.stage, to, direction)) {
            // Ranks along tensor send the same, and must round alike: their place is not in the seed.
            let (step, count) = self.sent;
            let seed = Stream::new(SEED).at(step).at(self.stage as u64).at(count).bits(0);
            self.sent.1 += 1;
            self.sending.push_back(Pass::send(group, 1, self.now, data, seed)?);
        }
        // Frees the memory of messages that have been sent.
        while self.sending.front().is_some_and(Pass::is_done)
            && let Some(sent) = self.sending.pop_front()
        {
            sent.sent()?;
        }
        Ok(())
    }

    /// Waits until all messages are sent.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.sending.drain(..).try_for_each(Pass::sent)
    }

    /// The groups of the links, to count their traffic.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }
}
