//! Unidentified: processes without the job's secret neither join, nor read, nor stall it.

mod common;

use common::run_with;
use regatta_comm::rendezvous::{Secret, Security, StoreServer, World};
use regatta_comm::{Algorithm, Buffer, Group, Options, ReduceOp, Tls, TransportKind};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

fn options(tls: Tls, secret: Option<Secret>) -> Options {
    let transport = Some(TransportKind::Tcp);
    Options::default().transport(transport).tls(tls).secret(secret).join(Duration::from_secs(20))
}

#[test]
fn encrypted_jobs_compute_the_same() {
    let secret = Secret::random().unwrap();
    for (algorithm, streams) in [(None, 1), (Some(Algorithm::Ring), 3), (Some(Algorithm::Tree), 2)] {
        for size in [2, 4] {
            let options = options(Tls::On, Some(secret.clone())).algorithm(algorithm).tcp_streams(streams);
            run_with(options, TransportKind::Tcp, size, |group| {
                for len in [0, 1, 1000, 2_000_003] {
                    let number = |rank: usize, i: usize| ((i % 1000) * (rank + 1)) as f32;
                    let mut data: Vec<f32> = (0..len).map(|i| number(group.rank(), i)).collect();
                    group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                    let sum = |i| (0..size).map(|rank| number(rank, i)).sum::<f32>();
                    assert!(data.iter().enumerate().all(|(i, &x)| x == sum(i)), "{len}");
                }
                let pending = group.all_reduce_async(Buffer::from(vec![1i32; 500_000]), ReduceOp::Max);
                assert!(pending.wait().unwrap().iter().all(|&x| x == 1));
            });
        }
    }
}

#[test]
fn several_connections_a_pair_carry_one_stream() {
    for streams in [1, 2, 5] {
        let options = options(Tls::Auto, None).tcp_streams(streams);
        run_with(options, TransportKind::Tcp, 3, |group| {
            let next = (group.rank() + 1) % 3;
            let sent: Vec<u8> = (0..3_000_017).map(|i| (i * 31 + group.rank() * 7) as u8).collect();
            let sends: Vec<usize> = (0..3).map(|rank| if rank == next { sent.len() } else { 0 }).collect();
            let from = (group.rank() + 2) % 3;
            let receives: Vec<usize> = (0..3).map(|rank| if rank == from { sent.len() } else { 0 }).collect();
            let mut came = vec![0; sent.len()];
            group.all_to_all_v(&sent, &sends, &mut came, &receives).unwrap();
            assert!(came.iter().enumerate().all(|(i, &x)| x == (i * 31 + from * 7) as u8));
        });
    }
}

#[test]
fn another_secret_or_none_does_not_join() {
    let secret = Secret::random().unwrap();
    let server =
        StoreServer::start("127.0.0.1:0", 1, &Security { secret: Some(secret.clone()), tls: Tls::Auto })
            .unwrap();
    let world = World::local(0, 1, &server.addr().to_string());
    for other in [None, Some(Secret::random().unwrap())] {
        let options = options(Tls::Auto, other).join(Duration::from_secs(3));
        let error = Group::connect(&world, &options).err().unwrap().to_string();
        assert!(error.contains("cannot reach the job's store"), "{error}");
    }
    let group = Group::connect(&world, &options(Tls::Auto, Some(secret.clone()))).unwrap();
    // A second process that takes itself for the same rank is turned away, and does not disturb the first.
    let options = options(Tls::Auto, Some(secret)).join(Duration::from_secs(3));
    let error = Group::connect(&world, &options).err().unwrap().to_string();
    assert!(error.contains("another process is rank 0"), "{error}");
    group.barrier().unwrap();
}

#[test]
fn the_network_needs_a_secret() {
    // 0.0.0.0 is reached from everywhere.
    let error = StoreServer::start("0.0.0.0:0", 1, &Security::default()).err().unwrap().to_string();
    assert!(error.contains("REGATTA_SECRET") && error.contains("REGATTA_TLS=off"), "{error}");
    StoreServer::start("0.0.0.0:0", 1, &Security { secret: None, tls: Tls::Off }).unwrap();
}

#[test]
fn a_crowd_of_unknown_clients_does_not_stall_a_job() {
    let secret = Secret::random().unwrap();
    let security = Security { secret: Some(secret.clone()), tls: Tls::Auto };
    let server = StoreServer::start("127.0.0.1:0", 2, &security).unwrap();
    let address = server.addr();
    let begun = Instant::now();
    // Silent, slow and loud ones; more than are heard at a time.
    let mut held = vec![];
    for number in 0..150 {
        let mut stream = TcpStream::connect(address).unwrap();
        match number % 3 {
            0 => {}
            1 => stream.write_all(&[22, 3, 1]).unwrap(),
            _ => stream.write_all(&[0xff; 2000]).unwrap(),
        }
        held.push(stream);
    }
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let options = options(Tls::Auto, Some(secret.clone()));
            scope.spawn(move || {
                let group = Group::connect(&World::local(rank, 2, &address.to_string()), &options).unwrap();
                let mut sum = [1.0f32];
                group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                assert_eq!(sum, [2.0]);
            });
        }
    });
    // Ranks give up after a minute; a crowd heard one after the other would take longer.
    assert!(begun.elapsed() < Duration::from_secs(50), "{:?}", begun.elapsed());
    // The oldest were thrown out, and nobody got a word of the job.
    let mut said = vec![];
    held[0].set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    held[0].read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "{said:?}");
}
