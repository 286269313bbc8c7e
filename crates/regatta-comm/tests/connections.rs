//! Groups share the connections of their ranks.
#![cfg(target_os = "linux")]

mod common;

use common::run;
use regatta_comm::rendezvous::{Security, StoreServer};
use regatta_comm::{Algorithm, Buffer, Error, Group, Mesh, Options, ReduceOp, TransportKind};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

const WAYS: [(TransportKind, Option<Algorithm>); 2] =
    [(TransportKind::Tcp, Some(Algorithm::Ring)), (TransportKind::Mixed, Some(Algorithm::Ring))];

#[test]
fn two_threads_of_a_rank_work_in_two_groups_at_once() {
    for way in WAYS {
        run(way, 2, DEADLINE, |group| {
            let other = group.subgroup(&[1, 0]).unwrap();
            let peer = |group: &Group| 1 - group.rank();
            let work = |group: &Group, lengths: &[usize]| {
                for round in 0..4000 {
                    let len = lengths[round % lengths.len()];
                    let number = |rank: usize| (round * 3 + rank) as i32;
                    if round % 5 == 0 {
                        let mut sum = vec![number(group.rank()); len];
                        group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                        assert!(sum.iter().all(|&x| x == number(0) + number(1)));
                        continue;
                    }
                    // One rank sends, and then the other.
                    let sends = round % 2 == group.rank();
                    let mut data = vec![number(0); len];
                    match sends {
                        true => group.send(&data, peer(group)).unwrap(),
                        false => {
                            data.fill(0);
                            group.recv(&mut data, peer(group)).unwrap();
                        }
                    }
                    assert!(data.iter().all(|&x| x == number(0)));
                }
            };
            std::thread::scope(|scope| {
                scope.spawn(|| work(&group, &[1, 300, 20_000, 7]));
                scope.spawn(|| work(&other, &[5, 3, 1000, 1, 90_000]));
            });
        });
    }
}

#[test]
fn a_group_that_nobody_reads_stops_no_other() {
    for way in WAYS {
        run(way, 2, DEADLINE, |group| {
            let (slow, quick) = (group.subgroup(&[0, 1]).unwrap(), group.subgroup(&[0, 1]).unwrap());
            let len = 30 << 20;
            if group.rank() == 0 {
                // More than any buffer holds.
                let sending = slow.send_async(Buffer::from(vec![3u8; len]), 1);
                for round in 0..2000 {
                    let mut sum = vec![1i32; 1 + round * 20];
                    quick.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                    assert!(sum.iter().all(|&x| x == 2));
                }
                assert!(!sending.is_done());
                quick.barrier().unwrap();
                sending.wait().unwrap();
            } else {
                for round in 0..2000 {
                    let mut sum = vec![1i32; 1 + round * 20];
                    quick.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                }
                quick.barrier().unwrap();
                let mut data = vec![0u8; len];
                slow.recv(&mut data, 0).unwrap();
                assert!(data.iter().all(|&x| x == 3));
            }
            group.barrier().unwrap();
        });
    }
}

#[test]
fn a_small_message_does_not_wait_for_its_receiver() {
    // No rank receives before it has sent, in any order of ranks.
    run(WAYS[0], 4, DEADLINE, |group| {
        for round in 0..50 {
            for step in 1..4 {
                let to = (group.rank() + step * if round % 2 == 0 { 1 } else { 3 }) % 4;
                group.send(&vec![group.rank() as u8; 1000], to).unwrap();
            }
            for from in (0..4).filter(|&from| from != group.rank()) {
                let mut data = vec![9u8; 1000];
                group.recv(&mut data, from).unwrap();
                assert!(data.iter().all(|&x| usize::from(x) == from));
            }
        }
    });
}

#[test]
fn a_group_that_a_rank_has_dropped_is_an_error_there_and_nowhere_else() {
    let errors = run(WAYS[0], 2, DEADLINE, |group| {
        let part = group.subgroup(&[0, 1]).unwrap();
        part.barrier().unwrap();
        if group.rank() == 1 {
            drop(part);
            group.barrier().unwrap();
            return String::new();
        }
        group.barrier().unwrap();
        let begun = Instant::now();
        let error = part.barrier().unwrap_err();
        assert!(
            begun.elapsed() < DEADLINE
                && matches!(error, Error::PeerDied { rank: 1, .. } | Error::Left { rank: 1, .. }),
            "{error}"
        );
        error.to_string()
    });
    assert!(errors[0].contains("rank 1"), "{errors:?}");
}

/// Not a test by itself: one rank of a large job, which says how many files it has open.
#[test]
fn child_rank() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    let run = || -> regatta_comm::Result<usize> {
        let world = Group::from_env(&Options::from_env()?)?;
        let mesh = Mesh::new(&world, &[("data", 4), ("tensor", 4), ("pipe", 4)])?;
        let groups: Vec<&Group> =
            ["data", "tensor", "pipe"].map(|axis| mesh.axis(axis)).into_iter().collect::<Result<_, _>>()?;
        let planes = [["data", "tensor"], ["data", "pipe"], ["tensor", "pipe"]];
        let planes: Vec<Group> = planes.iter().map(|axes| mesh.over(axes)).collect::<Result<_, _>>()?;
        for group in groups.into_iter().chain(&planes).chain([&world]) {
            let mut sum = vec![1.0f32; 1000];
            group.all_reduce(&mut sum, ReduceOp::Sum)?;
            assert!(sum.iter().all(|&x| x == group.size() as f32));
        }
        world.barrier()?;
        Ok(std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count))
    };
    match run() {
        Ok(files) => println!("files {files}"),
        Err(error) => println!("error: {error}"),
    }
    // Until all have been heard.
    let _ = std::io::stdout().flush();
}

/// Ended and waited for when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn many_ranks_in_many_groups_have_few_files_open() {
    let size = 64;
    let server = StoreServer::start("127.0.0.1:0", size, &Security::default()).unwrap();
    let start = |rank: usize| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["child_rank", "--exact", "--nocapture"])
            .env("REGATTA_TEST_CHILD", "1")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("REGATTA_STORE", server.addr().to_string())
            .env("REGATTA_TRACE", "off")
            .env("REGATTA_TRANSPORT", "tcp")
            .env("REGATTA_DEADLINE_S", "120")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Killed(child)
    };
    let mut ranks: Vec<Killed> = (0..size).map(start).collect();
    let mut most = 0;
    for rank in &mut ranks {
        let output = BufReader::new(rank.0.stdout.take().unwrap());
        // To its end, so that nobody writes to a closed pipe.
        let lines: Vec<String> = output.lines().map_while(Result::ok).collect();
        let said = lines.into_iter().find(|line| line.contains("files ") || line.contains("error: "));
        let said = said.unwrap_or_default();
        let files = said.split("files ").nth(1).and_then(|count| count.trim().parse::<usize>().ok());
        most = most.max(files.unwrap_or_else(|| panic!("a rank says {said:?}")));
    }
    println!("{most} files");
    // With connections of its own for each of the seven groups a rank would have more than 130.
    assert!(most < 100, "{most} open files");
}
