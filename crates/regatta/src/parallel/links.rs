//! The links between stages of a pipeline. They send activations forward and gradients backward. The sender does not wait,
//! and the receiver receives ahead of use.

use super::groups::Groups;
use crate::error::{Error, Result};
use regatta_comm::{Buffer, Group, Pending};
use regatta_plan::{Axis, Direction, Schedule};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Most messages of a link that are received ahead of use.
const RECEIVE_AHEAD: usize = 2;

/// The links of one stage. Each has a group of its own, so that no link waits for another.
pub(crate) struct Links {
    stage: usize,
    /// The group of each link, by sending stage, receiving stage and direction.
    groups: BTreeMap<(usize, usize, Direction), Group>,
    /// The messages of this step to this stage, by sending stage and direction.
    incoming: HashMap<(usize, Direction), Incoming>,
    sending: VecDeque<Pending<Buffer<f32>>>,
}

/// A message that is being received: its chunk and micro-batch, and its data.
type Receiving = ((usize, usize), Pending<Buffer<f32>>);

/// The messages of one link in a step, identified by chunk and micro-batch.
struct Incoming {
    /// Messages whose reception has not started, in the order in which they are sent.
    expected: VecDeque<(usize, usize)>,
    receiving: VecDeque<Receiving>,
    /// Messages that arrived before they were needed.
    received: HashMap<(usize, usize), Buffer<f32>>,
}

impl Links {
    /// Connects the links that `schedules` use. All ranks must call it with the same schedules.
    ///
    /// # Errors
    /// A failure of communication.
    pub(crate) fn new(groups: &Groups, schedules: &[&Schedule]) -> Result<Self> {
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
        Ok(Self { stage, groups: links, incoming: HashMap::new(), sending: VecDeque::new() })
    }

    /// Begins a step of `schedule`.
    pub(crate) fn begin(&mut self, schedule: &Schedule) {
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
            let buffer = group.buffer(len(chunk, micro_batch))?;
            incoming.receiving.push_back(((chunk, micro_batch), group.recv_async(buffer, 0)));
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
    ) -> Result<Buffer<f32>> {
        loop {
            self.receive_ahead(from, direction, &len)?;
            let missing = || {
                Error::Usage(format!(
                    "stage {from} sends no message for chunk {chunk}, micro-batch {micro_batch}"
                ))
            };
            let incoming = self.incoming.get_mut(&(from, direction)).ok_or_else(missing)?;
            if let Some(buffer) = incoming.received.remove(&(chunk, micro_batch)) {
                return Ok(buffer);
            }
            let (key, pending) = incoming.receiving.pop_front().ok_or_else(missing)?;
            incoming.received.insert(key, pending.wait()?);
        }
    }

    /// Starts to send `data` to stage `to`.
    pub(crate) fn send(&mut self, to: usize, direction: Direction, data: Vec<f32>) -> Result<()> {
        if let Some(group) = self.groups.get(&(self.stage, to, direction)) {
            self.sending.push_back(group.send_async(data.into(), 1));
        }
        // Frees the memory of messages that have been sent.
        while self.sending.front().is_some_and(Pending::is_done)
            && let Some(sent) = self.sending.pop_front()
        {
            sent.wait()?;
        }
        Ok(())
    }

    /// Waits until all messages are sent.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.sending.drain(..).try_for_each(|pending| pending.wait().map(drop))?;
        Ok(())
    }

    /// The groups of the links, to count their traffic.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }
}
