//! Whether a connection is encrypted depends on where it goes, not on where its rank listens.
#![cfg(target_os = "linux")]

use regatta_comm::rendezvous::Secret;
use regatta_comm::{Algorithm, Group, Options, ReduceOp, TransportKind};
use regatta_testkit::{Hosts, Link};
use std::process::Stdio;

/// Not a test by itself: one rank of a job.
#[test]
fn child_rank() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    let run = || -> regatta_comm::Result<()> {
        let (transport, algorithm) = (Some(TransportKind::Tcp), Some(Algorithm::Ring));
        let group = Group::from_env(&Options::from_env()?.transport(transport).algorithm(algorithm))?;
        // Long messages, which a plain connection sends from where they lie.
        for len in [1, 30_000, 2_000_003] {
            let mut data: Vec<f32> = (0..len).map(|i| (i % 1000 + group.rank()) as f32).collect();
            group.all_reduce(&mut data, ReduceOp::Sum)?;
            assert!(data.iter().enumerate().all(|(i, &x)| x == (2 * (i % 1000) + 1) as f32));
        }
        Ok(())
    };
    match run() {
        Ok(()) => println!("done"),
        Err(error) => println!("error: {error}"),
    }
}

#[test]
fn a_rank_that_listens_on_loopback_encrypts_what_it_sends_elsewhere() {
    let Some(hosts) = Hosts::or_skip(2, &Link::default()) else { return };
    let secret = Secret::random().unwrap().to_text();
    let start = |rank: usize| {
        let mut command = hosts.command(rank, std::env::current_exe().unwrap());
        command.args(["child_rank", "--exact", "--nocapture"]).env("REGATTA_TEST_CHILD", "1");
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", hosts.address(0).to_string()).env("MASTER_PORT", "29500");
        command.env("REGATTA_SECRET", &secret).env("REGATTA_TRACE", "off");
        if rank == 1 {
            // Nobody dials the last rank.
            command.env("REGATTA_IFACE_ADDR", "127.0.0.1");
        }
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let ranks = [start(0), start(1)];
    let said =
        ranks.map(|rank| String::from_utf8_lossy(&rank.wait_with_output().unwrap().stdout).into_owned());
    assert!(said.iter().all(|text| text.contains("done")), "{said:?}");
}
