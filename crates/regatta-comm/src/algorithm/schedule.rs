//! What one rank does in an operation, as data: messages to and from peers, over ranges of its numbers.
//!
//! An algorithm is a function from (rank, size, length) to a schedule; [`run`](super::run) executes it over any
//! transport. Between two ranks messages go in the order of both schedules. A step may wait for an earlier one, and
//! ranges are cut into chunks, so that a chunk goes on while the next one still arrives.

use std::ops::Range;

/// What a step does with its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Sends the range of the working numbers.
    Send,
    /// Sends the range of the input, which no step writes.
    SendInput,
    /// Receives into the range.
    Copy,
    /// Receives, and combines what has come with the range.
    Reduce,
    /// The same, and the reduction of the range is complete: a mean is divided.
    Finish,
    /// Receives, and once the same range has come from all who send parts, all are combined with it together. Each of
    /// these peers has the same steps of this kind, before all others in which it is received from.
    Part,
}

impl What {
    pub(crate) fn sends(self) -> bool {
        matches!(self, Self::Send | Self::SendInput)
    }
}

/// One message.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub peer: usize,
    pub what: What,
    /// Elements.
    pub range: Range<usize>,
    /// The step that must be complete before this one sends, or before what it received counts.
    pub after: Option<u32>,
}

/// The steps of one rank.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    pub steps: Vec<Step>,
    /// Elements of a chunk.
    chunk: usize,
}

/// Consecutive steps that cover a range in chunks.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    range: Range<usize>,
    first: u32,
    chunk: usize,
}

impl Run {
    /// The step with which everything before `end` is covered.
    fn through(&self, end: usize) -> u32 {
        let end = end.clamp(self.range.start, self.range.end);
        let chunks = (end - self.range.start).div_ceil(self.chunk);
        self.first + chunks.saturating_sub(1) as u32
    }

    /// For steps that wait for all of it.
    pub(crate) fn whole(&self) -> Self {
        let last = self.through(self.range.end);
        Self { range: self.range.clone(), first: last, chunk: usize::MAX }
    }
}

impl Schedule {
    /// An empty schedule whose ranges are cut into chunks of `chunk` elements.
    pub(crate) fn new(chunk: usize) -> Self {
        Self { steps: vec![], chunk: chunk.max(1) }
    }

    /// Adds steps that move `range` to or from `peer`, each chunk after the chunks of `after` that it overlaps.
    /// An empty range is one step: it carries no data, but the call, and the wait.
    pub(crate) fn add(&mut self, peer: usize, what: What, range: Range<usize>, after: Option<&Run>) -> Run {
        let first = self.steps.len() as u32;
        let mut at = range.start;
        loop {
            let end = range.end.min(at + self.chunk);
            let after = after.map(|run| run.through(end));
            self.steps.push(Step { peer, what, range: at..end, after });
            at = end;
            if at == range.end {
                return Run { range, first, chunk: self.chunk };
            }
        }
    }

    /// Elements sent.
    #[cfg(test)]
    pub(crate) fn sent(&self) -> usize {
        self.steps.iter().filter(|step| step.what.sends()).map(|step| step.range.len()).sum()
    }
}

/// The `index`-th of `parts` nearly equal parts of `len` elements.
pub(crate) fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (len / parts, len % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for len in 0..40 {
            for parts in 1..9 {
                let all: Vec<usize> = (0..parts).flat_map(|index| part(len, parts, index)).collect();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
            }
        }
        // Beyond 4 GiB, on paper.
        let len = (5 << 30) + 3;
        assert_eq!(part(len, 4, 3).end, len);
        assert_eq!(part(len, 4, 3).start, part(len, 4, 2).end);
    }

    #[test]
    fn algorithms_send_what_their_formulas_say() {
        use crate::algorithm::session::Place;
        use crate::algorithm::{doubling, halving_doubling, ring, tree};
        let len = 7 * 5 * 3 * 64;
        for size in 2..=16 {
            let places = || (0..size).map(|rank| Place { rank, size, chunk: 100 });
            let segment = |index| part(len, size, index);
            let sent = |schedule: &dyn Fn(Place) -> Schedule| {
                places().map(|place| schedule(place).sent()).sum::<usize>()
            };
            // Of all ranks together: 2(n-1)/n * len each.
            let least = 2 * (size - 1) * len;
            assert_eq!(sent(&|place| ring::all_reduce(place, &segment)), least);
            assert_eq!(sent(&|place| ring::reduce_scatter(place, &segment)), least / 2);
            assert_eq!(sent(&|place| ring::all_gather(place, &segment)), least / 2);
            assert_eq!(sent(&|place| ring::broadcast(place, 1, len)), least / 2);
            assert_eq!(sent(&|place| tree::all_reduce(place, len)), least);
            assert_eq!(sent(&|place| tree::broadcast(place, 1, len)), least / 2);
            // A pair that folds sends everything twice more.
            let players = 1usize << size.ilog2();
            let folding = 2 * (size - players) * len;
            let halving = sent(&|place| halving_doubling::all_reduce(place, &segment));
            assert_eq!(halving, 2 * (players - 1) * len + folding, "{size}");
            let doubling = sent(&|place| doubling::all_reduce(place, len));
            assert_eq!(doubling, players * players.ilog2() as usize * len + folding);
        }
    }

    #[test]
    fn chunks_wait_for_the_chunks_they_overlap() {
        let mut schedule = Schedule::new(10);
        let first = schedule.add(1, What::Reduce, 5..38, None);
        assert_eq!(schedule.steps.len(), 4);
        // 5..15, 15..25, 25..35, 35..38.
        assert_eq!([5, 6, 15, 16, 35, 38, 99].map(|end| first.through(end)), [0, 0, 0, 1, 2, 3, 3]);
        schedule.add(2, What::Send, 12..30, Some(&first));
        assert_eq!(schedule.steps[4..].iter().map(|step| step.after).collect::<Vec<_>>(), [Some(1), Some(2)]);
        let empty = schedule.add(2, What::Copy, 3..3, None);
        assert_eq!((empty.first, empty.through(3)), (6, 6));
    }
}
