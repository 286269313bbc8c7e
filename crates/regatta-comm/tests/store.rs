//! What goes through the store of a job, and what stays there.

use regatta_comm::rendezvous::{Security, StoreServer, StoreTraffic, World};
use regatta_comm::{Group, Options, ReduceOp, TransportKind};
use std::time::{Duration, Instant};

/// Long enough on any machine; nothing waits for it to pass.
const LONG: Duration = Duration::from_secs(60);

/// Runs `rank` on `size` threads, connected by `transport` through a store, which they see.
fn run(size: usize, transport: TransportKind, rank: impl Fn(&Group, &StoreServer) + Sync) {
    let server = StoreServer::start("127.0.0.1:0", size, &Security::default()).unwrap();
    let options = Options::default().transport(transport).deadline(LONG).join(LONG);
    std::thread::scope(|scope| {
        for number in 0..size {
            let (server, options, rank) = (&server, &options, &rank);
            scope.spawn(move || {
                let world = World::local(number, size, &server.addr().to_string());
                rank(&Group::connect(&world, options).unwrap(), server);
            });
        }
    });
}

/// Waits until the store holds no more than before.
fn is_as_before(server: &StoreServer, before: StoreTraffic) {
    let begun = Instant::now();
    loop {
        let now = server.traffic();
        if now.entry_bytes <= before.entry_bytes && now.entries <= before.entries {
            return;
        }
        assert!(begun.elapsed() < LONG, "{now:?} after {before:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_rank_asks_a_fixed_number_of_times_until_it_communicates() {
    for transport in [TransportKind::Tcp, TransportKind::Shm] {
        for size in [2, 12] {
            run(size, transport, |group, server| {
                let mut ones = [1];
                group.all_reduce(&mut ones, ReduceOp::Sum).unwrap();
                let traffic = server.traffic();
                // A rank that waits for more than two seconds asks again.
                let requests = 15 * size as u64;
                assert!(traffic.requests <= requests, "{size} ranks, {transport}: {traffic:?}");
                assert!(traffic.bytes_in > 0 && traffic.bytes_out > 0, "{traffic:?}");
            });
        }
    }
}

#[test]
fn a_thousand_groups_leave_nothing() {
    for transport in [TransportKind::Tcp, TransportKind::Shm] {
        run(2, transport, |group, server| {
            group.barrier().unwrap();
            let before = server.traffic();
            group.barrier().unwrap();
            for _ in 0..500 {
                group.subgroup(&[0, 1]).unwrap();
            }
            group.barrier().unwrap();
            is_as_before(server, before);
            group.barrier().unwrap();
        });
    }
}

#[test]
fn rounds_of_joining_leave_nothing() {
    run(3, TransportKind::Tcp, |group, server| {
        group.barrier().unwrap();
        let before = server.traffic();
        group.barrier().unwrap();
        for round in 0..3 {
            for _ in 0..100 * ((group.rank() + round) % 3) {
                group.all_reduce(&mut [1.0f32], ReduceOp::Sum).unwrap();
            }
            group.join().unwrap();
        }
        group.barrier().unwrap();
        is_as_before(server, before);
        group.barrier().unwrap();
    });
}
