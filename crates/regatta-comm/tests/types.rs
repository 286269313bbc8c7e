//! Truth values, unsigned and short integers and complex numbers through every operation, and numbers whose type is
//! known only when the program runs, against plain references.

mod common;

use common::{WAYS, Way, run};
use regatta_comm::{
    Algorithm, Bool, Buffer, Complex, DType, Element, Error, Group, Operation, RawBuffer, ReduceOp,
    TransportKind, Typed, bf16,
};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);

/// A type with a plain reference for its reductions.
trait Plain: Element {
    /// Any number of the type: its sums and products wrap around, or are exact.
    fn number(seed: u64) -> Self;
    fn reduced(op: ReduceOp, values: &[Self]) -> Self;
}

macro_rules! integers {
    ($($type:ty),*) => {
        $(impl Plain for $type {
            fn number(seed: u64) -> Self { (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7) as $type }
            fn reduced(op: ReduceOp, values: &[Self]) -> Self {
                let values = values.iter().copied();
                match op {
                    ReduceOp::Sum => values.fold(0, <$type>::wrapping_add),
                    ReduceOp::Product => values.fold(1, <$type>::wrapping_mul),
                    ReduceOp::Mean => {
                        let count = values.len() as i128;
                        (values.map(i128::from).sum::<i128>() / count) as $type
                    }
                    ReduceOp::Min => values.min().unwrap(),
                    ReduceOp::Max => values.max().unwrap(),
                    ReduceOp::And => values.fold(!0, |all, value| all & value),
                    _ => values.fold(0, |all, value| all | value),
                }
            }
        })*
    };
}

integers!(i16, u16, u32, u64, u8, i64);

impl Plain for Bool {
    fn number(seed: u64) -> Self {
        // True is any byte but 0.
        bytemuck::cast([0u8, 1, 2, 4][(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize % 4])
    }
    fn reduced(op: ReduceOp, values: &[Self]) -> Self {
        match op {
            ReduceOp::And | ReduceOp::Min => values.iter().all(|&value| value.into()).into(),
            _ => values.iter().any(|&value| value.into()).into(),
        }
    }
}

macro_rules! complex {
    ($($part:ty),*) => {
        $(impl Plain for Complex<$part> {
            fn number(seed: u64) -> Self {
                Complex::new((seed % 3) as $part - 1.0, (seed / 3 % 3) as $part)
            }
            fn reduced(op: ReduceOp, values: &[Self]) -> Self {
                let sum = |parts: &dyn Fn(&Self) -> $part| values.iter().map(parts).sum::<$part>();
                let (re, im) = (sum(&|value| value.re()), sum(&|value| value.im()));
                let ranks = values.len() as $part;
                match op {
                    ReduceOp::Sum => Complex::new(re, im),
                    ReduceOp::Mean => Complex::new(re / ranks, im / ranks),
                    _ => values.iter().fold(Complex::new(1.0, 0.0), |a, b| {
                        Complex::new(a.re() * b.re() - a.im() * b.im(), a.re() * b.im() + a.im() * b.re())
                    }),
                }
            }
        })*
    };
}

complex!(f32, f64);

fn numbers<T: Plain>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|index| T::number((rank * 31 + index * 7) as u64)).collect()
}

/// The reduction of all ranks' numbers from the one at `from` on.
fn reduced<T: Plain>(op: ReduceOp, size: usize, from: usize, len: usize) -> Vec<T> {
    let all: Vec<Vec<T>> = (0..size).map(|rank| numbers(rank, from + len)).collect();
    let at = |index: usize| all.iter().map(|numbers| numbers[index]).collect::<Vec<T>>();
    (from..from + len).map(|index| T::reduced(op, &at(index))).collect()
}

/// Every reduction of numbers of one type; whether the type has it is told by an error.
struct Reductions<'a>(&'a Group, usize);

