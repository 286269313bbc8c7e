//! The mean of integers is their exact sum divided once, in every type, by every algorithm, over every transport.

mod common;

use common::Way;
use proptest::prelude::*;
use regatta_comm::{Algorithm, Element, Group, ReduceOp, TransportKind};
use std::time::Duration;

const WAYS: [Way; 12] = [
    (TransportKind::Thread, Some(Algorithm::Direct)),
    (TransportKind::Thread, Some(Algorithm::Ring)),
    (TransportKind::Thread, Some(Algorithm::Tree)),
    (TransportKind::Thread, Some(Algorithm::HalvingDoubling)),
    (TransportKind::Thread, Some(Algorithm::Doubling)),
    (TransportKind::Shm, Some(Algorithm::Direct)),
    (TransportKind::Shm, Some(Algorithm::Tree)),
    (TransportKind::Tcp, Some(Algorithm::Ring)),
    (TransportKind::Tcp, Some(Algorithm::HalvingDoubling)),
    (TransportKind::Tcp, Some(Algorithm::Doubling)),
    (TransportKind::Mixed, Some(Algorithm::Hierarchical)),
    (TransportKind::Mixed, None),
];

/// An integer type and the exact numbers that it stands for.
trait Integer: Element + PartialEq {
    const LEAST: i128;
    const MOST: i128;
    fn of(value: i128) -> Self;
}

macro_rules! integer {
    ($($type:ty)*) => {
        $(impl Integer for $type {
            const LEAST: i128 = <$type>::MIN as i128;
            const MOST: i128 = <$type>::MAX as i128;
            fn of(value: i128) -> Self { value as $type }
        })*
    };
}

integer!(i8 u8 i32 i64);

/// Rank `rank`'s `index`-th number of a seed's: often the largest or smallest, where sums wrap around first.
fn number<T: Integer>(seed: u64, rank: usize, index: usize) -> i128 {
    let mut x = seed ^ (rank as u64) << 32 ^ index as u64;
    // SplitMix64.
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    // By the index, so that all ranks have the extreme at once.
    match index % 4 {
        0 => T::MOST - i128::from(x % 2),
        1 => T::LEAST + i128::from(x % 3),
        _ => T::LEAST + i128::from(x) % (T::MOST - T::LEAST + 1),
    }
}

fn check<T: Integer>(group: &Group, seed: u64, len: usize) {
    let (rank, size) = (group.rank(), group.size());
    let mine =
        |rank: usize, len: usize| (0..len).map(|i| T::of(number::<T>(seed, rank, i))).collect::<Vec<T>>();
    let means = |from: usize, len: usize| {
        let mean = |i| (0..size).map(|rank| number::<T>(seed, rank, i)).sum::<i128>() / size as i128;
        (from..from + len).map(|i| T::of(mean(i))).collect::<Vec<T>>()
    };
    let name = format!("{group:?} {} seed {seed} length {len}", T::DTYPE);

    let mut data = mine(rank, len);
    group.all_reduce(&mut data, ReduceOp::Mean).unwrap();
    assert_eq!(data, means(0, len), "all_reduce {name}");

    let mut buffer = group.buffer::<T>(len).unwrap();
    buffer.copy_from_slice(&mine(rank, len));
    group.all_reduce(&mut buffer, ReduceOp::Mean).unwrap();
    assert_eq!(&*buffer, means(0, len), "all_reduce of a buffer {name}");

    let root = seed as usize % size;
    let mut data = mine(rank, len);
    group.reduce(&mut data, ReduceOp::Mean, root).unwrap();
    assert_eq!(data, if rank == root { means(0, len) } else { mine(rank, len) }, "reduce {name}");

    let mut part = vec![T::of(0); len];
    group.reduce_scatter(&mine(rank, len * size), &mut part, ReduceOp::Mean).unwrap();
    assert_eq!(part, means(rank * len, len), "reduce_scatter {name}");

    let (mut a, mut b) = (mine(rank, len), mine(rank, 3));
    group.all_reduce_grouped(&mut [&mut a, &mut b], ReduceOp::Mean).unwrap();
    assert_eq!((a, b), (means(0, len), means(0, 3)), "all_reduce_grouped {name}");
}

fn check_all(seed: u64, size: usize, len: usize) {
    for way in WAYS {
        common::run(way, size, Duration::from_secs(60), |group| {
            check::<i8>(&group, seed, len);
            check::<u8>(&group, seed, len);
            check::<i32>(&group, seed, len);
            check::<i64>(&group, seed, len);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn integer_means_are_exact(seed: u64, size in 2usize..6, len in 0usize..600) {
        check_all(seed, size, len);
    }
}

#[test]
fn integer_means_of_many_numbers_are_exact() {
    // More than is reduced at a time, and than a slot holds.
    check_all(7, 3, 50_001);
}

#[test]
fn the_mean_of_half_precision_numbers_that_fit_fits() {
    use regatta_comm::f16;
    for way in WAYS {
        common::run(way, 4, Duration::from_secs(60), |group| {
            let mut data = [f16::from_f32(60_000.0); 10];
            group.all_reduce(&mut data, ReduceOp::Mean).unwrap();
            assert_eq!(data, [f16::from_f32(60_000.0); 10], "{way:?}");
        });
    }
}
