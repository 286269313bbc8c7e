//! Every operation, type, reduction, world size and way of communicating against a plain reference.

mod common;

use common::{WAYS, Way, run};
use proptest::prelude::*;
use regatta_comm::{Algorithm, Buffer, Element, Group, ReduceOp, TransportKind, bf16, f16};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);
const OPS: [ReduceOp; 7] = [
    ReduceOp::Sum,
    ReduceOp::Mean,
    ReduceOp::Min,
    ReduceOp::Max,
    ReduceOp::Product,
    ReduceOp::And,
    ReduceOp::Or,
];

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
        ReduceOp::And => values.fold(-1i64, |all, value| all & value as i64) as f64,
        ReduceOp::Or => values.fold(0i64, |all, value| all | value as i64) as f64,
        _ => unreachable!("has a reference of its own"),
    }
}

fn close(a: f64, b: f64, name: &str) {
    // A mean need not be exact in 16 bits.
    assert!((a - b).abs() <= 0.01 * b.abs().max(1.0), "{name}: {a} is not {b}");
}

fn check<T: Plain>(group: &Group, len: usize, op: ReduceOp) {
    let (rank, size) = (group.rank(), group.size());
    let integer = !T::DTYPE.is_float();
    let mine = |len: usize| (0..len).map(|index| T::of(number(rank, index, op))).collect::<Vec<T>>();
    let zeros = |len: usize| vec![T::of(0.0); len];
    let name = format!("{group:?} {} {op} {len}", T::DTYPE);
    let reduced = |data: &[T], from: usize, what: &str| {
        for (index, value) in data.iter().enumerate() {
            close(value.plain(), reference(size, from + index, op, integer), &format!("{what} {name}"));
        }
    };
    // Part r of what is uneven has `len / (r + 1)` elements, so that some are empty.
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let total = counts.iter().sum::<usize>();
    let before = counts[..rank].iter().sum::<usize>();
    let root = len % size;
    if !op.suits(T::DTYPE) {
        let error = group.all_reduce(&mut mine(len), op).unwrap_err().to_string();
        return assert!(error.contains("cannot be reduced by"), "{error}");
    }

    let mut data = mine(len);
    group.all_reduce(&mut data, op).unwrap();
    reduced(&data, 0, "all_reduce");
    let mut out = zeros(len);
    group.all_reduce_to(&mine(len), &mut out, op).unwrap();
    assert_eq!(data, out, "all_reduce_to {name}");

    let mut data = mine(len);
    group.reduce(&mut data, op, root).unwrap();
    match rank == root {
        true => reduced(&data, 0, "reduce"),
        false => assert_eq!(data, mine(len), "reduce {name}"),
    }

    let mut output = zeros(len);
    group.reduce_scatter(&mine(len * size), &mut output, op).unwrap();
    reduced(&output, rank * len, "reduce_scatter");
    let mut output = zeros(counts[rank]);
    group.reduce_scatter_v(&mine(total), &mut output, &counts, op).unwrap();
    reduced(&output, before, "reduce_scatter_v");

    let mut tensors = [mine(len), mine(len / 2), mine(3 * len)];
    let [a, b, c] = &mut tensors;
    group.all_reduce_grouped(&mut [a, b, c], op).unwrap();
    tensors.iter().for_each(|tensor| reduced(tensor, 0, "all_reduce_grouped"));
}

