//! Operations while slots become large and small again: what they leave is the same as ever.

use super::{
    all_gather, all_reduce, all_to_all, barrier, broadcast, gather, reduce, reduce_scatter, scatter,
};
use crate::algorithm::backend::Start;
use crate::algorithm::parts::Parts;
use crate::member::call::{Call, Kind};
use crate::member::recorder::Recorder;
use crate::numbers::element::{DType, ReduceOp};
use crate::numbers::kernel;
use crate::transport::shared::{SLOT, Shared};
use crate::transport::shm::tests::host;
use proptest::prelude::*;

/// Sums of these depend on their order.
fn number(rank: usize, index: usize, seed: usize) -> f32 {
    let x = (rank * 7919 + index * 104_729 + seed * 31 + 1).wrapping_mul(2_654_435_761) as u32;
    (x as f32 / 65_536.0 - 30_000.0) * if index.is_multiple_of(5) { 1e-4 } else { 1.0 }
}

fn numbers(rank: usize, len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|index| number(rank, index, seed)).collect()
}

/// The sum in the order of ranks.
fn sums(size: usize, range: std::ops::Range<usize>, seed: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> =
        (0..size).map(|rank| range.clone().map(|i| number(rank, i, seed)).collect()).collect();
    let parts: Vec<&[f32]> = all.iter().map(Vec::as_slice).collect();
    let mut sums = vec![0.0; range.len()];
    kernel::reduce(&mut sums, &parts, ReduceOp::Sum);
    sums
}

/// One operation of a rank: `len` elements of it in all, checked.
fn operation(shared: &mut Shared, kind: Kind, len: usize, sequence: u32) {
    let (rank, size, seed) = (shared.rank(), shared.size(), sequence as usize);
    let root = seed % size;
    let call = Call { sequence, ..Call::new(kind, DType::F32, len).root(root) };
    let each = len / size;
    let parts = Parts::even(size, each);
    let whole = || (0..size).flat_map(|rank| numbers(rank, each, seed)).collect::<Vec<f32>>();
    shared.enter();
    match kind {
        Kind::AllReduce => {
            let mut data = numbers(rank, len, seed);
            all_reduce(shared, None, &start(&Recorder::default(), call), call, &mut data).unwrap();
            assert!(data == sums(size, 0..len, seed), "{call}");
        }
        Kind::Reduce => {
            let mut data = numbers(rank, len, seed);
            reduce(shared, call, &mut data).unwrap();
            let expected = if rank == root { sums(size, 0..len, seed) } else { numbers(rank, len, seed) };
            assert!(data == expected, "{call}");
        }
        Kind::ReduceScatter => {
            let mut out = vec![0.0; each];
            let input = numbers(rank, each * size, seed);
            reduce_scatter(shared, None, call, &parts, (&input, &mut out)).unwrap();
            assert!(out == sums(size, rank * each..(rank + 1) * each, seed), "{call}");
        }
        Kind::AllGather => {
            let mut out = vec![0.0; each * size];
            out[rank * each..][..each].copy_from_slice(&numbers(rank, each, seed));
            all_gather(shared, None, call, &parts, (None, &mut out)).unwrap();
            assert!(out == whole(), "{call}");
        }
        Kind::Broadcast => {
            let mut data = numbers(rank, len, seed);
            broadcast(shared, None, call, call.root as usize, &mut data).unwrap();
            assert!(data == numbers(root, len, seed), "{call}");
        }
        Kind::Gather => {
            let mut out = vec![0.0; if rank == root { each * size } else { 0 }];
            gather(shared, call, &parts, (&numbers(rank, each, seed), &mut out)).unwrap();
            assert!(rank != root || out == whole(), "{call}");
        }
        Kind::Scatter => {
            let mut out = vec![0.0; each];
            let input = if rank == root { whole() } else { vec![] };
            scatter(shared, call, &parts, (&input, &mut out)).unwrap();
            assert!(out == numbers(rank, each, seed), "{call}");
        }
        Kind::AllToAll => {
            let mut out = vec![0.0; each * size];
            all_to_all(shared, call, each, (&numbers(rank, each * size, seed), &mut out)).unwrap();
            for (peer, block) in out.chunks(each.max(1)).enumerate() {
                assert!(block == &numbers(peer, each * size, seed)[rank * each..][..each], "{call}");
            }
        }
        _ => barrier(shared, &start(&Recorder::default(), call), call).unwrap(),
    }
}

fn start(recorder: &Recorder, call: Call) -> Start<'_> {
    Start::new(recorder, call)
}

/// Runs `rank` on a thread for each rank of a host.
fn on_ranks(size: usize, rank: impl Fn(Shared) + Sync) {
    std::thread::scope(|scope| {
        for (shared, _) in host(size) {
            scope.spawn(|| rank(shared));
        }
    });
}

const KINDS: [Kind; 9] = [
    Kind::AllReduce,
    Kind::Reduce,
    Kind::ReduceScatter,
    Kind::AllGather,
    Kind::Broadcast,
    Kind::Gather,
    Kind::Scatter,
    Kind::AllToAll,
    Kind::Barrier,
];

fn any_operation() -> impl Strategy<Value = (Kind, usize, Option<usize>)> {
    // Up to 6 MiB, often little; and which rank finds its peers late just before.
    let len = prop_oneof![0usize..100_000, 0usize..1_500_000];
    (proptest::sample::select(&KINDS[..]), len, proptest::option::weighted(0.3, 0usize..4))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slots_may_grow_and_shrink_at_any_time(
        size in 1usize..5,
        operations in proptest::collection::vec(any_operation(), 1..40),
    ) {
        on_ranks(size, |mut shared| {
            for (number, &(kind, len, late)) in operations.iter().enumerate() {
                if late == Some(shared.rank()) {
                    shared.pretend_late();
                }
                operation(&mut shared, kind, len, number as u32 + 1);
            }
        });
    }
}

#[test]
fn a_late_peer_makes_slots_large_for_a_while() {
    on_ranks(3, |mut shared| {
        // This machine may be busy.
        shared.never_late();
        let mut sequence = 0;
        let mut rounds = |shared: &mut Shared| {
            let before = shared.rounds();
            sequence += 1;
            operation(shared, Kind::AllReduce, 1_500_000, sequence);
            shared.rounds() - before
        };
        // One round to compare notes, then one for each slot.
        let small = 1 + (6_000_000usize.div_ceil(SLOT)) as u32;
        assert_eq!(rounds(&mut shared), small);
        if shared.rank() == 1 {
            shared.pretend_late();
        }
        // The first of them tells the others, in the second memory is ready.
        assert!(rounds(&mut shared) < 8);
        assert_eq!(rounds(&mut shared), 2);
        // Later it is tried again without.
        let last = (0..20).map(|_| rounds(&mut shared)).last().unwrap();
        assert_eq!(last, small);
    });
}