impl Reductions<'_> {
    fn check<T: Plain>(&self) {
        let (&Self(group, len), dtype) = (self, T::DTYPE);
        let (rank, size, root) = (group.rank(), group.size(), len % group.size());
        let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
        let (total, before) = (counts.iter().sum(), counts[..rank].iter().sum());
        for &op in ReduceOp::ALL.iter().filter(|op| **op != ReduceOp::Adasum) {
            let name = format!("{group:?} {dtype} {op} {len}");
            let mut data = numbers::<T>(rank, len);
            if !op.suits(dtype) {
                let error = group.all_reduce(&mut data, op).unwrap_err();
                assert!(matches!(error, Error::Usage(_)), "{name}: {error}");
                continue;
            }
            group.all_reduce(&mut data, op).unwrap();
            assert_eq!(data, reduced(op, size, 0, len), "all_reduce {name}");
            let mut data = numbers::<T>(rank, len);
            group.reduce(&mut data, op, root).unwrap();
            let right = if rank == root { reduced(op, size, 0, len) } else { numbers(rank, len) };
            assert_eq!(data, right, "reduce {name}");
            let mut part = vec![T::zeroed(); len];
            group.reduce_scatter(&numbers::<T>(rank, len * size), &mut part, op).unwrap();
            assert_eq!(part, reduced(op, size, rank * len, len), "reduce_scatter {name}");
            let mut part = vec![T::zeroed(); counts[rank]];
            group.reduce_scatter_v(&numbers::<T>(rank, total), &mut part, &counts, op).unwrap();
            assert_eq!(part, reduced(op, size, before, counts[rank]), "reduce_scatter_v {name}");
            let (mut a, mut b) = (numbers::<T>(rank, len), numbers::<T>(rank, 3));
            group.all_reduce_grouped(&mut [&mut a, &mut b], op).unwrap();
            assert_eq!((a, b), (reduced(op, size, 0, len), reduced(op, size, 0, 3)), "grouped {name}");
        }
    }
}

/// An operation, its input, and its output before and after.
type Case<T> = (Operation, Option<Vec<T>>, Vec<T>, Vec<T>);

/// Every operation that only moves numbers, called by type and by [`Operation`]: both must do the same, and meet.
fn moves<T: Plain>(group: &Group, len: usize) {
    let (rank, size, root) = (group.rank(), group.size(), len % group.size());
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let total: usize = counts.iter().sum();
    let even: Vec<T> = (0..size).flat_map(|rank| numbers::<T>(rank, len)).collect();
    let uneven: Vec<T> = (0..size).flat_map(|rank| numbers::<T>(rank, counts[rank])).collect();
    let zeros = |len: usize| vec![T::zeroed(); len];
    let sends: Vec<usize> = (0..size).map(|to| (len + 5 * rank + 3 * to) % (len + 2)).collect();
    let receives: Vec<usize> = (0..size).map(|from| (len + 5 * from + 3 * rank) % (len + 2)).collect();
    let sent: Vec<T> = sends.iter().flat_map(|&count| numbers::<T>(rank, count)).collect();
    let came: Vec<T> = (0..size).flat_map(|from| numbers::<T>(from, receives[from])).collect();
    let own = || numbers::<T>(rank, len);
    let at_root = |whole: &[T]| if rank == root { whole.to_vec() } else { vec![] };
    let mut placed = zeros(len * size);
    placed[rank * len..][..len].copy_from_slice(&own());
    let blocks: Vec<T> = (0..size).flat_map(|_| own()).collect();
    let cases: Vec<Case<T>> = vec![
        (Operation::broadcast(root), None, own(), numbers(root, len)),
        (Operation::all_gather(), Some(own()), zeros(len * size), even.clone()),
        (Operation::all_gather(), None, placed, even.clone()),
        (
            Operation::all_gather().counts(&counts),
            Some(numbers(rank, counts[rank])),
            zeros(total),
            uneven.clone(),
        ),
        (Operation::gather(root), Some(own()), at_root(&zeros(len * size)), at_root(&even)),
        (
            Operation::gather(root).counts(&counts),
            Some(numbers(rank, counts[rank])),
            at_root(&zeros(total)),
            at_root(&uneven),
        ),
        (Operation::scatter(root), Some(at_root(&even)), zeros(len), own()),
        (
            Operation::scatter(root).counts(&counts),
            Some(at_root(&uneven)),
            zeros(counts[rank]),
            numbers(rank, counts[rank]),
        ),
        (Operation::all_to_all(), Some(blocks), zeros(len * size), even.clone()),
        (Operation::all_to_all_v(&sends, &receives), Some(sent), zeros(came.len()), came),
    ];
    for (number, (operation, input, before, right)) in cases.into_iter().enumerate() {
        let name = format!("{group:?} {} {len} {operation:?}", T::DTYPE);
        let mut output = before.clone();
        match (number, &input) {
            (0, _) => group.broadcast(&mut output, root).unwrap(),
            (1, Some(input)) => group.all_gather(input, &mut output).unwrap(),
            (2, _) => group.all_gather_in_place(&mut output).unwrap(),
            (3, Some(input)) => group.all_gather_v(input, &mut output, &counts).unwrap(),
            (4, Some(input)) => group.gather(input, &mut output, root).unwrap(),
            (5, Some(input)) => group.gather_v(input, &mut output, &counts, root).unwrap(),
            (6, Some(input)) => group.scatter(input, &mut output, root).unwrap(),
            (7, Some(input)) => group.scatter_v(input, &mut output, &counts, root).unwrap(),
            (8, Some(input)) => group.all_to_all(input, &mut output).unwrap(),
            (_, Some(input)) => group.all_to_all_v(input, &sends, &mut output, &receives).unwrap(),
            (_, None) => unreachable!(),
        }
        assert_eq!(output, right, "{name}");
        let (input, mut output) = (input.map(RawBuffer::from), RawBuffer::from(before.clone()));
        group.run(&operation, input.as_ref(), Some(&mut output)).unwrap();
        assert_eq!(output.as_slice(), Some(&right[..]), "run {name}");
        let output = RawBuffer::from(Buffer::from(before));
        let (_, output) = group.run_async(operation, input, Some(output)).wait().unwrap();
        assert_eq!(output.unwrap().as_slice(), Some(&right[..]), "run_async {name}");
    }
    // One rank calls by type, its partner by operation.
    let partner = rank ^ 1;
    if partner < size {
        let mut theirs = RawBuffer::from(zeros(len));
        if rank < partner {
            group.send(&own(), partner).unwrap();
            group.run(&Operation::recv(partner), None, Some(&mut theirs)).unwrap();
        } else {
            group.run(&Operation::recv(partner), None, Some(&mut theirs)).unwrap();
            group.run(&Operation::send(partner), Some(&own().into()), None).unwrap();
        }
        assert_eq!(theirs.as_slice(), Some(&numbers::<T>(partner, len)[..]));
    }
    match rank % 2 {
        0 => group.barrier().unwrap(),
        _ => group.run(&Operation::barrier(), None, None).unwrap(),
    }
}