fn check_moves<T: Plain>(group: &Group, len: usize) {
    let (rank, size) = (group.rank(), group.size());
    let op = ReduceOp::Sum;
    let of =
        |rank: usize, len: usize| (0..len).map(|index| T::of(number(rank, index, op))).collect::<Vec<T>>();
    let mine = |len: usize| of(rank, len);
    let zeros = |len: usize| vec![T::of(0.0); len];
    let name = format!("{group:?} {} {len}", T::DTYPE);
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let total = counts.iter().sum::<usize>();
    let root = len % size;
    let at_root = rank == root;
    let even: Vec<T> = (0..size).flat_map(|rank| of(rank, len)).collect();
    let uneven: Vec<T> = (0..size).flat_map(|rank| of(rank, counts[rank])).collect();

    let mut all = zeros(len * size);
    group.all_gather(&mine(len), &mut all).unwrap();
    assert_eq!(all, even, "all_gather {name}");
    let mut all = zeros(len * size);
    all[rank * len..][..len].copy_from_slice(&mine(len));
    group.all_gather_in_place(&mut all).unwrap();
    assert_eq!(all, even, "all_gather_in_place {name}");
    let mut all = zeros(total);
    group.all_gather_v(&mine(counts[rank]), &mut all, &counts).unwrap();
    assert_eq!(all, uneven, "all_gather_v {name}");
    let all = group.all_gather_vec(&mine(counts[rank])).unwrap();
    assert_eq!(all.concat(), uneven, "all_gather_vec {name}");

    let mut data = mine(len);
    group.broadcast(&mut data, root).unwrap();
    assert_eq!(data, of(root, len), "broadcast {name}");
    let mut tensors = [mine(len), mine(7)];
    let [a, b] = &mut tensors;
    group.broadcast_grouped(&mut [a, b], root).unwrap();
    assert_eq!(tensors, [of(root, len), of(root, 7)], "broadcast_grouped {name}");

    let mut all = zeros(if at_root { len * size } else { 0 });
    group.gather(&mine(len), &mut all, root).unwrap();
    assert!(!at_root || all == even, "gather {name}");
    let mut all = zeros(if at_root { total } else { 3 });
    group.gather_v(&mine(counts[rank]), &mut all, &counts, root).unwrap();
    assert!(if at_root { all == uneven } else { all == zeros(3) }, "gather_v {name}");

    let mut part = zeros(len);
    group.scatter(if at_root { &even } else { &[] }, &mut part, root).unwrap();
    assert_eq!(part, mine(len), "scatter {name}");
    let mut part = zeros(counts[rank]);
    group.scatter_v(if at_root { &uneven } else { &[] }, &mut part, &counts, root).unwrap();
    assert_eq!(part, mine(counts[rank]), "scatter_v {name}");

    // What rank a sends to rank b begins at 13a + b of its numbers.
    let between = |a: usize, b: usize, len: usize| of(a, 13 * a + b + len)[13 * a + b..].to_vec();
    let sent: Vec<T> = (0..size).flat_map(|to| between(rank, to, len)).collect();
    let mut came = zeros(len * size);
    group.all_to_all(&sent, &mut came).unwrap();
    let expected: Vec<T> = (0..size).flat_map(|from| between(from, rank, len)).collect();
    assert_eq!(came, expected, "all_to_all {name}");
    let count = |a: usize, b: usize| (len + 5 * a + 3 * b) % (len + 2);
    let sends: Vec<usize> = (0..size).map(|to| count(rank, to)).collect();
    let receives: Vec<usize> = (0..size).map(|from| count(from, rank)).collect();
    let sent: Vec<T> = (0..size).flat_map(|to| between(rank, to, sends[to])).collect();
    let mut came = zeros(receives.iter().sum());
    group.all_to_all_v(&sent, &sends, &mut came, &receives).unwrap();
    let expected: Vec<T> = (0..size).flat_map(|from| between(from, rank, receives[from])).collect();
    assert_eq!(came, expected, "all_to_all_v {name}");

    group.barrier().unwrap();
    // Pairs: even ranks send first.
    let (partner, first) = (rank ^ 1, rank.is_multiple_of(2));
    if partner < size {
        let mut theirs = zeros(len);
        for sending in [first, !first] {
            match sending {
                true => group.send(&mine(len), partner).unwrap(),
                false => group.recv(&mut theirs, partner).unwrap(),
            }
        }
        assert_eq!(theirs, of(partner, len), "recv {name}");
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

/// Every transport with its usual algorithms, and every algorithm over threads.
fn all_ways() -> Vec<Way> {
    let kinds = [TransportKind::Shm, TransportKind::Tcp, TransportKind::Mixed].map(|kind| (kind, None));
    let forced: Vec<Way> =
        Algorithm::ALL.iter().map(|&algorithm| (TransportKind::Thread, Some(algorithm))).collect();
    let more = [
        (TransportKind::Tcp, Some(Algorithm::Tree)),
        (TransportKind::Tcp, Some(Algorithm::HalvingDoubling)),
        (TransportKind::Shm, Some(Algorithm::Ring)),
        (TransportKind::Mixed, Some(Algorithm::Hierarchical)),
    ];
    [kinds.as_slice(), &forced, &more].concat()
}

#[test]
fn every_world_size_type_and_reduction() {
    for way in all_ways() {
        for size in 1..=9 {
            run(way, size, DEADLINE, |group| {
                for (number, op) in OPS.into_iter().enumerate() {
                    check_all(&group, [0, 1, 5, 64, 1023, 37, 2][number], op);
                }
                for len in [0, 1, 100] {
                    check_moves::<f32>(&group, len);
                    check_moves::<u8>(&group, len);
                }
                check_moves::<f64>(&group, 3);
                check_moves::<bf16>(&group, 41);
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn odd_lengths(way in 0..all_ways().len(), size in 1usize..=8, op in 0..OPS.len(), len in 0usize..100_000) {
        run(all_ways()[way], size, DEADLINE, |group| {
            check::<f32>(&group, len, OPS[op]);
            check::<i8>(&group, len / 3, OPS[op]);
            check::<bf16>(&group, len / 7, OPS[op]);
            check_moves::<f32>(&group, len / 4);
        });
    }
}

/// The plain adaptive sum: pairs of ranks, pairs of pairs; ranks beyond a power of two go in pairs first.
fn adasum(mut vectors: Vec<Vec<f64>>) -> Vec<f64> {
    let both = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let factor = |square: f64| if square == 0.0 { 1.0 } else { 1.0 - dot(a, b) / (2.0 * square) };
        let (fa, fb) = (factor(dot(a, a)), factor(dot(b, b)));
        a.iter().zip(b).map(|(a, b)| fa * a + fb * b).collect::<Vec<f64>>()
    };
    let pairs = vectors.len() - (1 << vectors.len().ilog2());
    for pair in 0..pairs {
        let folded = both(&vectors[pair + 1], &vectors[pair]);
        vectors.splice(pair..pair + 2, [folded]);
    }
    while vectors.len() > 1 {
        vectors = vectors.chunks(2).map(|pair| both(&pair[0], &pair[1])).collect();
    }
    vectors.remove(0)
}

#[test]
fn adaptive_sums() {
    for way in WAYS {
        for size in 1..=8 {
            for len in [1, 2, 7, 1001] {
                let own = |rank: usize| {
                    (0..len).map(|i| ((i * 7 + rank * 3) % 11) as f64 - 4.0).collect::<Vec<f64>>()
                };
                let expected = adasum((0..size).map(own).collect());
                let all = run(way, size, DEADLINE, |group| {
                    let mut wide = own(group.rank());
                    group.all_reduce(&mut wide, ReduceOp::Adasum).unwrap();
                    let mut narrow: Vec<f32> = own(group.rank()).into_iter().map(|x| x as f32).collect();
                    group.all_reduce(&mut narrow, ReduceOp::Adasum).unwrap();
                    let near = |a: f64, b: f64| (a - b).abs() < 1e-4 * b.abs().max(1.0);
                    assert!(narrow.iter().zip(&expected).all(|(&a, &b)| near(f64::from(a), b)));
                    assert!(group.reduce(&mut narrow, ReduceOp::Adasum, 0).is_err());
                    wide
                });
                for wide in &all {
                    assert!(
                        wide.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9),
                        "{way:?} {size} {len}"
                    );
                    assert_eq!(wide, &all[0], "the same bits");
                }
            }
        }
    }
}

#[test]
fn factors_before_and_after() {
    for way in WAYS {
        run(way, 3, DEADLINE, |group| {
            let rank = group.rank();
            // Weights that differ from rank to rank, and a common factor.
            let weighted = ReduceOp::Sum.scaled_before([0.5, 2.0, 1.0][rank]);
            let mut data = [8.0f32, 4.0];
            group.all_reduce(&mut data, weighted).unwrap();
            assert_eq!(data, [28.0, 14.0]);
            let mut data = [f16::from_f32(3.0)];
            group.all_reduce(&mut data, ReduceOp::Sum.scaled_after(1.0 / 3.0)).unwrap();
            assert_eq!(data[0].to_f32(), 3.0);
            let mut part = [0.0f64];
            group.reduce_scatter(&[1.0, 2.0, 3.0], &mut part, weighted).unwrap();
            assert_eq!(part, [3.5 * (rank + 1) as f64]);
            let mut data = [10i32];
            group.reduce(&mut data, ReduceOp::Sum.scaled_after(0.1), 1).unwrap();
            assert_eq!(data, [if rank == 1 { 3 } else { 10 }]);
        });
        // Ranks must agree on what happens in the end.
        let errors = run(way, 2, DEADLINE, |group| {
            let after = ReduceOp::Sum.scaled_after([2.0, 3.0][group.rank()]);
            group.all_reduce(&mut [1.0f32], after).unwrap_err().to_string()
        });
        assert!(errors.iter().all(|error| error.contains("factors")), "{errors:?}");
    }
}

#[test]
fn sums_of_16_bit_floats_are_rounded_once() {
    for way in all_ways() {
        run(way, 5, DEADLINE, |group| {
            // In bf16, 256 + 1 is 256: only a wider accumulator sees the ones.
            let mut data = vec![bf16::from_f32(if group.rank() == 0 { 256.0 } else { 1.0 }); 100];
            group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
            assert!(data.iter().all(|x| x.to_f32() == 260.0), "{group:?} {}", data[0]);
        });
    }
}

/// Numbers whose sum depends on the order of addition.
fn awkward(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + rank * 104_729) % 1000) as f32 * 1.1e-3 + (rank as f32 * 1e3)).collect()
}

#[test]
fn the_same_bits_on_every_rank_and_in_every_run() {
    for way in all_ways() {
        let once = |size: usize| {
            run(way, size, DEADLINE, |group| {
                let mut private = awkward(group.rank(), 100_001);
                group.all_reduce(&mut private, ReduceOp::Mean).unwrap();
                let mut buffer = group.buffer(100_001).unwrap();
                buffer.copy_from_slice(&awkward(group.rank(), 100_001));
                let buffer = group.all_reduce_async(buffer, ReduceOp::Mean).wait().unwrap();
                let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&private), bits(&buffer), "{group:?}");
                let mut part = vec![0.0; 1001];
                group.reduce_scatter(&awkward(group.rank(), 1001 * size), &mut part, ReduceOp::Sum).unwrap();
                let mut at_root = awkward(group.rank(), 5001);
                group.reduce(&mut at_root, ReduceOp::Sum, 1).unwrap();
                (bits(&private), bits(&part), bits(&at_root))
            })
        };
        for size in [3, 4] {
            let (first, second) = (once(size), once(size));
            assert_eq!(first, second, "{way:?}: another run");
            assert!(first.iter().all(|(all, ..)| *all == first[0].0), "{way:?}: another rank");
        }
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
        run((TransportKind::Shm, Some(Algorithm::Direct)), size, DEADLINE, |group| {
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
