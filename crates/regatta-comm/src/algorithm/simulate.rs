//! Operations that bytes describe, by ranks on a [simulated](crate::transport::simulated) network, against a plain
//! reference: for tests of the algorithms over streams.

use super::Algorithm;
use super::parts::Parts;
use super::streams;
use crate::algorithm::session::Session;
use crate::error::Result;
use crate::member::call::{Call, Kind};
use crate::member::context::Context;
use crate::member::health::Health;
use crate::member::joining::Joining;
use crate::member::notes::Notes;
use crate::member::recorder::Recorder;
use crate::numbers::element::{self, DType, Element, ReduceOp};
use crate::transport::simulated::{Garbled, Network};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Every operation with every algorithm over streams that offers it.
const WAYS: [(Kind, Algorithm); 15] = [
    (Kind::AllReduce, Algorithm::Ring),
    (Kind::AllReduce, Algorithm::Tree),
    (Kind::AllReduce, Algorithm::HalvingDoubling),
    (Kind::AllReduce, Algorithm::Doubling),
    (Kind::Reduce, Algorithm::Ring),
    (Kind::Reduce, Algorithm::Tree),
    (Kind::ReduceScatter, Algorithm::Ring),
    (Kind::ReduceScatter, Algorithm::HalvingDoubling),
    (Kind::AllGather, Algorithm::Ring),
    (Kind::AllGather, Algorithm::HalvingDoubling),
    (Kind::Broadcast, Algorithm::Ring),
    (Kind::Broadcast, Algorithm::Tree),
    (Kind::AllToAll, Algorithm::Pairwise),
    (Kind::AllToAll, Algorithm::Bruck),
    (Kind::Barrier, Algorithm::Dissemination),
];

/// One operation as one rank calls it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Operation {
    kind: Kind,
    algorithm: Algorithm,
    dtype: DType,
    op: ReduceOp,
    len: usize,
    root: usize,
    /// Parts differ in length from rank to rank.
    uneven: bool,
    /// Numbers that no type holds exactly.
    rough: bool,
}

/// What came of an operation on one rank.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// The plain reference says the same.
    right: bool,
    /// The bits that all ranks must have.
    common: Vec<u8>,
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> usize {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first.into()
    }

    fn operation(&mut self, size: usize) -> Operation {
        let way = self.next() % (WAYS.len() + 2);
        let (kind, algorithm) = *WAYS.get(way).unwrap_or(match way == WAYS.len() {
            true => &(Kind::Gather, Algorithm::Linear),
            false => &(Kind::Scatter, Algorithm::Linear),
        });
        let dtype = DType::ALL[self.next() % DType::ALL.len()];
        let op = ReduceOp::ALL[self.next() % ReduceOp::ALL.len()];
        let suits = op.suits(dtype) && (op != ReduceOp::Adasum || kind == Kind::AllReduce);
        let op = match (suits, dtype) {
            (true, _) => op,
            (false, DType::Bool) => ReduceOp::Or,
            (false, _) => ReduceOp::Sum,
        };
        let (len, flags) = (self.next() % 40, self.next());
        let (uneven, rough) = (flags & 1 != 0 && algorithm != Algorithm::Bruck, flags & 2 != 0);
        Operation { kind, algorithm, dtype, op, len, root: (flags >> 2) % size, uneven, rough }
    }
}

impl Operation {
    /// Elements of each rank's part, where ranks have parts.
    fn counts(&self, size: usize) -> Vec<usize> {
        (0..size).map(|rank| if self.uneven { self.len / (rank + 1) } else { self.len / 4 }).collect()
    }

    /// Elements from one rank to another.
    fn between(&self, from: usize, to: usize) -> usize {
        if self.uneven { (self.len + 5 * from + 3 * to) % (self.len / 4 + 2) } else { self.len / 4 }
    }

    /// `rank`'s `index`-th number.
    fn number(&self, rank: usize, index: usize) -> f64 {
        match self.op {
            ReduceOp::Product => [1.0, 2.0, 1.0, 1.0][(rank + 3 * index) % 4],
            _ if self.rough => ((index * 7919 + rank * 104_729) % 1000) as f64 * 1.1e-2 + rank as f64,
            _ => ((rank * 5 + index * 7) % 11) as f64,
        }
    }

    fn numbers<T: Element>(&self, rank: usize, len: usize) -> Vec<T> {
        (0..len).map(|index| T::from_f64(self.number(rank, index))).collect()
    }