fn all_types(group: &Group, len: usize) {
    let reductions = Reductions(group, len);
    reductions.check::<Bool>();
    reductions.check::<i16>();
    reductions.check::<u16>();
    reductions.check::<u32>();
    reductions.check::<u64>();
    moves::<Bool>(group, len);
    moves::<i16>(group, len);
    moves::<u16>(group, len);
    moves::<u32>(group, len);
    moves::<u64>(group, len);
    moves::<Complex<f32>>(group, len);
    moves::<Complex<f64>>(group, len);
    moves::<u8>(group, len);
    // Means by 2 and 4 are exact.
    if group.size().is_power_of_two() {
        reductions.check::<Complex<f32>>();
        reductions.check::<Complex<f64>>();
    }
}

fn all_ways() -> Vec<Way> {
    let forced = Algorithm::ALL.iter().map(|&algorithm| (TransportKind::Thread, Some(algorithm)));
    forced.chain(WAYS).chain([(TransportKind::Mixed, Some(Algorithm::Hierarchical))]).collect()
}

#[test]
fn every_type_through_every_operation() {
    for way in all_ways() {
        for size in [1, 2, 3, 4, 5] {
            run(way, size, DEADLINE, |group| {
                for len in [0, 37, if size == 3 { 5001 } else { 1 }] {
                    all_types(&group, len);
                }
            });
        }
    }
}

#[test]
fn means_of_the_largest_numbers_are_exact() {
    for way in all_ways() {
        run(way, 3, DEADLINE, |group| {
            let mut data = [u64::MAX, u64::MAX - group.rank() as u64, group.rank() as u64];
            group.all_reduce(&mut data, ReduceOp::Mean).unwrap();
            assert_eq!(data, [u64::MAX, u64::MAX - 1, 1], "{group:?}");
            let mut data = [u32::MAX; 2];
            group.all_reduce(&mut data, ReduceOp::Mean).unwrap();
            assert_eq!(data, [u32::MAX; 2], "{group:?}");
        });
    }
}

/// Reduces numbers by type and by operation, blocking and in the background.
struct BothWays<'a>(&'a Group, ReduceOp);

