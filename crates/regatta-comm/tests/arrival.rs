//! Ranks on their way into a job: those that prepare are waited for, those that fail say why, those that nobody has
//! seen are named.

use regatta_comm::Arrival;
use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Error, Group, Options, ReduceOp};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

fn options(join: Duration) -> Options {
    Options::default().join(join).trace(None::<std::path::PathBuf>)
}

fn world(rank: usize, size: usize, server: &StoreServer) -> World {
    World::local(rank, size, &server.addr().to_string())
}

fn server(size: usize) -> StoreServer {
    StoreServer::start("127.0.0.1:0", size, &Security::default()).unwrap()
}

#[test]
fn preparing_does_not_count_against_the_others() {
    let server = server(2);
    let short = options(Duration::from_millis(300));
    let mut late = Arrival::announce(&world(1, 2, &server), &short).unwrap();
    let (sender, joined) = channel();
    let (other, options) = (world(0, 2, &server), short.clone());
    let waiting = std::thread::spawn(move || {
        let group = Group::connect(&other, &options).unwrap();
        sender.send(Instant::now()).unwrap();
        group.barrier().unwrap();
    });
    // Several times as long as ranks may take that nobody has seen.
    let worked =
        late.prepare(|| joined.recv_timeout(Duration::from_secs(2)).map_or(Ok(7), |_| Err("too soon")));
    assert_eq!(worked, Ok(7));
    late.join(&short).unwrap().barrier().unwrap();
    waiting.join().unwrap();
}

#[test]
fn what_fails_in_preparation_reaches_those_who_wait_and_those_who_come_later() {
    let server = server(3);
    let long = options(Duration::from_secs(60));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Group::connect(&world(0, 3, &server), &long).err().unwrap());
        let mut failing = Arrival::announce(&world(1, 3, &server), &long).unwrap();
        let outcome: Result<(), _> = failing.prepare(|| Err("its data is gone"));
        assert_eq!(outcome, Err("its data is gone"));
        let later = Group::connect(&world(2, 3, &server), &long).err().unwrap();
        for error in [waiting.join().unwrap(), later] {
            assert_eq!(
                error,
                Error::Aborted { rank: Some(1), reason: "rank 1 gave up: its data is gone".into() }
            );
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_rank_that_leaves_before_it_joins_is_named() {
    let server = server(2);
    let long = options(Duration::from_secs(60));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Group::connect(&world(0, 2, &server), &long).err().unwrap().to_string());
        drop(Arrival::announce(&world(1, 2, &server), &long).unwrap());
        let error = waiting.join().unwrap();
        assert!(error.contains("rank 1 has left the job before"), "{error}");
    });
}

/// Nobody was there yet to hear its goodbye.
#[test]
fn a_rank_that_left_before_the_others_came_is_named() {
    let server = server(2);
    let long = options(Duration::from_secs(60));
    drop(Arrival::announce(&world(1, 2, &server), &long).unwrap());
    let error = Group::connect(&world(0, 2, &server), &long).err().unwrap().to_string();
    assert!(error.contains("rank 1 has left the job before"), "{error}");
}

#[test]
fn times_at_their_limits_are_taken_or_refused_and_never_panic() {
    for (join, deadline) in
        [(Duration::MAX, Duration::MAX), (Duration::from_secs(60), Duration::from_nanos(1))]
    {
        let server = server(2);
        let options = options(join).join(join).deadline(deadline).warn(Duration::MAX);
        std::thread::scope(|scope| {
            for rank in 0..2 {
                let (options, world) = (&options, world(rank, 2, &server));
                // Nothing can be said of an operation with no time at all but that it ends.
                scope.spawn(move || Group::connect(&world, options).map(|group| group.barrier()));
            }
        });
    }
    let server = server(1);
    let zero = Options::default().deadline(Duration::ZERO);
    let error = Group::connect(&world(0, 1, &server), &zero).err().unwrap();
    assert!(matches!(&error, Error::Usage(text) if text.contains("deadline")), "{error}");
}

/// Not a test by itself: a rank in a process of its own, which reaches the store and is stopped there.
#[test]
fn child_rank() {
    let Ok(address) = std::env::var("REGATTA_TEST_STORE") else { return };
    let world = World::local(1, 2, &address);
    let arrival = Arrival::announce(&world, &Options::default()).unwrap();
    println!("announced");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let group = arrival.join(&Options::default()).unwrap();
    let mut sum = [1.0f32];
    group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    println!("sum {}", sum[0]);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn child(server: &StoreServer) -> Killed {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["child_rank", "--exact", "--nocapture"])
        .env("REGATTA_TEST_STORE", server.addr().to_string());
    Killed(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
}

#[test]
fn the_death_of_a_rank_that_prepares_is_told_at_once() {
    let server = server(2);
    let mut other = child(&server);
    let mut lines = BufReader::new(other.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("announced")));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| Group::connect(&world(0, 2, &server), &Options::default()).err().unwrap());
        other.0.kill().unwrap();
        let error = waiting.join().unwrap().to_string();
        assert!(error.contains("rank 1") && error.contains("died"), "{error}");
    });
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_rank_that_goes_on_after_its_preparation_joins() {
    let server = server(2);
    let mut other = child(&server);
    let mut lines = BufReader::new(other.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("announced")));
    other.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let group = Group::connect(&world(0, 2, &server), &Options::default()).unwrap();
    let mut sum = [2.0f32];
    group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert_eq!(sum, [3.0]);
    assert!(lines.any(|line| line.unwrap().contains("sum 3")));
}
