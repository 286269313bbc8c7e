//! Ranks for tests: threads of this process, connected in any of the ways that processes are.

use regatta_comm::rendezvous::{StoreAt, StoreServer, World};
use regatta_comm::{Algorithm, Group, Options, TransportKind};
use std::time::Duration;

/// The ways in which ranks of one host can communicate.
pub const WAYS: [(TransportKind, Algorithm); 5] = [
    (TransportKind::Thread, Algorithm::Direct),
    (TransportKind::Thread, Algorithm::Ring),
    (TransportKind::Shm, Algorithm::Direct),
    (TransportKind::Shm, Algorithm::Ring),
    (TransportKind::Tcp, Algorithm::Ring),
];

/// Runs `rank` on `size` threads and returns their results in the order of ranks.
pub fn run<R: Send>(
    (transport, algorithm): (TransportKind, Algorithm),
    size: usize,
    deadline: Duration,
    rank: impl Fn(Group) -> R + Sync,
) -> Vec<R> {
    let options = Options {
        transport: Some(transport),
        algorithm: Some(algorithm),
        deadline,
        join: Duration::from_secs(30),
    };
    let server = StoreServer::start("127.0.0.1:0", size).unwrap();
    let address = server.addr().to_string();
    let mut threads =
        Group::threads_with(if transport == TransportKind::Thread { size } else { 0 }, &options);
    threads.reverse();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|number| {
                let (thread, options, rank, address) = (threads.pop(), &options, &rank, &address);
                scope.spawn(move || {
                    let world = World {
                        rank: number,
                        size,
                        local_rank: number,
                        local_size: size,
                        store: StoreAt::Elsewhere(address.clone()),
                        job: String::new(),
                    };
                    let group = thread.unwrap_or_else(|| Group::connect(&world, options).unwrap());
                    // Nobody is still connecting when a test makes a rank fail.
                    group.barrier().unwrap();
                    rank(group)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