impl Typed for BothWays<'_> {
    type Output = ();

    fn call<T: Element>(self) {
        let Self(group, op) = self;
        let (rank, size) = (group.rank(), group.size());
        let numbers = |len: usize| {
            let number = |index: usize| T::from_f64(((rank * 5 + index * 7) % 11) as f64 * 0.7);
            (0..len).map(number).collect::<Vec<T>>()
        };
        let scaled = op.scaled_before(0.5).scaled_after_too(3.0);
        for reduction in [op.into(), scaled] {
            let mut right = numbers(1001);
            group.all_reduce(&mut right, reduction).unwrap();
            let all_reduce = Operation::all_reduce(reduction);
            let mut data = RawBuffer::from(numbers(1001));
            group.run(&all_reduce, None, Some(&mut data)).unwrap();
            assert_eq!(data.as_slice(), Some(&right[..]), "{group:?} {} {op}", T::DTYPE);
            let mut buffer = group.buffer::<T>(1001).unwrap();
            buffer.copy_from_slice(&numbers(1001));
            let pending = group.run_async(all_reduce, None, Some(buffer.into()));
            let (_, data) = pending.wait().unwrap();
            let buffer = data.unwrap().into_owner().downcast::<Buffer<T>>().unwrap();
            assert_eq!(buffer[..], right[..]);

            let mut right = vec![T::zeroed(); 50];
            group.reduce_scatter(&numbers(50 * size), &mut right, reduction).unwrap();
            let (input, mut part) = (numbers(50 * size).into(), group.raw_buffer(T::DTYPE, 50).unwrap());
            group.run(&Operation::reduce_scatter(reduction), Some(&input), Some(&mut part)).unwrap();
            assert_eq!(part.as_slice(), Some(&right[..]));

            let mut right = numbers(60);
            group.reduce(&mut right, reduction, 1).unwrap();
            let mut data = RawBuffer::from(numbers(60));
            group.run(&Operation::reduce(reduction, 1), None, Some(&mut data)).unwrap();
            assert_eq!(data.as_slice(), Some(&right[..]));
        }
    }
}

trait Both {
    fn scaled_after_too(self, after: f64) -> Self;
}

impl Both for regatta_comm::Reduction {
    fn scaled_after_too(mut self, after: f64) -> Self {
        self.after = after;
        self
    }
}

#[test]
fn an_operation_on_raw_memory_is_the_one_on_typed_memory() {
    for way in WAYS {
        run(way, 3, DEADLINE, |group| {
            for &dtype in DType::ALL {
                for &op in ReduceOp::ALL.iter().filter(|op| op.suits(dtype) && **op != ReduceOp::Adasum) {
                    dtype.with(BothWays(&group, op));
                }
            }
        });
    }
}

#[test]
fn memory_that_does_not_fit_the_operation_is_refused_and_the_group_lives_on() {
    run(WAYS[0], 2, DEADLINE, |group| {
        let of = |len: usize| RawBuffer::from(vec![1.0f32; len]);
        let refused = |operation: Operation, input: Option<RawBuffer>, output: Option<RawBuffer>| {
            let mut output = output;
            let error = group.run(&operation, input.as_ref(), output.as_mut()).unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{error}");
            error.to_string()
        };
        let sum = || Operation::all_reduce(ReduceOp::Sum);
        for (error, why) in [
            (refused(sum(), None, None), "gave no output"),
            (refused(sum(), Some(of(2)), Some(of(2))), "uses no input"),
            (refused(sum().counts(&[1, 1]), None, Some(of(2))), "no parts"),
            (refused(Operation::barrier(), Some(of(1)), None), "uses no input"),
            (refused(Operation::all_to_all(), Some(of(4)), None), "gave no output"),
            (refused(Operation::recv(group.rank()), None, Some(of(1))), "itself"),
            (refused(Operation::send(7), Some(of(1)), None), "no rank 7"),
            (
                refused(Operation::all_gather(), Some(of(1)), Some(vec![bf16::ZERO; 2].into())),
                "numbers are f32, the output's are bf16",
            ),
        ] {
            assert!(error.contains(why), "{error}");
        }
        let mut data = of(1);
        group.run(&sum(), None, Some(&mut data)).unwrap();
        assert_eq!(data.as_slice(), Some(&[2.0f32][..]));
    });
}
