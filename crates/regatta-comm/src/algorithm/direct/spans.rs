//! Pieces of data that lie in several places: for algorithms of which shared memory is one step of several.

use super::peers;
use crate::error::Result;
use crate::member::call::Call;
use crate::numbers::element::Element;
use crate::numbers::kernel;
use crate::transport::shared::{Counter, PRIVATE, Shared};
use std::ops::Range;

/// Ranges that count as one, one after the other. Mostly it is one, and takes no memory of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Spans {
    first: Range<usize>,
    more: Vec<Range<usize>>,
}

impl Spans {
    /// One range.
    pub(crate) fn of(range: Range<usize>) -> Self {
        Self::from_iter(std::iter::once(range))
    }

    /// Adds what comes next.
    pub(crate) fn push(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let last = self.more.last_mut().unwrap_or(&mut self.first);
        if Range::is_empty(last) {
            *last = range;
        } else if last.end == range.start {
            last.end = range.end;
        } else {
            self.more.push(range);
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Range<usize>> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// Adds `more` behind these.
    pub(crate) fn then(mut self, more: &Self) -> Self {
        more.iter().for_each(|range| self.push(range.clone()));
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.iter().map(Range::len).sum()
    }

    /// The elements `of` of them, as far as they go: where each range begins among these, and the range.
    fn within(&self, of: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut at = 0;
        self.iter().filter_map(move |range| {
            let (start, end) = (of.start.max(at), of.end.min(at + range.len()));
            let found = start..end;
            let here = range.start + start.saturating_sub(at)..range.start + end.saturating_sub(at);
            at += range.len();
            (found.start < found.end).then(|| (found.start - of.start, here))
        })
    }

    /// The elements `of` of them.
    pub(crate) fn cut(&self, of: Range<usize>) -> Self {
        Self::from_iter(self.within(of).map(|(_, range)| range))
    }

    /// From where they lie one after the other to here.
    pub(crate) fn moves(&self) -> Vec<Move> {
        self.within(0..usize::MAX).map(|(from, to)| Move { from, to }).collect()
    }
}

impl FromIterator<Range<usize>> for Spans {
    fn from_iter<I: IntoIterator<Item = Range<usize>>>(ranges: I) -> Self {
        let mut spans = Self::default();
        ranges.into_iter().for_each(|range| spans.push(range));
        spans
    }
}

/// Numbers that one rank shows and another one reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    /// The first of them, in what the rank shows.
    pub from: usize,
    /// Where they belong.
    pub to: Range<usize>,
}

/// Leaves the reduction of everyone's `rank`-th spans of `input` in `output`.
pub(crate) fn reduce_spans<T: Element>(
    shared: &mut Shared,
    call: Call,
    spans: &[Spans],
    (input, output): (&[T], &mut [T]),
) -> Result<()> {
    let (rank, size) = (shared.rank(), shared.size());
    let longest = spans.iter().map(Spans::len).max().unwrap_or(0);
    shared.enter();
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let chunk = shared.slot_bytes(round) / size_of::<T>() / size;
        let count = chunk.min(longest - at);
        let staging = bytemuck::cast_slice_mut::<u8, T>(shared.staging(round));
        for peer in (0..size).filter(|&peer| peer != rank) {
            for (place, range) in spans[peer].within(at..at + count) {
                staging[peer * chunk + place..][..range.len()].copy_from_slice(&input[range]);
            }
        }
        shared.stage(round, call, PRIVATE);
        for peer in peers(shared) {
            shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, (longest - at - count) * size_of::<T>() * size);
        for (place, range) in spans[rank].within(at..at + count) {
            let numbers = |peer: usize| match peer == rank {
                true => &input[range.clone()],
                false => {
                    let slot = bytemuck::cast_slice::<u8, T>(shared.staged(peer, round));
                    &slot[rank * chunk + place..][..range.len()]
                }
            };
            let all: Vec<&[T]> = (0..size).map(numbers).collect();
            kernel::reduce(&mut output[at + place..][..range.len()], &all, call.op);
        }
        shared.publish(Counter::Done, round);
        at += count;
        if at == longest {
            return Ok(());
        }
    }
}

