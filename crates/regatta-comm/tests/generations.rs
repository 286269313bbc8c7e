//! Jobs whose members change.

mod common;

use common::{WAYS, run};
use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Error, Group, Options, ReduceOp, TransportKind};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

/// Of each generation after the first.
const MEMBERS: [&[usize]; 10] = [
    &[0, 1, 2],
    &[3, 1],
    &[2, 3, 0],
    &[0, 1, 2, 3],
    &[1],
    &[3, 2, 1, 0],
    &[0, 3],
    &[2, 1, 3],
    &[1, 0],
    &[0, 1, 2, 3],
];

/// The sum of `len` numbers of each member, which every member knows; and the same in a group of some of them.
fn work(group: &Group, len: usize) -> regatta_comm::Result<()> {
    let number = |member: usize| (member + 1) as f32;
    let me = group.members()[group.rank()];
    let expect = |group: &Group, len: usize| -> regatta_comm::Result<()> {
        let expected: f32 = group.members().iter().map(|&member| number(member)).sum();
        let mut sum = group.buffer(len)?;
        sum.fill(number(me));
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        assert!(sum.iter().all(|&x| x == expected), "{group:?}: {} and not {expected}", sum[0]);
        Ok(())
    };
    expect(group, 3)?;
    expect(group, len)?;
    let backwards: Vec<usize> = (0..group.size()).rev().collect();
    expect(&group.subgroup(&backwards)?, len / 2)?;
    group.barrier()
}

#[test]
fn four_ranks_go_through_ten_generations() {
    for way in WAYS {
        run(way, 4, DEADLINE, |group| {
            let rank = group.rank();
            let mut last = group.clone();
            for (index, members) in MEMBERS.iter().enumerate() {
                let generation = 1 + index as u64;
                if !members.contains(&rank) {
                    continue;
                }
                let next = last.regroup(generation, members).unwrap();
                assert_eq!((next.generation(), next.members()), (generation, *members));
                assert_eq!(members[next.rank()], rank);
                // A group of an earlier generation is over.
                if last.size() > 1 {
                    let error = last.barrier().unwrap_err();
                    assert!(matches!(error, Error::Aborted { .. } | Error::Left { .. }), "{error}");
                }
                for _ in 0..3 {
                    work(&next, 300_000).unwrap();
                }
                if index % 2 == 0 && members.len() > 1 {
                    // It ends in the middle of an operation.
                    if rank == members[0] {
                        next.abort("enough");
                    } else {
                        let error = next.all_reduce(&mut vec![0f32; 3_000_000], ReduceOp::Sum).unwrap_err();
                        let told = matches!(&error, Error::Aborted { rank: Some(by), reason }
                            if *by == members[0] && reason.contains("enough"));
                        assert!(told, "{error}");
                    }
                }
                last = next;
            }
        });
    }
}

#[test]
fn what_cannot_begin_is_an_error_and_the_next_one_can() {
    for transport in [TransportKind::Thread, TransportKind::Tcp] {
        run((transport, None), 3, DEADLINE, |group| {
            for bad in [[0, 0].as_slice(), &[(group.rank() + 1) % 3]] {
                assert!(matches!(group.regroup(1, bad), Err(Error::Usage(_))), "{bad:?}");
            }
            assert!(matches!(group.regroup(0, &[group.rank()]), Err(Error::Usage(_))));
            group.barrier().unwrap();
            // They name different members.
            if group.rank() < 2 {
                let members: &[usize] = if group.rank() == 0 { &[0, 1] } else { &[1, 0] };
                let error = group.regroup(2, members).unwrap_err().to_string();
                assert!(
                    error.contains("all must name the same") || error.contains("did not come"),
                    "{error}"
                );
            }
            work(&group.regroup(3, &[2, 0, 1]).unwrap(), 1000).unwrap();
        });
    }
}