    /// What the `index`-th numbers come to.
    fn reduced<T: Element>(&self, size: usize, index: usize) -> f64 {
        let values = (0..size).map(|rank| T::from_f64(self.number(rank, index)).to_f64());
        match self.op {
            ReduceOp::Sum => values.sum(),
            ReduceOp::Mean if T::DTYPE.is_integer() => (values.sum::<f64>() / size as f64).trunc(),
            ReduceOp::Mean => values.sum::<f64>() / size as f64,
            ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
            ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
            ReduceOp::Product => values.product(),
            ReduceOp::And => values.fold(-1i64, |all, value| all & value as i64) as f64,
            ReduceOp::Or => values.fold(0i64, |all, value| all | value as i64) as f64,
            ReduceOp::Adasum => f64::NAN,
        }
    }

    fn call<T: Element>(&self, session: &mut Session<'_>) -> Result<Outcome> {
        let (rank, size) = (session.context.rank, session.context.size);
        let (len, root, algorithm) = (self.len, self.root, self.algorithm);
        let counts = self.counts(size);
        let parts = Parts::of(&counts);
        let total = parts.get(size - 1).end;
        let all: Vec<T> = (0..size).flat_map(|rank| self.numbers::<T>(rank, counts[rank])).collect();
        let near = |value: f64, right: f64| (value - right).abs() <= 0.02 * right.abs().max(1.0);
        let reduced = |data: &[T], from: usize| {
            let index =
                |(index, value): (usize, &T)| near(value.to_f64(), self.reduced::<T>(size, from + index));
            data.iter().enumerate().all(index)
        };
        let mut common = vec![];
        let right = match self.kind {
            Kind::AllReduce => {
                let mut data = self.numbers::<T>(rank, len);
                streams::all_reduce(session, algorithm, &mut data)?;
                common = bytemuck::cast_slice(&data).to_vec();
                match self.op {
                    ReduceOp::Adasum => {
                        let vectors = (0..size).map(|rank| wide(&self.numbers::<T>(rank, len))).collect();
                        wide(&data).into_iter().zip(adasum(vectors)).all(|(value, right)| near(value, right))
                    }
                    _ => reduced(&data, 0),
                }
            }
            Kind::Reduce => {
                let mut data = self.numbers::<T>(rank, len);
                streams::reduce(session, algorithm, &mut data)?;
                if rank == root { reduced(&data, 0) } else { data == self.numbers(rank, len) }
            }
            Kind::ReduceScatter => {
                let mut output = vec![T::zeroed(); counts[rank]];
                let input = self.numbers::<T>(rank, total);
                streams::reduce_scatter(session, algorithm, &parts, &input, &mut output)?;
                reduced(&output, parts.get(rank).start)
            }
            Kind::AllGather => {
                let mut output = vec![T::zeroed(); total];
                output[parts.get(rank)].copy_from_slice(&self.numbers(rank, counts[rank]));
                streams::all_gather(session, algorithm, &parts, &mut output)?;
                output == all
            }
            Kind::Broadcast => {
                let mut data = self.numbers::<T>(rank, len);
                let root = session.call.root as usize;
                streams::broadcast(session, algorithm, root, &mut data)?;
                data == self.numbers(root, len)
            }
            Kind::Gather => {
                let mut output = vec![T::zeroed(); if rank == root { total } else { 0 }];
                streams::gather(session, &parts, &self.numbers(rank, counts[rank]), &mut output)?;
                rank != root || output == all
            }
            Kind::Scatter => {
                let mut output = vec![T::zeroed(); counts[rank]];
                let input = if rank == root { &all[..] } else { &[] };
                streams::scatter(session, &parts, input, &mut output)?;
                output == self.numbers(rank, counts[rank])
            }
            Kind::AllToAll => {
                let of = |from: usize, to: usize| -> Vec<T> {
                    let numbers = self.numbers::<T>(from, to + self.between(from, to));
                    numbers[to..].to_vec()
                };
                let sends: Vec<usize> = (0..size).map(|to| self.between(rank, to)).collect();
                let receives: Vec<usize> = (0..size).map(|from| self.between(from, rank)).collect();
                let input: Vec<T> = (0..size).flat_map(|to| of(rank, to)).collect();
                let right: Vec<T> = (0..size).flat_map(|from| of(from, rank)).collect();
                let mut output = vec![T::zeroed(); right.len()];
                let parts = (Parts::of(&sends), Parts::of(&receives));
                streams::all_to_all(session, algorithm, (&parts.0, &parts.1), &input, &mut output)?;
                output == right
            }
            Kind::Barrier | Kind::Send | Kind::Join => {
                streams::barrier(session)?;
                true
            }
        };
        Ok(Outcome { right, common })
    }
}