/// Gathers everyone's `own` numbers, which are the `rank`-th spans of `output`.
pub(crate) fn gather_spans<T: Element>(
    shared: &mut Shared,
    call: Call,
    spans: &[Spans],
    (own, output): (&[T], &mut [T]),
) -> Result<()> {
    let longest = spans.iter().map(Spans::len).max().unwrap_or(0);
    let moves: Vec<_> = spans.iter().map(Spans::moves).collect();
    exchange(shared, call, (own, longest), &moves, output)
}

/// Everyone shows `own` numbers, at most `longest`, and reads `moves[rank]` of each rank's into `output`.
pub(crate) fn exchange<T: Element>(
    shared: &mut Shared,
    call: Call,
    (own, longest): (&[T], usize),
    moves: &[Vec<Move>],
    output: &mut [T],
) -> Result<()> {
    for Move { from, to } in &moves[shared.rank()] {
        output[to.clone()].copy_from_slice(&own[*from..][..to.len()]);
    }
    let show = |slot: &mut [T], at: usize| {
        let shown = &own[at.min(own.len())..own.len().min(at + slot.len())];
        slot[..shown.len()].copy_from_slice(shown);
    };
    let read = |peer: usize, slot: &[T], at: usize| {
        for Move { from, to } in &moves[peer] {
            let (start, end) = ((*from).max(at), (from + to.len()).min(at + slot.len()));
            if start < end {
                let here = to.start + start - from..to.start + end - from;
                output[here].copy_from_slice(&slot[start - at..end - at]);
            }
        }
    };
    in_rounds(shared, call, longest, show, read)
}

/// Gathers everyone's `own` slices, at most `longest` numbers, which are the slices `targets[rank]` of the others.
pub(crate) fn gather_slices<T: Element>(
    shared: &mut Shared,
    call: Call,
    (own, longest): (&[&mut [T]], usize),
    targets: &mut [Vec<&mut [T]>],
) -> Result<()> {
    let show = |slot: &mut [T], at: usize| {
        let mut end = 0;
        for slice in own {
            let (from, whole) = (end, at..at + slot.len());
            end += slice.len();
            let (first, last) = (whole.start.max(from), whole.end.min(end));
            if first < last {
                slot[first - at..last - at].copy_from_slice(&slice[first - from..last - from]);
            }
        }
    };
    let read = |peer: usize, slot: &[T], at: usize| {
        let mut end = 0;
        for slice in &mut targets[peer] {
            let (from, whole) = (end, at..at + slot.len());
            end += slice.len();
            let (first, last) = (whole.start.max(from), whole.end.min(end));
            if first < last {
                slice[first - from..last - from].copy_from_slice(&slot[first - at..last - at]);
            }
        }
    };
    in_rounds(shared, call, longest, show, read)
}

/// In rounds in which everyone waits for all others: `show` fills a slot with this rank's numbers from the given one on,
/// and `read` takes those of a peer.
fn in_rounds<T: Element>(
    shared: &mut Shared,
    call: Call,
    longest: usize,
    show: impl Fn(&mut [T], usize),
    mut read: impl FnMut(usize, &[T], usize),
) -> Result<()> {
    shared.enter();
    let mut at = 0;
    loop {
        let round = shared.begin(call)?;
        let count = (shared.slot_bytes(round) / size_of::<T>()).min(longest - at);
        show(&mut bytemuck::cast_slice_mut(shared.staging(round))[..count], at);
        shared.stage(round, call, PRIVATE);
        for peer in peers(shared) {
            shared.await_staged(peer, round, call)?;
        }
        shared.agree(round, (longest - at - count) * size_of::<T>());
        for peer in peers(shared) {
            read(peer, &bytemuck::cast_slice(shared.staged(peer, round))[..count], at);
        }
        shared.publish(Counter::Done, round);
        at += count;
        if at == longest {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_cut_as_one() {
        let spans = Spans::from_iter([3..5, 5..6, 9..9, 10..14]);
        assert_eq!((spans.len(), &spans), (7, &Spans::from_iter([3..6, 10..14])));
        assert_eq!(spans.cut(0..7), spans);
        assert_eq!(spans.cut(2..4), Spans::from_iter([5..6, 10..11]));
        assert_eq!((spans.cut(4..99), spans.cut(7..9)), (Spans::of(11..14), Spans::default()));
        let moves = vec![Move { from: 0, to: 3..6 }, Move { from: 3, to: 10..14 }];
        assert_eq!(spans.moves(), moves);
    }
}
