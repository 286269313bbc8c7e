//! Ranks for tests: threads of this process, connected in any of the ways that processes are.
#![allow(dead_code, reason = "no test uses all of it")]

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Algorithm, Group, Options, TransportKind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A way in which ranks can communicate; mixed: as if they were on two hosts.
pub type Way = (TransportKind, Option<Algorithm>);

/// The ways that differ in how failures are noticed.
pub const WAYS: [Way; 6] = [
    (TransportKind::Thread, Some(Algorithm::Direct)),
    (TransportKind::Thread, Some(Algorithm::Ring)),
    (TransportKind::Shm, Some(Algorithm::Direct)),
    (TransportKind::Shm, Some(Algorithm::Ring)),
    (TransportKind::Tcp, Some(Algorithm::Ring)),
    (TransportKind::Mixed, Some(Algorithm::Ring)),
];

/// Runs `rank` on `size` threads and returns their results in the order of ranks.
pub fn run<R: Send>(
    (transport, algorithm): Way,
    size: usize,
    deadline: Duration,
    rank: impl Fn(Group) -> R + Sync,
) -> Vec<R> {
    let wanted = (transport != TransportKind::Mixed).then_some(transport);
    let join = Duration::from_secs(30);
    run_with(
        Options::default().transport(wanted).algorithm(algorithm).deadline(deadline).join(join),
        transport,
        size,
        rank,
    )
}

/// As [`run`], with options.
pub fn run_with<R: Send>(
    options: Options,
    transport: TransportKind,
    size: usize,
    rank: impl Fn(Group) -> R + Sync,
) -> Vec<R> {
    let host = |rank: usize| if transport == TransportKind::Mixed { Some(rank * 2 / size) } else { None };
    run_on(options, transport, &(0..size).map(host).collect::<Vec<_>>(), rank)
}

/// As [`run_with`], with a rank for each of `hosts`, as if it was there; none: on this one.
pub fn run_on<R: Send>(
    options: Options,
    transport: TransportKind,
    hosts: &[Option<usize>],
    rank: impl Fn(Group) -> R + Sync,
) -> Vec<R> {
    let size = hosts.len();
    let security = Security { secret: options.secret.clone(), tls: options.tls };
    let server = StoreServer::start("127.0.0.1:0", size, &security).unwrap();
    let address = server.addr().to_string();
    let mut threads =
        Group::threads_with(if transport == TransportKind::Thread { size } else { 0 }, &options).unwrap();
    threads.reverse();
    let through = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|number| {
                let (thread, options, rank, address) = (threads.pop(), &options, &rank, &address);
                let through = &through;
                scope.spawn(move || {
                    let mut world = World::local(number, size, address);
                    if let Some(host) = hosts[number] {
                        world.host = format!("host {host}");
                    }
                    let group = thread.unwrap_or_else(|| Group::connect(&world, options).unwrap());
                    // Nobody is still connecting when a test makes a rank fail.
                    group.barrier().unwrap();
                    // Nor is anybody still in that barrier.
                    through.fetch_add(1, Ordering::SeqCst);
                    let begun = Instant::now();
                    while through.load(Ordering::SeqCst) < size {
                        assert!(begun.elapsed() < Duration::from_secs(30), "a rank did not come through");
                        std::thread::yield_now();
                    }
                    rank(group)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
