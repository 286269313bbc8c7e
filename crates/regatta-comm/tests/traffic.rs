//! What groups count of their traffic is what the algorithms' formulas say.

mod common;

use common::{Way, run};
use proptest::prelude::*;
use regatta_comm::{Algorithm, Group, Kind, ReduceOp, TransportKind, Volume};
use std::time::Duration;

/// Ranks that ring over a transport, and ranks that read each other's memory.
const WAYS: [Way; 5] = [
    (TransportKind::Thread, Some(Algorithm::Ring)),
    (TransportKind::Shm, Some(Algorithm::Ring)),
    (TransportKind::Tcp, Some(Algorithm::Ring)),
    (TransportKind::Thread, Some(Algorithm::Direct)),
    (TransportKind::Shm, Some(Algorithm::Direct)),
];

/// What each of `size` ranks counted in `work`.
fn counted(way: Way, size: usize, work: impl Fn(&Group) + Sync) -> Vec<Vec<(Kind, Volume)>> {
    run(way, size, Duration::from_secs(30), |group| {
        let before = group.traffic();
        work(&group);
        let traffic = group.traffic().since(&before);
        let all = traffic.kinds().map(|(_, volume)| volume);
        let (operations, bytes) = all.fold((0, 0), |sum, v| (sum.0 + v.operations, sum.1 + v.bytes));
        assert_eq!((traffic.operations, traffic.bytes), (operations, bytes));
        traffic.kinds().collect()
    })
}

/// All-reduces, reduce-scatters and all-gathers of `each` numbers a rank: some waited for, some in the background.
fn collectives(group: &Group, each: usize, background: bool) {
    let whole = each * group.size();
    if background {
        let reduced = group.all_reduce_async(group.buffer::<f32>(whole).unwrap(), ReduceOp::Mean);
        let parts = (group.buffer::<f32>(whole).unwrap(), group.buffer(each).unwrap());
        let scattered = group.reduce_scatter_async(parts.0, parts.1, ReduceOp::Sum);
        let parts = (group.buffer::<f32>(each).unwrap(), group.buffer(whole).unwrap());
        let gathered = group.all_gather_async(parts.0, parts.1);
        reduced.wait().unwrap();
        scattered.wait().unwrap();
        gathered.wait().unwrap();
        return;
    }
    let (mut all, mut part) = (vec![1.0f32; whole], vec![0.0f32; each]);
    group.all_reduce(&mut all, ReduceOp::Sum).unwrap();
    group.reduce_scatter(&all, &mut part, ReduceOp::Sum).unwrap();
    group.all_gather(&part, &mut all).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn collectives_send_what_the_formulas_say(size in 2usize..5, each in 4100usize..40_000, background: bool) {
        let bytes = (4 * each * size) as u64;
        let others = size as u64 - 1;
        let part = others * bytes / size as u64;
        for way in WAYS {
            for rank in counted(way, size, |group| collectives(group, each, background)) {
                let volume = |sent| Volume { operations: 1, bytes, sent };
                prop_assert_eq!(&rank, &[
                    // 2(n-1)/n, and (n-1)/n.
                    (Kind::AllReduce, volume(2 * part)),
                    (Kind::ReduceScatter, volume(part)),
                    (Kind::AllGather, volume(part)),
                ], "{:?}", way);
            }
        }
    }
}

#[test]
fn small_messages_are_read_by_everybody() {
    for (way, sent) in [(WAYS[1], 3 * 4 * 12 / 2), (WAYS[4], 3 * 4 * 12)] {
        for rank in counted(way, 4, |group| group.all_reduce(&mut [1.0f32; 12], ReduceOp::Sum).unwrap()) {
            assert_eq!(rank, [(Kind::AllReduce, Volume { operations: 1, bytes: 48, sent })], "{way:?}");
        }
    }
}

#[test]
fn messages_and_roots_count_where_they_send() {
    for way in WAYS {
        let counted = counted(way, 3, |group| {
            let mut data = [group.rank() as i64; 100];
            match group.rank() {
                0 => group.send(&data[..10], 2).unwrap(),
                2 => group.recv(&mut data[..10], 0).unwrap(),
                _ => {}
            }
            group.broadcast(&mut data, 1).unwrap();
        });
        let sent = |rank: usize, kind| {
            let found = counted[rank].iter().find(|(found, _)| *found == kind);
            found.map(|(_, volume)| (volume.operations, volume.bytes, volume.sent))
        };
        assert_eq!(sent(0, Kind::Send), Some((1, 80, 80)), "{way:?}");
        assert_eq!((sent(1, Kind::Send), sent(2, Kind::Send)), (None, Some((1, 80, 0))), "{way:?}");
        // Along a chain, or read by both from the root.
        let ring = way.1 == Some(Algorithm::Ring);
        let broadcast = (0..3).map(|rank| sent(rank, Kind::Broadcast).unwrap_or_default().2);
        assert_eq!(broadcast.collect::<Vec<_>>(), if ring { [0, 800, 800] } else { [0, 1600, 0] }, "{way:?}");
    }
}

#[test]
fn half_numbers_travel_as_they_are() {
    let half = |group: &Group| group.all_reduce(&mut [regatta_comm::f16::ONE; 96], ReduceOp::Sum).unwrap();
    for size in 2..5 {
        let sent = 2 * (size - 1) * 192 / size;
        for rank in counted(WAYS[2], size, half) {
            assert_eq!(rank, [(Kind::AllReduce, Volume { operations: 1, bytes: 192, sent: sent as u64 })]);
        }
    }
    // Means of integers, too, which are summed in a wider type.
    let bytes = |group: &Group| group.all_reduce(&mut [200u8; 96], ReduceOp::Mean).unwrap();
    for rank in counted(WAYS[2], 4, bytes) {
        assert_eq!(rank, [(Kind::AllReduce, Volume { operations: 1, bytes: 96, sent: 144 })]);
    }
}

#[test]
fn traffic_is_read_while_an_operation_waits_for_its_peers() {
    for way in WAYS {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (sender, receiver) = (std::sync::Mutex::new(sender), std::sync::Mutex::new(receiver));
        run(way, 2, Duration::from_secs(10), |group| {
            if group.rank() == 1 {
                // Rank 0 waits for this rank until it has read its traffic.
                receiver.lock().unwrap().recv_timeout(Duration::from_secs(10)).unwrap();
                return group.barrier().unwrap();
            }
            let before = group.traffic().of(Kind::Barrier).operations;
            let waiting = group.barrier_async();
            assert_eq!(group.traffic().of(Kind::Barrier).operations, before);
            sender.lock().unwrap().send(()).unwrap();
            waiting.wait().unwrap();
            assert_eq!(group.traffic().of(Kind::Barrier).operations, before + 1);
        });
    }
}
