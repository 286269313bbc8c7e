//! Reductions in which numbers travel as they are: every rank sends each part of its numbers to the part's owner, which
//! combines them in a wider type and rounds once. For 16-bit floats, and for means of integers: partial sums of those
//! would have to travel in the wider type, in twice the bytes and more.
//!
//! Cost per rank for B bytes: reduce-scatter one step and (n-1)/n * B bytes sent, n-1 messages at once; all-reduce, which
//! then sends the rounded parts to all, two steps and 2(n-1)/n * B. Few ranks with little data send all of it to all:
//! one step, (n-1) * B bytes.
//!
//! An [`Order`] says how the owner combines: as the ring, halving or doubling would have done on the way, so the result
//! has the same bits as theirs.

use super::Algorithm;
use super::parts::Parts;
use super::run::{Numbers, run_combining};
use super::schedule::{Run, Schedule, What};
use super::session::{Place, Session};
use crate::error::Result;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;
use std::ops::Range;

/// Most ranks that send all of their numbers to all.
const FEW: usize = 4;
/// Most ranks that send short parts to all others: a message costs more than the bytes of a short part.
const MOST_SHORT: usize = 8;
/// Bytes of a part that is not short.
const SHORT: usize = 4 << 10;
/// Numbers that are combined at a time: they stay in the first-level cache.
const BLOCK: usize = 1 << 10;

/// What is done next with a stack of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// The numbers of this rank come on top.
    Push(usize),
    /// The two on top become one: the upper one combined with the lower one.
    Combine,
}

/// In which order the numbers of all ranks are combined.
#[derive(Debug)]
enum Order {
    /// One rank's after the other's.
    Row(Vec<usize>),
    Tree(Vec<Act>),
}

impl Order {
    /// The order in which `algorithm` combines what `rank` owns.
    fn of(algorithm: Algorithm, Place { rank, size, .. }: Place) -> Self {
        if size == 2 || !matches!(algorithm, Algorithm::HalvingDoubling | Algorithm::Doubling) {
            // Around the ring, beginning with the right neighbour.
            return Self::Row((1..=size).map(|distance| (rank + distance) % size).collect());
        }
        let players = 1usize << size.ilog2();
        let pairs = size - players;
        let own = if rank < 2 * pairs { rank / 2 } else { rank - pairs };
        // The distances of all steps, the last one first.
        let mut distances: Vec<usize> = (0..players.ilog2()).map(|step| 1 << step).collect();
        if algorithm == Algorithm::Doubling {
            distances.reverse();
        }
        let mut acts = vec![];
        value(own, &distances, pairs, &mut acts);
        Self::Tree(acts)
    }
}

/// What the rank in `place` has after the steps of `distances`, of which the last one comes first.
fn value(place: usize, distances: &[usize], pairs: usize, acts: &mut Vec<Act>) {
    let Some((distance, before)) = distances.split_first() else {
        // Ranks beyond a power of two have given theirs to a neighbour first.
        match place < pairs {
            true => acts.extend([Act::Push(2 * place), Act::Push(2 * place + 1), Act::Combine]),
            false => acts.push(Act::Push(place + pairs)),
        }
        return;
    };
    value(place ^ distance, before, pairs, acts);
    value(place, before, pairs, acts);
    acts.push(Act::Combine);
}

/// Most vectors that `acts` have on the stack.
fn depth(acts: &[Act]) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for act in acts {
        now = if matches!(act, Act::Push(_)) { now + 1 } else { now - 1 };
        most = most.max(now);
    }
    most
}

/// How numbers become wider, and a wider one a number again.
pub(super) type Widths<T, W> = (fn(&mut [W], &[T]), fn(&mut [T], &[W]));

/// Combines the numbers of all ranks in the wider type `W`.
struct Combiner<T, W> {
    order: Order,
    op: ReduceOp,
    place: Place,
    widths: Widths<T, W>,
}

impl<T: Element, W: Element> Combiner<T, W> {
    /// `own` becomes the reduction of itself and of what the other ranks have sent, by rank.
    fn combine(&self, own: &mut [T], theirs: &[&[T]]) {
        match &self.order {
            Order::Row(ranks) => self.combine_row(ranks, own, theirs),
            Order::Tree(acts) => self.combine_tree(acts, own, theirs),
        }
    }

