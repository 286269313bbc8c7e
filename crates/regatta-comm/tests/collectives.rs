//! Every operation, type, reduction, world size and way of communicating against a plain reference.

mod common;

use common::{WAYS, run};
use proptest::prelude::*;
use regatta_comm::{Algorithm, Buffer, Element, Group, ReduceOp, TransportKind, bf16, f16};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);
const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];

/// A type with a plain f64 on each side; the values used are exact in all types.
trait Plain: Element + PartialEq {
    fn of(value: f64) -> Self;
    fn plain(self) -> f64;
}

macro_rules! plain {
    ($($type:ty: $of:expr, $plain:expr;)*) => {
        $(impl Plain for $type {
            fn of(value: f64) -> Self { $of(value) }
            fn plain(self) -> f64 { $plain(self) }
        })*
    };
}

plain! {
    f32: |x| x as f32, f64::from;
    f64: |x| x, |x| x;
    f16: f16::from_f64, f16::to_f64;
    bf16: bf16::from_f64, bf16::to_f64;
    i32: |x| x as i32, f64::from;
    i64: |x| x as i64, |x| x as f64;
    u8: |x| x as u8, f64::from;
    i8: |x| x as i8, f64::from;
}

/// Rank `rank`'s `index`-th number: small, so that sums and products are exact in every type.
fn number(rank: usize, index: usize, op: ReduceOp) -> f64 {
    match op {
        ReduceOp::Product => [1.0, 2.0, 1.0, 1.0][(rank + 3 * index) % 4],
        _ => ((rank * 5 + index * 7) % 11) as f64,
    }
}

fn reference(size: usize, index: usize, op: ReduceOp, integer: bool) -> f64 {
    let values = (0..size).map(|rank| number(rank, index, op));
    match op {
        ReduceOp::Sum => values.sum(),
        ReduceOp::Mean if integer => (values.sum::<f64>() / size as f64).trunc(),
        ReduceOp::Mean => values.sum::<f64>() / size as f64,
        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
        ReduceOp::Product => values.product(),
    }
}

fn close(a: f64, b: f64, name: &str) {
    // A mean need not be exact in 16 bits.
    assert!((a - b).abs() <= 0.01 * b.abs().max(1.0), "{name}: {a} is not {b}");
}

fn check<T: Plain>(group: &Group, len: usize, op: ReduceOp) {
    let (rank, size) = (group.rank(), group.size());
    let integer = !format!("{}", T::DTYPE).contains('f');
    let mine = |len: usize| (0..len).map(|index| T::of(number(rank, index, op))).collect::<Vec<T>>();
    let name = format!("{group:?} {} {op} {len}", T::DTYPE);

    let mut data = mine(len);
    group.all_reduce(&mut data, op).unwrap();
    for (index, value) in data.iter().enumerate() {
        close(value.plain(), reference(size, index, op, integer), &format!("all_reduce {name}"));
    }

    let input = mine(len * size);
    let mut output = vec![T::of(0.0); len];
    group.reduce_scatter(&input, &mut output, op).unwrap();
    for (index, value) in output.iter().enumerate() {
        close(
            value.plain(),
            reference(size, rank * len + index, op, integer),
            &format!("reduce_scatter {name}"),
        );
    }

    let mut all = vec![T::of(0.0); len * size];
    group.all_gather(&mine(len), &mut all).unwrap();
    for (index, value) in all.iter().enumerate() {
        assert_eq!(value.plain(), number(index / len, index % len, op), "all_gather {name}");
    }

    let root = len % size;
    let mut data = mine(len);
    group.broadcast(&mut data, root).unwrap();
    for (index, value) in data.iter().enumerate() {
        assert_eq!(value.plain(), number(root, index, op), "broadcast {name}");
    }

    group.barrier().unwrap();
    // Pairs: even ranks send first.
    let (partner, even) = (rank ^ 1, rank.is_multiple_of(2));
    if partner < size {
        let mut theirs = vec![T::of(0.0); len];
        for sending in [even, !even] {
            match sending {
                true => group.send(&mine(len), partner).unwrap(),
                false => group.recv(&mut theirs, partner).unwrap(),
            }
        }
        for (index, value) in theirs.iter().enumerate() {
            assert_eq!(value.plain(), number(partner, index, op), "recv {name}");
        }
    }
}

