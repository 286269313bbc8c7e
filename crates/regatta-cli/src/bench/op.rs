//! The operations that are measured: what they move, how they are called, and their correct results.

use regatta_comm::{Element, Group, Kind, ReduceOp, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An operation. Its root, if it has one, is rank 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    AllReduce,
    Reduce,
    ReduceScatter,
    AllGather,
    Gather,
    Scatter,
    Broadcast,
    AllToAll,
    Barrier,
    /// Even ranks send to the next odd one.
    SendRecv,
}

impl Op {
    pub const ALL: [Self; 10] = [
        Self::AllReduce,
        Self::Reduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Gather,
        Self::Scatter,
        Self::Broadcast,
        Self::AllToAll,
        Self::Barrier,
        Self::SendRecv,
    ];

    pub fn kind(self) -> Kind {
        match self {
            Self::AllReduce => Kind::AllReduce,
            Self::Reduce => Kind::Reduce,
            Self::ReduceScatter => Kind::ReduceScatter,
            Self::AllGather => Kind::AllGather,
            Self::Gather => Kind::Gather,
            Self::Scatter => Kind::Scatter,
            Self::Broadcast => Kind::Broadcast,
            Self::AllToAll => Kind::AllToAll,
            Self::Barrier => Kind::Barrier,
            Self::SendRecv => Kind::Send,
        }
    }

    pub fn name(self) -> &'static str {
        if self == Self::SendRecv { "send_recv" } else { self.kind().name() }
    }

    /// Whether one of its buffers has a part for each rank.
    pub fn in_parts(self) -> bool {
        use Op::{AllGather, AllToAll, Gather, ReduceScatter, Scatter};
        matches!(self, ReduceScatter | AllGather | Gather | Scatter | AllToAll)
    }

    /// Elements of the larger side on `ranks` ranks, close to `wanted`: a whole number of equal parts that are not
    /// empty.
    pub fn elements(self, wanted: usize, ranks: usize) -> usize {
        match self {
            Self::Barrier => 0,
            _ if self.in_parts() && wanted > 0 => (wanted / ranks).max(1) * ranks,
            _ => wanted,
        }
    }

    /// Bytes that cross each rank's link per byte of data, as nccl-tests define bus bandwidth (PERFORMANCE.md there).
    pub fn bus_factor(self, ranks: usize) -> f64 {
        let n = ranks as f64;
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::ReduceScatter | Self::AllGather | Self::AllToAll => (n - 1.0) / n,
            _ => 1.0,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|op| op.name() == text).ok_or_else(|| {
            format!("unknown operation `{text}`; known are all, {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

/// The buffers of one rank for one operation.
pub struct Buffers<'a, T> {
    /// The larger buffer.
    pub whole: &'a mut [T],
    /// The smaller buffer, for operations in parts.
    pub part: &'a mut [T],
    /// The output of all_to_all, as large as `whole`.
    pub other: &'a mut [T],
}

impl<T: Element> Buffers<'_, T> {
    /// Carries out `op` once.
    pub fn run(&mut self, op: Op, group: &Group) -> Result<()> {
        let Self { whole, part, other } = self;
        let (rank, n) = (group.rank(), group.size());
        match op {
            Op::AllReduce => group.all_reduce(whole, ReduceOp::Sum),
            Op::Reduce => group.reduce(whole, ReduceOp::Sum, 0),
            Op::ReduceScatter => group.reduce_scatter(whole, part, ReduceOp::Sum),
            Op::AllGather => group.all_gather(part, whole),
            Op::Gather => group.gather(part, whole, 0),
            Op::Scatter => group.scatter(whole, part, 0),
            Op::Broadcast => group.broadcast(whole, 0),
            Op::AllToAll => group.all_to_all(whole, other),
            Op::Barrier => group.barrier(),
            Op::SendRecv if !rank.is_multiple_of(2) => group.recv(whole, rank - 1),
            Op::SendRecv if rank + 1 < n => group.send(whole, rank + 1),
            Op::SendRecv => Ok(()),
        }
    }

    /// Fills in the inputs for which [`wrong`](Self::wrong) knows the results.
    pub fn fill(&mut self, rank: usize) {
        for side in [&mut *self.whole, &mut *self.part] {
            side.iter_mut().enumerate().for_each(|(index, x)| *x = T::from_f64(value(rank, index)));
        }
        self.other.fill(T::zeroed());
    }

    /// How many numbers differ from the correct result of `op` on the inputs of [`fill`](Self::fill).
    pub fn wrong(&self, op: Op, rank: usize, ranks: usize) -> usize {
        let share = self.part.len().max(1);
        let sum = |index| (0..ranks).map(|rank| value(rank, index)).sum();
        let count = |side: &[T], expected: &dyn Fn(usize) -> f64| {
            let wrong = |(index, x): &(usize, &T)| x.to_f64() != T::from_f64(expected(*index)).to_f64();
            side.iter().enumerate().filter(wrong).count()
        };
        match op {
            Op::AllReduce => count(self.whole, &sum),
            Op::Reduce if rank == 0 => count(self.whole, &sum),
            Op::ReduceScatter => count(self.part, &|index| sum(rank * share + index)),
            Op::AllGather => count(self.whole, &|index| value(index / share, index % share)),
            Op::Gather if rank == 0 => count(self.whole, &|index| value(index / share, index % share)),
            Op::Scatter => count(self.part, &|index| value(0, rank * share + index)),
            Op::Broadcast => count(self.whole, &|index| value(0, index)),
            Op::AllToAll => count(self.other, &|index| value(index / share, rank * share + index % share)),
            Op::SendRecv if !rank.is_multiple_of(2) => count(self.whole, &|index| value(rank - 1, index)),
            // Ranks without an output keep their inputs.
            Op::Reduce | Op::Gather | Op::SendRecv => count(self.whole, &|index| value(rank, index)),
            Op::Barrier => 0,
        }
    }
}

/// Small integers: their sums are exact in every type, except for one rounding at the end.
fn value(rank: usize, index: usize) -> f64 {
    // Multiplicative hashing (Knuth, volume 3): neighbours in either direction differ.
    let mixed =
        (index as u32).wrapping_mul(2_654_435_761).wrapping_add((rank as u32).wrapping_mul(1_640_531_527));
    f64::from(mixed >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_and_never_empty() {
        assert_eq!(Op::AllGather.elements(256, 3), 255);
        assert_eq!(Op::AllGather.elements(1, 3), 3);
        assert_eq!([Op::AllGather.elements(0, 3), Op::Barrier.elements(9, 3)], [0, 0]);
        assert_eq!(Op::AllReduce.elements(1, 3), 1);
    }

    #[test]
    fn wrong_numbers_are_counted() {
        let groups = Group::threads(3);
        let count = |group: &Group, op: Op, spoil: bool| {
            let (mut whole, mut part, mut other) = ([0f32; 12], [0f32; 4], [0f32; 12]);
            let mut buffers = Buffers { whole: &mut whole, part: &mut part, other: &mut other };
            buffers.fill(group.rank());
            buffers.run(op, group).unwrap();
            if spoil {
                [&mut *buffers.whole, buffers.part, buffers.other]
                    .into_iter()
                    .for_each(|side| side[2] += 1.0);
            }
            buffers.wrong(op, group.rank(), 3)
        };
        std::thread::scope(|scope| {
            for group in &groups {
                scope.spawn(move || {
                    for op in Op::ALL {
                        assert_eq!(count(group, op, false), 0, "{op}");
                        assert_eq!(count(group, op, true), usize::from(op != Op::Barrier), "{op}");
                    }
                });
            }
        });
    }
}
