//! Real jobs across hosts: namespaces with a network of their own. Needs root; says so and skips without.
#![cfg(target_os = "linux")]

use regatta_comm::rendezvous::Secret;
use regatta_comm::{Group, Kind, Options, ReduceOp};
use regatta_testkit::{Hosts, Link};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Ended and waited for when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test by itself: one rank of a job, which prints what it finds.
#[test]
fn child_rank() {
    let Ok(mission) = std::env::var("REGATTA_TEST_CHILD") else { return };
    let run = || -> regatta_comm::Result<()> {
        let group = Group::from_env(&Options::from_env()?)?;
        let size = group.size();
        if mission == "operations" {
            for len in [0, 1, 1000, 300_001, 900_001] {
                let mut data: Vec<f64> = (0..len).map(|i| (i % 1000 + group.rank()) as f64).collect();
                group.all_reduce(&mut data, ReduceOp::Sum)?;
                let ranks = size * (size - 1) / 2;
                assert!(data.iter().enumerate().all(|(i, &x)| x == (size * (i % 1000) + ranks) as f64));
                let mut all = vec![0i32; 3 * size];
                group.all_gather(&[group.rank() as i32; 3], &mut all)?;
                assert!(all.iter().enumerate().all(|(i, &x)| x as usize == i / 3));
                let mut from = vec![group.rank() as u8; len];
                group.broadcast(&mut from, size - 1)?;
                assert!(from.iter().all(|&x| x as usize == size - 1));
            }
            println!("done {} {}", group.transport(), group.algorithm(Kind::AllReduce, 1 << 20));
            return Ok(());
        }
        group.barrier()?;
        println!("ready");
        loop {
            group.all_reduce(&mut [0.0f32; 50_000], ReduceOp::Sum)?;
        }
    };
    if let Err(error) = run() {
        println!("error: {error}");
    }
}

/// Starts the ranks of a job, `each` on a host.
fn job(hosts: &Hosts, each: usize, mission: &str, more: &[(&str, &str)]) -> Vec<Killed> {
    let size = hosts.len() * each;
    let start = |rank: usize| {
        let mut command = hosts.command(rank / each, std::env::current_exe().unwrap());
        command
            .args(["child_rank", "--exact", "--nocapture"])
            .env("REGATTA_TEST_CHILD", mission)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", hosts.address(0).to_string())
            .env("MASTER_PORT", "29500")
            .env("REGATTA_TRACE", "off")
            .envs(more.iter().copied())
            .stdout(Stdio::piped());
        Killed(command.spawn().unwrap())
    };
    (0..size).map(start).collect()
}

/// The first line of each rank that contains one of `wanted`.
fn lines(ranks: &mut [Killed], wanted: &[&str]) -> Vec<String> {
    let find = |rank: &mut Killed| {
        let output = BufReader::new(rank.0.stdout.as_mut().unwrap());
        let mut all = output.lines().map_while(Result::ok);
        all.find(|line| wanted.iter().any(|wanted| line.contains(wanted))).unwrap_or_default()
    };
    ranks.iter_mut().map(find).collect()
}

#[test]
fn ranks_on_several_hosts_share_memory_inside_each() {
    let Some(hosts) = Hosts::or_skip(2, &Link::default()) else { return };
    let secret = Secret::random().unwrap().to_text();
    for (tls, each, wanted) in [
        ("auto", 2, "done mixed hierarchical"),
        ("off", 3, "done mixed hierarchical"),
        ("auto", 1, "done tcp doubling"),
        ("off", 1, "done tcp doubling"),
    ] {
        let mut ranks = job(&hosts, each, "operations", &[("REGATTA_TLS", tls), ("REGATTA_SECRET", &secret)]);
        let said = lines(&mut ranks, &["done", "error"]);
        assert!(said.iter().all(|line| line.contains(wanted)), "{tls} {each}: {said:?}");
    }
}

#[test]
fn without_a_secret_nothing_is_said_over_the_network() {
    let Some(hosts) = Hosts::or_skip(2, &Link::default()) else { return };
    let mut ranks = job(&hosts, 1, "operations", &[("REGATTA_JOIN_S", "5")]);
    let said = lines(&mut ranks, &["done", "error"]);
    assert!(said[0].contains("REGATTA_SECRET: is not set"), "{said:?}");
}

#[test]
fn a_cut_cable_is_an_error_on_both_sides() {
    let Some(hosts) = Hosts::or_skip(3, &Link::default()) else { return };
    let secret = Secret::random().unwrap().to_text();
    // The host with the store, and another.
    for cut in [0, 2] {
        let mut ranks =
            job(&hosts, 1, "forever", &[("REGATTA_SECRET", &secret), ("REGATTA_DEADLINE_S", "10")]);
        assert!(lines(&mut ranks, &["ready", "error"]).iter().all(|line| line.contains("ready")));
        hosts.cut(cut);
        let begun = Instant::now();
        let said = lines(&mut ranks, &["error: "]);
        // Every wait ends at its deadline; telling others, or trying to, takes a little longer. What waits for the
        // system's own patience takes a quarter of an hour.
        assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
        for (rank, line) in said.iter().enumerate() {
            let other_side =
                |name: usize| line.contains(&format!("rank {name}")) && (name == cut) != (rank == cut);
            assert!((0..3).any(other_side), "host {cut} was cut, and rank {rank} says: {line}");
        }
        drop(ranks);
        hosts.mend(cut);
    }
}