/// Not a test by itself: a rank that does what it is told.
#[test]
fn child_rank() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    let mut group = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let outcome = (|| -> regatta_comm::Result<()> {
            let options = Options::from_env()?;
            match words.as_slice() {
                ["start"] => group = Group::connect(&World::from_env()?.unwrap(), &options).map(Some)?,
                ["begin", generation, members] => {
                    let members: Vec<usize> = members.split(',').map(|rank| rank.parse().unwrap()).collect();
                    let generation = generation.parse().unwrap();
                    let next = match &group {
                        Some(group) => group.regroup(generation, &members)?,
                        None => Group::come(&World::from_env()?.unwrap(), &options, generation, &members)?,
                    };
                    group = Some(next);
                }
                ["work", len] => work(group.as_ref().unwrap(), len.parse().unwrap())?,
                ["stay"] => group.as_ref().unwrap().all_reduce(&mut vec![0f32; 4 << 20], ReduceOp::Sum)?,
                _ => group = None,
            }
            Ok(())
        })();
        match outcome {
            Ok(()) => println!("\nTOLD ok"),
            Err(error) => println!("\nTOLD {error}"),
        }
    }
}

/// A process that does what it is told.
struct Rank {
    process: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Rank {
    fn new(rank: usize, size: usize, server: &StoreServer, transport: TransportKind) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_rank", "--nocapture"])
            .env("REGATTA_TEST_CHILD", "1")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.max(rank + 1).to_string())
            .env("REGATTA_STORE", server.addr().to_string())
            .env("REGATTA_TRANSPORT", transport.to_string())
            .env("REGATTA_DEADLINE_S", "60")
            .env("REGATTA_TRACE", "off")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(told) = line.strip_prefix("TOLD ") {
                    let _ = sender.send(told.to_string());
                }
            }
        });
        Self { process, input, answers }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input, "{what}").unwrap();
    }

    fn hear(&self) -> String {
        self.answers.recv_timeout(DEADLINE).expect("a rank says nothing")
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Tells some ranks the same, and expects that it works.
fn all(ranks: &mut [Option<Rank>], members: &[usize], what: &str) {
    members.iter().for_each(|&member| ranks[member].as_mut().unwrap().tell(what));
    for &member in members {
        assert_eq!(ranks[member].as_ref().unwrap().hear(), "ok", "rank {member}: {what}");
    }
}

#[test]
fn processes_die_and_others_take_their_places() {
    for transport in [TransportKind::Tcp, TransportKind::Shm] {
        let server = StoreServer::start("127.0.0.1:0", 4, &Security::default()).unwrap();
        let mut ranks: Vec<Option<Rank>> =
            (0..4).map(|rank| Some(Rank::new(rank, 4, &server, transport))).collect();
        ranks.resize_with(6, || None);
        let mut members: Vec<usize> = (0..4).collect();
        all(&mut ranks, &members, "start");
        for generation in 1..=10 {
            all(&mut ranks, &members, "work 100000");
            // One dies while the others are in an operation with it.
            let dies = members[generation % members.len()];
            for &member in members.iter().filter(|&&member| member != dies) {
                ranks[member].as_mut().unwrap().tell("stay");
            }
            ranks[dies] = None;
            for &member in members.iter().filter(|&&member| member != dies) {
                let told = ranks[member].as_ref().unwrap().hear();
                assert!(
                    told.contains(&format!("rank {dies} ")) && told.contains("died"),
                    "{transport}: {told}"
                );
            }
            // In every third generation nobody takes its place; a rank with a number beyond the first ones may come, too.
            members.retain(|&member| member != dies);
            if generation % 3 != 0 {
                members.push(dies);
            }
            if generation == 5 {
                members.insert(0, 5);
            }
            for &member in &members {
                ranks[member].get_or_insert_with(|| Rank::new(member, 4, &server, transport));
            }
            let list: Vec<String> = members.iter().map(usize::to_string).collect();
            all(&mut ranks, &members, &format!("begin {generation} {}", list.join(",")));
        }
        all(&mut ranks, &members, "work 100000");
        all(&mut ranks, &members, "end");
        let traffic = server.traffic();
        assert!(traffic.entries <= 6, "{traffic:?}");
    }
}