    /// In one pass: the kernel combines in the wider type by itself.
    fn combine_row(&self, ranks: &[usize], own: &mut [T], theirs: &[&[T]]) {
        let mut memory = [T::zeroed(); BLOCK];
        for (index, own) in own.chunks_mut(BLOCK).enumerate() {
            let (start, result) = (index * BLOCK, &mut memory[..own.len()]);
            let numbers = |&rank: &usize| match rank == self.place.rank {
                true => &*own,
                false => &theirs[rank][start..start + own.len()],
            };
            let parts: Vec<&[T]> = ranks.iter().map(numbers).collect();
            kernel::reduce(result, &parts, self.op);
            own.copy_from_slice(result);
        }
    }

    fn combine_tree(&self, acts: &[Act], own: &mut [T], theirs: &[&[T]]) {
        let depth = depth(acts);
        let (widen, narrow) = self.widths;
        let mut memory = vec![W::zeroed(); depth * BLOCK];
        for (index, own) in own.chunks_mut(BLOCK).enumerate() {
            let (start, len) = (index * BLOCK, own.len());
            let mut height = 0;
            for act in acts {
                match *act {
                    Act::Push(rank) => {
                        let numbers =
                            if rank == self.place.rank { &*own } else { &theirs[rank][start..start + len] };
                        widen(&mut memory[height * BLOCK..][..len], numbers);
                        height += 1;
                    }
                    Act::Combine => {
                        let (lower, upper) = memory.split_at_mut((height - 1) * BLOCK);
                        let lower = &mut lower[(height - 2) * BLOCK..][..len];
                        let upper = &mut upper[..len];
                        kernel::combine(upper, lower, self.op, false);
                        lower.copy_from_slice(upper);
                        height -= 1;
                    }
                }
            }
            let result = &mut memory[..len];
            if self.op == ReduceOp::Mean {
                kernel::divide(result, self.place.size);
            }
            narrow(own, result);
        }
    }
}

/// Whether `algorithm` can be carried out so by `place.size` ranks, of which each owns `bytes` of numbers.
fn pays(algorithm: Algorithm, size: usize, bytes: usize) -> bool {
    match algorithm {
        Algorithm::Ring | Algorithm::HalvingDoubling => size <= MOST_SHORT || bytes >= SHORT,
        Algorithm::Doubling => size <= FEW,
        // Two ranks have one order.
        Algorithm::Tree => size == 2,
        _ => false,
    }
}

/// An operation in which owners combine in the type `W`.
pub(super) struct Owners<T, W> {
    algorithm: Algorithm,
    widths: Widths<T, W>,
}

impl<T: Element, W: Element> Owners<T, W> {
    /// For an operation on `bytes` of numbers in which `algorithm` would combine, where this costs less.
    pub(super) fn instead_of(
        algorithm: Algorithm,
        size: usize,
        bytes: usize,
        widths: Widths<T, W>,
    ) -> Option<Self> {
        pays(algorithm, size, bytes / size.max(1)).then_some(Self { algorithm, widths })
    }

    /// Leaves the reduction of all ranks' `data`, which is cut into `segment`s, in everyone's.
    pub(super) fn all_reduce(
        &self,
        session: &mut Session<'_>,
        segment: &dyn Fn(usize) -> Range<usize>,
        data: &mut [T],
    ) -> Result<()> {
        let (place, len) = (place::<T>(session), data.len());
        let mut schedule = place.schedule();
        if matches!(self.algorithm, Algorithm::Doubling | Algorithm::Tree) {
            // Everyone owns everything.
            for peer in place.others() {
                let sent = schedule.add(peer, What::Send, 0..len, None);
                schedule.add(peer, What::Part, 0..len, Some(&sent));
            }
        } else {
            // A ring ends with the sum of the right neighbour's segment.
            let next = usize::from(self.algorithm == Algorithm::Ring);
            let owned = |rank: usize| segment((rank + next) % place.size);
            let parts = scatter(&mut schedule, place, What::Send, &owned, owned(place.rank));
            // A rank gets no result before its owner has everyone's part, so nothing is overwritten that is yet to be sent.
            for (to, from) in pairs(place) {
                schedule.add(to, What::Send, owned(place.rank), parts.as_ref());
                schedule.add(from, What::Copy, owned(from), None);
            }
        }
        self.run(session, &schedule, Numbers { input: &[], working: data })
    }

