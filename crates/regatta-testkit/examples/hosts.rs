//! Measures all-reduce between hosts with slow links, and compares it with the lower bound for such links.
//!
//! Usage: `hosts [HOSTS] [RANKS_PER_HOST] [MBIT] [DELAY_US] [MIB] [ALGORITHMS] [ROUNDS]`. The defaults are 4 hosts
//! with one rank each, 1000 Mbit/s, 1000 us from host to host, 64 MiB of f32, `ring`, 5 rounds. Algorithms are
//! separated by commas, and take turns in each round. The bound is 2(n-1)/n * bytes / rate for n hosts, which any
//! algorithm must send over the link of a host. `REGATTA_TLS=off` disables encryption.

use regatta_comm::rendezvous::Secret;
use regatta_comm::{Algorithm, Group, Options, ReduceOp};
use regatta_testkit::{Hosts, Link};
use std::error::Error;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::var("RANK").is_ok() {
        return rank();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize, default: f64| match arguments.get(place) {
        Some(text) => text.parse::<f64>().map_err(|_| format!("{text:?} is not a number")),
        None => Ok(default),
    };
    let (count, each) = (number(0, 4.0)? as usize, number(1, 1.0)? as usize);
    let (mbit, delay, mib, rounds) =
        (number(2, 1000.0)?, number(3, 1000.0)?, number(4, 64.0)?, number(6, 5.0)?);
    let algorithms: Vec<String> =
        arguments.get(5).map_or("ring", String::as_str).split(',').map(String::from).collect();
    // A path has two cables, each with half of the delay.
    let link = Link {
        rate_bits: (mbit > 0.0).then_some((mbit * 1e6) as u64),
        delay: Duration::from_secs_f64(delay / 2e6),
        loss_percent: 0.0,
    };
    let hosts = Hosts::new(count, &link)?;
    let bytes = mib * f64::from(1 << 20);
    let bound = 2.0 * (count as f64 - 1.0) / count as f64 * bytes * 8.0 / (mbit * 1e6);
    println!(
        "{count} hosts of {each} ranks, {mbit} Mbit/s, {delay} us from host to host, {mib} MiB: bound {bound:.4} s"
    );
    let mut times = vec![vec![]; algorithms.len()];
    for round in 0..rounds as usize {
        for (algorithm, times) in algorithms.iter().zip(&mut times) {
            let seconds = job(&hosts, each, algorithm, bytes as usize)?;
            println!("round {round} {algorithm:<16} {seconds:.4} s, {:.3} of the bound", seconds / bound);
            times.push(seconds);
        }
    }
    for (algorithm, times) in algorithms.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!("median  {algorithm:<16} {median:.4} s, {:.3} of the bound", median / bound);
    }
    Ok(())
}

/// Starts a job, and returns the seconds that rank 0 measured.
fn job(hosts: &Hosts, each: usize, algorithm: &str, bytes: usize) -> Result<f64, Box<dyn Error>> {
    let (program, secret) = (std::env::current_exe()?, Secret::random()?);
    let size = hosts.len() * each;
    let start = |rank: usize| -> Result<Child, Box<dyn Error>> {
        let mut command = hosts.command(rank / each, &program);
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", size.to_string()),
            ("LOCAL_RANK", (rank % each).to_string()),
            ("LOCAL_WORLD_SIZE", each.to_string()),
            ("MASTER_ADDR", hosts.address(0).to_string()),
            ("MASTER_PORT", "29500".into()),
            ("REGATTA_SECRET", secret.to_text()),
            ("REGATTA_ALGORITHM", algorithm.into()),
            ("HOSTS_BYTES", bytes.to_string()),
        ];
        Ok(command.envs(variables).stdout(Stdio::piped()).spawn()?)
    };
    let ranks: Vec<Child> = (0..size).map(start).collect::<Result<_, _>>()?;
    let mut seconds = Err("rank 0 did not measure".into());
    for (rank, child) in ranks.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("rank {rank} failed").into());
        }
        if rank == 0 {
            seconds = Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?);
        }
    }
    seconds
}

/// A rank of the job. Rank 0 prints the median seconds of an operation.
fn rank() -> Result<(), Box<dyn Error>> {
    let group = Group::from_env(&Options::from_env()?)?;
    let bytes: usize = std::env::var("HOSTS_BYTES")?.parse()?;
    let wanted: Algorithm = std::env::var("REGATTA_ALGORITHM")?.parse()?;
    let used = group.algorithm(regatta_comm::Kind::AllReduce, bytes);
    if used != wanted {
        return Err(
            format!("{wanted} cannot be used over {}: {used} would be used", group.transport()).into()
        );
    }
    let mut data = vec![1.0f32; bytes / 4];
    let mut times = vec![];
    for round in 0..4 {
        data.fill(1.0);
        group.barrier()?;
        let begun = Instant::now();
        group.all_reduce(&mut data, ReduceOp::Sum)?;
        // The first round is not counted, because the TCP windows grow in it.
        if round > 0 {
            times.push(begun.elapsed().as_secs_f64());
        }
        if data.iter().any(|&x| x != group.size() as f32) {
            return Err("the sum is wrong".into());
        }
    }
    times.sort_by(f64::total_cmp);
    if group.rank() == 0 {
        println!("{}", times[times.len() / 2]);
    }
    Ok(())
}
