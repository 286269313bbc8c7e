//! Messages with tags, from any source: over threads and over processes' transports.

mod common;

use common::{WAYS, run};
use regatta_comm::{Error, Group, Mailbox, ReduceOp, Result};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);
const PUSH: u32 = 7;
const PULL: u32 = 8;
const STOP: u32 = 9;

/// Rank 0 adds what the others push, in the order in which it comes, and answers each with the sum; they push messages of
/// different lengths and types, and all-reduce among themselves meanwhile.
fn serve(group: &Group, mailbox: &Mailbox, pushes: usize) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let workers: Vec<usize> = (1..size).collect();
    if rank == 0 {
        let (mut sum, mut stopped, mut count) = (0.0, 0, 0);
        while stopped < workers.len() {
            let message = mailbox.recv(None, None)?;
            match message.tag() {
                STOP => stopped += 1,
                tag => {
                    assert_eq!(tag, PUSH);
                    let numbers = message.numbers::<f64>()?;
                    assert!(numbers.iter().all(|&number| number == message.from() as f64));
                    sum += numbers.iter().sum::<f64>();
                    count += 1;
                    mailbox.send(&[count], message.from(), PULL)?;
                }
            }
        }
        let expected: f64 = workers
            .iter()
            .map(|&worker| lengths(worker, pushes).map(|len| (len * worker) as f64).sum::<f64>())
            .sum();
        assert_eq!(sum, expected);
        return Ok(());
    }
    let among = group.subgroup(&workers)?;
    for len in lengths(rank, pushes) {
        mailbox.send(&vec![rank as f64; len], 0, PUSH)?;
        let mut ones = [1.0f32; 3];
        among.all_reduce(&mut ones, ReduceOp::Sum)?;
        assert_eq!(ones, [workers.len() as f32; 3]);
        let answer = mailbox.recv(Some(0), Some(PULL))?;
        assert_eq!((answer.from(), answer.len()), (0, 1));
        assert!(answer.numbers::<f64>().unwrap_err().to_string().contains("i32"));
        assert!(answer.numbers::<i32>()?[0] >= 1);
    }
    mailbox.send::<u8>(&[], 0, STOP)
}

fn lengths(rank: usize, pushes: usize) -> impl Iterator<Item = usize> {
    // Some are longer than any channel.
    (0..pushes).map(move |push| [0, 1, 17, 4_000, 70_000][(rank + push) % 5])
}

#[test]
fn a_server_receives_from_any_worker() {
    for way in WAYS {
        for size in [2, 3, 6] {
            run(way, size, DEADLINE, |group| serve(&group, &group.mailbox().unwrap(), 15).unwrap());
        }
    }
}

#[test]
fn tags_are_received_in_any_order_and_each_tag_in_the_order_of_sending() {
    for way in WAYS {
        let outcomes = run(way, 2, DEADLINE, |group| -> Result<()> {
            let mailbox = group.mailbox()?;
            if group.rank() == 1 {
                for number in 0..300i32 {
                    mailbox.send(&[number], 0, (number % 3) as u32)?;
                }
                return group.barrier();
            }
            for tag in [2, 0, 1] {
                for index in 0..100 {
                    let message = mailbox.recv(Some(1), Some(tag))?;
                    assert_eq!(message.numbers::<i32>()?, [index * 3 + tag as i32]);
                }
            }
            assert!(mailbox.recv_timeout(None, None, Duration::ZERO)?.is_none());
            assert!(mailbox.recv_timeout(None, Some(1), Duration::from_millis(20))?.is_none());
            group.barrier()
        });
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    }
}

#[test]
fn ranks_that_send_to_each_other_at_once_do_not_wait_for_each_other() {
    for way in WAYS {
        let outcomes = run(way, 4, DEADLINE, |group| -> Result<()> {
            let (mailbox, rank) = (group.mailbox()?, group.rank());
            let data = vec![rank as f32; 1 << 20];
            let others = || (0..4).filter(|&other| other != rank);
            others().try_for_each(|other| mailbox.send(&data, other, 0))?;
            for other in others() {
                let message = mailbox.recv(Some(other), Some(0))?;
                assert!(message.numbers::<f32>()?.iter().all(|&number| number == other as f32));
            }
            group.barrier()
        });
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    }
}

#[test]
fn a_message_that_never_comes_is_an_error_that_names_who_was_waited_for() {
    for way in WAYS {
        let outcomes = run(way, 3, Duration::from_millis(1500), |group| {
            let mailbox = group.mailbox()?;
            if group.rank() == 0 {
                return mailbox.recv(Some(2), Some(1)).map(|_| ());
            }
            // Alive, and silent, until the job has ended.
            while mailbox.recv_timeout(None, None, Duration::from_millis(50))?.is_none() {}
            Ok(())
        });
        match &outcomes[0] {
            Err(Error::Deadline { rank: 2, .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(
            outcomes[1..].iter().all(|outcome| matches!(outcome, Err(Error::Aborted { rank: Some(0), .. })))
        );
    }
}

#[test]
fn what_cannot_be_is_refused_and_harms_nothing() {
    for way in WAYS {
        let outcomes = run(way, 2, DEADLINE, |group| -> Result<()> {
            let mailbox = group.mailbox()?;
            let own = group.rank();
            for (error, says) in [
                (mailbox.send(&[1i32], 2, 0).unwrap_err(), "no rank 2 in a group of 2"),
                (mailbox.send(&[1i32], own, 0).unwrap_err(), "is this rank itself"),
                (mailbox.recv(Some(5), None).unwrap_err(), "no rank 5"),
            ] {
                assert!(matches!(error, Error::Usage(_)) && error.to_string().contains(says), "{error}");
            }
            mailbox.send(&[own as i32], 1 - own, 0)?;
            assert_eq!(mailbox.recv(None, None)?.numbers::<i32>()?, [1 - own as i32]);
            group.barrier()
        });
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    }
    let alone = Group::solo().mailbox().unwrap();
    assert!(alone.recv(None, None).unwrap_err().to_string().contains("nobody to receive from"));
}

#[test]
fn a_worker_that_has_done_its_work_may_leave() {
    for way in WAYS {
        let outcomes = run(way, 3, DEADLINE, |group| -> Result<()> {
            let mailbox = group.mailbox()?;
            match group.rank() {
                0 => {
                    for _ in 0..6 {
                        mailbox.recv(None, Some(PUSH))?;
                    }
                    // The one that has answered is still there, the other may be gone.
                    mailbox.send::<u8>(&[], 2, STOP)?;
                    mailbox.recv(Some(2), Some(STOP)).map(|_| ())
                }
                1 => (0..3).try_for_each(|number| mailbox.send(&[number], 0, PUSH)),
                _ => {
                    mailbox.send(&[0], 0, PUSH)?;
                    // Meanwhile rank 1 leaves.
                    mailbox.recv_timeout(None, Some(PULL), Duration::from_millis(300))?;
                    (0..2).try_for_each(|number| mailbox.send(&[number], 0, PUSH))?;
                    mailbox.recv(Some(0), Some(STOP))?;
                    mailbox.send::<u8>(&[], 0, STOP)
                }
            }
        });
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    }
}