    /// Leaves the reduction of everyone's `rank`-th part of `input` in `output`.
    pub(super) fn reduce_scatter(
        &self,
        session: &mut Session<'_>,
        parts: &Parts,
        input: &[T],
        output: &mut [T],
    ) -> Result<()> {
        let place = place::<T>(session);
        let own = 0..output.len();
        output.copy_from_slice(&input[parts.get(place.rank)]);
        let mut schedule = place.schedule();
        scatter(&mut schedule, place, What::SendInput, &|rank| parts.get(rank), own);
        self.run(session, &schedule, Numbers { input, working: output })
    }

    fn run(&self, session: &mut Session<'_>, schedule: &Schedule, numbers: Numbers<'_, T>) -> Result<()> {
        let (op, place) = (session.call.op, session.place::<T>());
        let combiner = Combiner { order: Order::of(self.algorithm, place), op, place, widths: self.widths };
        run_combining(session, schedule, numbers, &|own, theirs| combiner.combine(own, theirs))
    }
}

/// With chunks of a length of which one from every peer stays in the cache.
fn place<T>(session: &Session<'_>) -> Place {
    let place = session.place::<T>();
    Place { chunk: (place.chunk / (place.size - 1)).max(1), ..place }
}

/// Whom this rank sends to and receives from in each step, so that not all send to the same rank at once.
fn pairs(Place { rank, size, .. }: Place) -> impl Iterator<Item = (usize, usize)> {
    (1..size).map(move |step| ((rank + step) % size, (rank + size - step) % size))
}

/// Sends every part to its owner, and receives everyone's numbers for `own`.
fn scatter(
    schedule: &mut Schedule,
    place: Place,
    send: What,
    owned: &dyn Fn(usize) -> Range<usize>,
    own: Range<usize>,
) -> Option<Run> {
    let mut parts = None;
    for (to, from) in pairs(place) {
        schedule.add(to, send, owned(to), None);
        // The parts of all peers become one at the same time.
        parts = Some(schedule.add(from, What::Part, own.clone(), None));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(first: &str, second: &str) -> String {
        // The sum of two numbers does not depend on their order.
        let (first, second) = if first < second { (first, second) } else { (second, first) };
        format!("({first}+{second})")
    }

    /// What each place has after folding and the steps with these distances.
    fn steps(size: usize, distances: &[usize]) -> Vec<String> {
        let players = 1usize << size.ilog2();
        let pairs = size - players;
        let first = |place: usize| match place < pairs {
            true => both(&format!("{:02}", 2 * place), &format!("{:02}", 2 * place + 1)),
            false => format!("{:02}", place + pairs),
        };
        let mut values: Vec<String> = (0..players).map(first).collect();
        for distance in distances {
            values = (0..players).map(|place| both(&values[place], &values[place ^ distance])).collect();
        }
        values
    }

    #[test]
    fn owners_combine_in_the_order_of_halving_and_doubling() {
        for size in 3..20usize {
            let up: Vec<usize> = (0..size.ilog2()).map(|step| 1 << step).collect();
            let down: Vec<usize> = up.iter().rev().copied().collect();
            for (algorithm, distances) in [(Algorithm::Doubling, &up), (Algorithm::HalvingDoubling, &down)] {
                let expected = steps(size, distances);
                for rank in 0..size {
                    let Order::Tree(acts) = Order::of(algorithm, Place { rank, size, chunk: 1 }) else {
                        panic!("{algorithm} is a tree");
                    };
                    let mut stack: Vec<String> = vec![];
                    for act in acts {
                        let top = match act {
                            Act::Push(rank) => format!("{rank:02}"),
                            Act::Combine => both(&stack.pop().unwrap(), &stack.pop().unwrap()),
                        };
                        stack.push(top);
                    }
                    assert!(stack.len() == 1 && expected.iter().all(|value| *value == stack[0]), "{size}");
                }
            }
        }
    }
}
