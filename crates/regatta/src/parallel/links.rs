//! What stages of a pipeline send each other: activations forward and gradients backward, sent while the sender goes on
//! and received ahead of their use.

use super::axes::Axes;
use crate::error::{Error, Result};
use regatta_comm::{Buffer, Group, Pending};
use regatta_plan::{Direction, Schedule};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Messages of a link that are awaited at once.
const AHEAD: usize = 2;

/// The links of one stage, each with a group of its own, so that none waits for another.
pub(crate) struct Links {
    stage: usize,
    groups: BTreeMap<(usize, usize, Direction), Group>,
    incoming: HashMap<(usize, Direction), Incoming>,
    sent: VecDeque<Pending<Buffer<f32>>>,
}

/// The chunk and micro-batch of a message, and the message.
type Awaited = ((usize, usize), Pending<Buffer<f32>>);

struct Incoming {
    /// Yet to come and not yet awaited, in the order in which they are sent: chunk and micro-batch.
    rest: VecDeque<(usize, usize)>,
    awaited: VecDeque<Awaited>,
    arrived: HashMap<(usize, usize), Buffer<f32>>,
}

impl Links {
    /// Connects the links that the schedules use. All ranks call it with the same ones.
    ///
    /// # Errors
    /// A failure of communication.
    pub(crate) fn new(axes: &Axes, schedules: &[&Schedule]) -> Result<Self> {
        let stage = axes.coordinate("pipe");
        let mut wanted: Vec<_> = schedules.iter().flat_map(|schedule| schedule.links()).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut groups = BTreeMap::new();
        // In one order everywhere, so that no two ranks wait for each other.
        for (from, to, direction) in wanted {
            if stage == from || stage == to {
                groups.insert((from, to, direction), axes.stages(&[from, to])?);
            }
        }
        Ok(Self { stage, groups, incoming: HashMap::new(), sent: VecDeque::new() })
    }

    /// Begins a step of `schedule`.
    pub(crate) fn begin(&mut self, schedule: &Schedule) {
        self.incoming.clear();
        for &(from, to, direction) in self.groups.keys().filter(|(_, to, _)| *to == self.stage) {
            let rest = schedule.messages(from, to, direction).into();
            let incoming = Incoming { rest, awaited: VecDeque::new(), arrived: HashMap::new() };
            self.incoming.insert((from, direction), incoming);
        }
    }

    /// Awaits messages of stage `from` up to the limit; `len` tells how long one is.
    pub(crate) fn expect(
        &mut self,
        from: usize,
        direction: Direction,
        len: impl Fn(usize, usize) -> usize,
    ) -> Result<()> {
        let Some(group) = self.groups.get(&(from, self.stage, direction)) else { return Ok(()) };
        let Some(incoming) = self.incoming.get_mut(&(from, direction)) else { return Ok(()) };
        while incoming.awaited.len() < AHEAD
            && let Some((chunk, micro)) = incoming.rest.pop_front()
        {
            let buffer = group.buffer(len(chunk, micro))?;
            incoming.awaited.push_back(((chunk, micro), group.recv_async(buffer, 0)));
        }
        Ok(())
    }

    /// The message for `chunk` and `micro` from stage `from`.
    pub(crate) fn take(
        &mut self,
        from: usize,
        direction: Direction,
        (chunk, micro): (usize, usize),
        len: impl Fn(usize, usize) -> usize,
    ) -> Result<Buffer<f32>> {
        loop {
            self.expect(from, direction, &len)?;
            let lost =
                || Error::Usage(format!("stage {from} sends nothing for chunk {chunk}, micro-batch {micro}"));
            let incoming = self.incoming.get_mut(&(from, direction)).ok_or_else(lost)?;
            if let Some(buffer) = incoming.arrived.remove(&(chunk, micro)) {
                return Ok(buffer);
            }
            let (which, pending) = incoming.awaited.pop_front().ok_or_else(lost)?;
            incoming.arrived.insert(which, pending.wait()?);
        }
    }

    /// Sends `data` to stage `to`.
    pub(crate) fn send(&mut self, to: usize, direction: Direction, data: Vec<f32>) -> Result<()> {
        if let Some(group) = self.groups.get(&(self.stage, to, direction)) {
            self.sent.push_back(group.send_async(data.into(), 1));
        }
        // What has gone gives its memory back.
        while self.sent.front().is_some_and(Pending::is_done)
            && let Some(gone) = self.sent.pop_front()
        {
            gone.wait()?;
        }
        Ok(())
    }

    /// Waits until everything is sent.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.sent.drain(..).try_for_each(|pending| pending.wait().map(drop))?;
        Ok(())
    }

    /// The links' groups, for counting.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }
}