/// An operation in its type of numbers.
struct Typed<'a, 'b>(&'a Operation, &'a mut Session<'b>);

impl element::Typed for Typed<'_, '_> {
    type Output = Result<Outcome>;

    fn call<T: Element>(self) -> Result<Outcome> {
        self.0.call::<T>(self.1)
    }
}

fn wide<T: Element>(data: &[T]) -> Vec<f64> {
    data.iter().map(|x| x.to_f64()).collect()
}

/// The plain adaptive sum: pairs of ranks, pairs of pairs; ranks beyond a power of two go in pairs first.
fn adasum(mut vectors: Vec<Vec<f64>>) -> Vec<f64> {
    let both = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let factor = |square: f64| if square == 0.0 { 1.0 } else { 1.0 - dot(a, b) / (2.0 * square) };
        let (fa, fb) = (factor(dot(a, a)), factor(dot(b, b)));
        a.iter().zip(b).map(|(a, b)| fa * a + fb * b).collect::<Vec<f64>>()
    };
    for pair in 0..vectors.len() - (1 << vectors.len().ilog2()) {
        let folded = both(&vectors[pair + 1], &vectors[pair]);
        vectors.splice(pair..pair + 2, [folded]);
    }
    while vectors.len() > 1 {
        vectors = vectors.chunks(2).map(|pair| both(&pair[0], &pair[1])).collect();
    }
    vectors.remove(0)
}

/// A context for what `rank` does alone.
pub(crate) fn context(rank: usize, size: usize) -> Context {
    let health = Arc::<Health>::default();
    // Nobody has news for it, so that it waits for none.
    health.silent();
    Context {
        rank,
        size,
        generation: 0,
        names: (0..size).collect(),
        hosts: Arc::new([]),
        health,
        notes: Arc::new(Notes::new(None, 0, size, rank)),
        recorder: Arc::new(Recorder::default()),
        joining: Arc::new(Joining::new(0)),
        deadline: Duration::from_secs(600),
        warn: Duration::from_secs(600),
        on_late: crate::member::late::OnLate::new(|_| {}),
    }
}

/// Does what `bytes` say: two to five ranks, one to three operations. All ranks must come to the right results without
/// a deadlock; where they call different operations or a byte is garbled, they must end without a panic, and must not
/// take a garbled call for theirs.
pub(crate) fn simulate(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let size = 2 + bytes.next() % 4;
    // What may be on its way is little enough to make every send wait, and most where the byte is missing: ranks take
    // turns a thousand times otherwise.
    let (chunk, capacity) = (256 - bytes.next(), 16 + (255 - bytes.next()).pow(2) / 16);
    let mode = bytes.next();
    let mut calls: Vec<Vec<Operation>> = vec![vec![]; size];
    for _ in 0..1 + mode % 3 {
        let operation = bytes.operation(size);
        calls.iter_mut().for_each(|calls| calls.push(operation));
    }
    let odd = (mode & 0xc0 == 0xc0).then(|| {
        let (rank, operation) = (bytes.next() % size, bytes.operation(size));
        calls[rank][0] = operation;
    });
    let garbled = (mode & 0xc0 == 0x80).then(|| Garbled {
        from: bytes.next() % size,
        to: bytes.next() % size,
        at: bytes.next(),
        mask: bytes.next() as u8,
    });
    let network = Rc::new(Network::new(size, capacity, bytes.0, garbled));
    let each = calls.clone();
    let outcomes: Vec<Result<Vec<Outcome>>> = network.clone().run(move |transport| {
        let (context, mut pool) = (context(transport.rank, size), vec![]);
        let call = |(number, operation): (usize, &Operation)| {
            // Where all parts are alike, their length is agreed on; else all counts.
            let call = Call::new(operation.kind, operation.dtype, operation.len)
                .op(operation.op)
                .root(operation.root)
                .detail(operation.uneven.then_some(1));
            let call = Call { sequence: number as u32 + 1, ..call };
            let (context, pool, sent) = (&context, &mut pool, &mut 0);
            let mut session = Session { transport, context, call, pool, sent, chunk };
            call.dtype.with(Typed(operation, &mut session))
        };
        each[context.rank].iter().enumerate().map(call).collect()
    });
    if odd.is_some() {
        return;
    }
    if let Some(garbled) = garbled {
        let call = garbled.at < crate::member::call::ENCODED && network.is_garbled();
        assert!(
            !call || outcomes.iter().any(Result::is_err),
            "a garbled call was taken: {garbled:?} {calls:?}"
        );
        return;
    }
    assert!(!network.is_stuck(), "a deadlock: {:?}", calls[0]);
    for outcome in &outcomes {
        assert_eq!(outcome, &outcomes[0], "not the same bits on all ranks: {:?}", calls[0]);
        let right = outcome.as_ref().is_ok_and(|outcomes| outcomes.iter().all(|outcome| outcome.right));
        assert!(right, "{outcome:?}: {:?}", calls[0]);
    }
    assert_eq!(network.left(), 0, "bytes that nobody received: {:?}", calls[0]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_operation_over_any_network(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::simulate(&bytes);
        }
    }
}