fn check_all(group: &Group, len: usize, op: ReduceOp) {
    check::<f32>(group, len, op);
    check::<f64>(group, len, op);
    check::<f16>(group, len, op);
    check::<bf16>(group, len, op);
    check::<i32>(group, len, op);
    check::<i64>(group, len, op);
    check::<u8>(group, len, op);
    check::<i8>(group, len, op);
}

#[test]
fn every_world_size_type_and_reduction() {
    for way in WAYS {
        for size in 1..=8 {
            run(way, size, DEADLINE, |group| {
                for (number, op) in OPS.into_iter().enumerate() {
                    check_all(&group, [0, 1, 5, 64, 1023][number], op);
                }
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn odd_lengths(way in 0..WAYS.len(), size in 1usize..6, op in 0..OPS.len(), lens in prop::collection::vec(0usize..200_000, 1..4)) {
        run(WAYS[way], size, DEADLINE, |group| {
            for &len in &lens {
                check::<f32>(&group, len, OPS[op]);
                check::<bf16>(&group, len / 7, OPS[op]);
            }
        });
    }
}

/// Numbers whose sum depends on the order of addition.
fn awkward(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + rank * 104_729) % 1000) as f32 * 1.1e-3 + (rank as f32 * 1e3)).collect()
}

#[test]
fn the_same_bits_on_every_rank_and_in_every_run() {
    for way in WAYS {
        let once = || {
            run(way, 3, DEADLINE, |group| {
                let mut private = awkward(group.rank(), 300_001);
                group.all_reduce(&mut private, ReduceOp::Mean).unwrap();
                let mut buffer = group.buffer(300_001).unwrap();
                buffer.copy_from_slice(&awkward(group.rank(), 300_001));
                let buffer = group.all_reduce_async(buffer, ReduceOp::Mean).wait().unwrap();
                let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&private), bits(&buffer), "{group:?}");
                bits(&private)
            })
        };
        let (first, second) = (once(), once());
        assert!(first.iter().chain(&second).all(|bits| *bits == first[0]), "{way:?}");
    }
}

#[test]
fn handles_complete_in_order_of_submission_and_buffers_come_back() {
    for way in WAYS {
        run(way, 3, DEADLINE, |group| {
            assert_eq!(group.buffer::<f32>(10).unwrap().is_registered(), way.0 == TransportKind::Shm);
            let pending: Vec<_> = (0..20)
                .map(|n| {
                    let mut buffer = group.buffer::<f32>(10_000 * (n % 3) + n).unwrap();
                    buffer.fill(n as f32);
                    group.all_reduce_async(buffer, ReduceOp::Sum)
                })
                .collect();
            // A blocking call takes its turn behind them.
            let mut last = [group.rank() as i64];
            group.all_reduce(&mut last, ReduceOp::Max).unwrap();
            assert_eq!(last, [2]);
            for (n, pending) in pending.into_iter().enumerate() {
                assert!(pending.is_done());
                let (buffer, timing) = pending.wait_timed().unwrap();
                assert!(timing.queued <= timing.started && timing.started <= timing.finished);
                assert_eq!(buffer.len(), 10_000 * (n % 3) + n);
                assert!(buffer.iter().all(|&x| x == 3.0 * n as f32));
            }
            let (next, previous) = ((group.rank() + 1) % 3, (group.rank() + 2) % 3);
            let receiving =
                (group.rank() != 0).then(|| group.recv_async(Buffer::from(vec![0u8; 100_000]), previous));
            let sending = (next != 0).then(|| group.send_async(Buffer::from(vec![7u8; 100_000]), next));
            assert!(receiving.is_none_or(|pending| pending.wait().unwrap().iter().all(|&x| x == 7)));
            assert!(sending.is_none_or(|pending| pending.wait().is_ok()));
        });
    }
}

