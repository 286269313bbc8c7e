//! Numbers at and beyond their limits: an error that names them, never a crash, and groups go on.

mod common;

use common::WAYS;
use proptest::prelude::*;
use regatta_comm::rendezvous::World;
use regatta_comm::{Error, Group, Options, ReduceOp, TransportKind};
use std::time::Duration;

fn options(lanes: usize, tcp_streams: usize) -> Options {
    Options::default().lanes(lanes).tcp_streams(tcp_streams).join(Duration::from_secs(60))
}

/// Any number, though mostly one near a limit.
fn any_count() -> impl Strategy<Value = usize> {
    prop_oneof![0usize..70, Just(usize::MAX), Just(usize::MAX / 2 + 1), Just(1 << 32), any::<usize>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn options_are_checked_where_they_come_in(lanes in any_count(), streams in any_count(), size in 1usize..4) {
        let good = (1..=64).contains(&lanes) && (1..=64).contains(&streams);
        let threads = Group::threads_with(size, &options(lanes, streams));
        prop_assert_eq!(threads.is_ok(), good);
        // Nobody is there: the options are looked at first.
        if !good {
            let errors = [
                threads.unwrap_err(),
                Group::connect(&World::local(0, 2, "127.0.0.1:1"), &options(lanes, streams)).unwrap_err(),
            ];
            for error in errors {
                prop_assert!(matches!(error, Error::Usage(_)));
                let text = error.to_string();
                let (option, count) = if (1..=64).contains(&streams) { ("lanes", lanes) } else { ("tcp_streams", streams) };
                prop_assert!(text.contains(option) && text.contains(&format!("is {count}:")), "{}", text);
            }
        }
    }

    #[test]
    fn worlds_are_checked(rank in any_count(), size in any_count(), local_rank in any_count(), local_size in any_count()) {
        let world = World { rank, size, local_rank, local_size, ..World::local(0, 1, "127.0.0.1:1") };
        let good = size <= 1 << 16 && rank < size && local_rank < local_size;
        if !good {
            let error = Group::connect(&world, &options(1, 1)).unwrap_err();
            prop_assert!(matches!(error, Error::Usage(_)), "{}", error);
        }
    }
}

#[test]
fn every_number_of_lanes_and_streams_works() {
    for count in [1, 2, 3, 64] {
        for transport in [TransportKind::Thread, TransportKind::Shm, TransportKind::Tcp] {
            let wanted = (transport != TransportKind::Thread).then_some(transport);
            let options = options(count, count).transport(wanted);
            common::run_with(options, transport, 2, |group| {
                let mut data = vec![1i32; 700_000];
                group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                assert!(data.iter().all(|&x| x == 2), "{transport} {count}");
            });
        }
    }
}

#[test]
fn more_ranks_than_can_share_memory_are_refused() {
    for size in [1025, 1 << 20, 1 << 40] {
        let error = Group::threads_with(size, &Options::default()).unwrap_err().to_string();
        assert!(error.contains(&size.to_string()) && error.contains("1024"), "{error}");
    }
    assert!(Group::threads(0).is_empty());
}

#[test]
fn lengths_that_no_memory_holds_are_errors() {
    let beyond = [usize::MAX, usize::MAX / 4, (1 << 62) + 1, (1 << 61) + 1, isize::MAX as usize / 4, 1 << 55];
    for way in WAYS {
        common::run(way, 2, Duration::from_secs(60), |group| {
            for len in beyond {
                let error = group.buffer::<f32>(len).unwrap_err().to_string();
                assert!(error.contains(&len.to_string()), "{way:?}: {error}");
                let error = group.buffer::<i64>(len).unwrap_err().to_string();
                assert!(error.contains(&len.to_string()), "{way:?}: {error}");
                // A peer with a larger machine might hold less.
                for counts in [[len, len], [3, len], [len, 3]].into_iter().filter(|_| len > 1 << 60) {
                    let counts = &counts;
                    let mut out = [0u8; 3];
                    let errors = [
                        group.all_gather_v(&[0u8; 3], &mut out, counts),
                        group.gather_v(&[0u8; 3], &mut out, counts, 0),
                        group.scatter_v(&[0u8; 3], &mut out, counts, 0),
                        group.all_to_all_v(&[0u8; 3], counts, &mut out, counts),
                        group.reduce_scatter_v(&[0u8; 3], &mut out, counts, ReduceOp::Sum),
                    ];
                    for error in errors {
                        assert!(matches!(error, Err(Error::Usage(_))), "{way:?} {counts:?}: {error:?}");
                    }
                }
            }
            // Nothing was sent, so the group goes on.
            let mut buffer = group.buffer::<f32>(1000).unwrap();
            buffer.fill(1.0);
            group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
            assert!(buffer.iter().all(|&x| x == 2.0));
        });
    }
}