/// One rank's memory: registered where `mask` has its bit, else its own; filled with its numbers.
fn memory(group: &Group, mask: usize, len: usize) -> Buffer<f32> {
    let mut buffer = match mask >> group.rank() & 1 {
        1 => group.buffer(len).unwrap(),
        _ => Buffer::from(vec![0.0; len]),
    };
    assert_eq!(buffer.is_registered(), mask >> group.rank() & 1 == 1);
    buffer.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 1000 + 1000 * group.rank()) as f32);
    buffer
}

#[test]
#[cfg(target_os = "linux")]
fn registered_and_private_memory_mix() {
    for size in [2, 3, 5] {
        run((TransportKind::Shm, Algorithm::Direct), size, DEADLINE, |group| {
            let rank = group.rank();
            let number = |rank: usize, i: usize| (i % 1000 + 1000 * rank) as f32;
            let sum = |i: usize| (0..size).map(|rank| number(rank, i)).sum::<f32>();
            for mask in [0, 0b10101, 0b01110, 0b11111] {
                for len in [0, 1, 5000, 200_001] {
                    let mut data = memory(&group, mask, len);
                    group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                    assert!(data.iter().enumerate().all(|(i, &x)| x == sum(i)), "{mask} {len}");

                    // What is written after a call must not reach those that are still in it.
                    let mut input = memory(&group, mask, len * size);
                    let mut output = memory(&group, !mask & 0b11111, len);
                    group.reduce_scatter(&input, &mut output, ReduceOp::Sum).unwrap();
                    input.fill(-1.0);
                    assert!(
                        output.iter().enumerate().all(|(i, &x)| x == sum(rank * len + i)),
                        "{mask} {len}"
                    );

                    let mut input = memory(&group, mask, len);
                    let mut output = vec![0.0; len * size];
                    group.all_gather(&input, &mut output).unwrap();
                    input.fill(-1.0);
                    let gathered = |i: usize| number(i / len, i % len);
                    assert!(output.iter().enumerate().all(|(i, &x)| x == gathered(i)), "{mask} {len}");

                    let root = len % size;
                    let mut data = memory(&group, mask, len);
                    group.broadcast(&mut data, root).unwrap();
                    let right = data.iter().enumerate().all(|(i, &x)| x == number(root, i));
                    data.fill(-1.0);
                    assert!(right, "{mask} {len}");
                }
            }
        });
    }
}

#[test]
fn groups_split_by_color_and_order_by_key() {
    for way in WAYS {
        run(way, 5, DEADLINE, |group| {
            let rank = group.rank();
            let color = (rank != 4).then_some(rank as u64 % 2);
            let part = group.split(color, -(rank as i64)).unwrap();
            let Some(part) = part else {
                assert_eq!(rank, 4);
                return group.barrier().unwrap();
            };
            // Keys are the negative ranks, so the order is reversed: 2, 0 and 3, 1.
            assert_eq!((part.size(), part.rank()), (2, usize::from(rank < 2)));
            let mut members = [0i64; 2];
            part.all_gather(&[rank as i64], &mut members).unwrap();
            assert_eq!(members, if rank % 2 == 0 { [2, 0] } else { [3, 1] });
            // Both groups at once.
            let mut sum = [1i32];
            let pending = part.all_reduce_async(Buffer::from(vec![2i32; 100_000]), ReduceOp::Sum);
            group.barrier().unwrap();
            part.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!((sum[0], pending.wait().unwrap()[99_999]), (2, 4));
            let again = part.split(Some(0), 0).unwrap().unwrap();
            assert_eq!(again.size(), 2);
        });
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused_and_the_group_lives_on() {
    for way in WAYS {
        run(way, 2, DEADLINE, |group| {
            let error = group.reduce_scatter(&[1.0f32; 5], &mut [0.0; 2], ReduceOp::Sum).unwrap_err();
            assert!(error.to_string().contains("5 elements are not 2 parts"), "{error}");
            assert!(group.all_gather(&[1.0f32; 2], &mut [0.0; 5]).is_err());
            assert!(group.broadcast(&mut [1.0f32], 2).unwrap_err().to_string().contains("no rank 2"));
            assert!(group.send(&[1u8], group.rank()).is_err());
            let mut sum = [1.0f32];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [2.0]);
            assert!(group.traffic().operations >= 1);
        });
    }
}
