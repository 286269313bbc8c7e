//! What many ranks cost at their start: `many_ranks 64 data=4,tensor=4,pipe=4 [tcp|shm]`, or `many_ranks 512 data=8,tensor=8,pipe=8 thread`.
//!
//! Every rank joins, makes the groups that a training run makes (each axis three times, all axes together twice), and calls
//! all_reduce in each. Printed: seconds from the start of the first rank to the end of the first all_reduce of all ranks, to
//! the end of all groups' first all_reduce; open files and threads of a rank; bytes through the job's store (as the kernel
//! counts them on its connections).

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Group, Mesh, Options, ReduceOp, Result};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(size), Some(axes)) = (arguments.first().and_then(|size| size.parse().ok()), arguments.get(1))
    else {
        eprintln!("many_ranks RANKS AXES [tcp|shm|thread]");
        std::process::exit(2);
    };
    let transport = arguments.get(2).map_or("tcp", String::as_str);
    if std::env::var_os("RANK").is_some() {
        return rank(axes);
    }
    if transport == "thread" { threads(size, axes) } else { processes(size, axes, transport) }
}

/// Joins all groups of `axes`, and calls all_reduce in each; after the first one and after all, `tell` is called.
fn work(group: &Group, axes: &str, mut tell: impl FnMut(&str)) -> Result<()> {
    let mut sum = [group.rank() as i64];
    group.all_reduce(&mut sum, ReduceOp::Sum)?;
    assert_eq!(sum[0], (group.size() * (group.size() - 1) / 2) as i64);
    tell("first");
    let axes: Vec<(&str, usize)> = axes
        .split(',')
        .map(|axis| axis.split_once('=').expect("AXIS=SIZE"))
        .map(|(name, size)| (name, size.parse().expect("a size")))
        .collect();
    let names: Vec<&str> = axes.iter().map(|(name, _)| *name).collect();
    let mesh = Mesh::new(group, &axes)?;
    let mut groups = vec![];
    for _ in 0..2 {
        for name in &names {
            groups.push(mesh.over(&[name])?);
        }
        groups.push(mesh.over(&names)?);
    }
    groups.extend(names.iter().map(|name| mesh.axis(name).cloned()).collect::<Result<Vec<_>>>()?);
    for group in &groups {
        let mut ones = [1.0f32; 256];
        group.all_reduce(&mut ones, ReduceOp::Sum)?;
        assert_eq!(ones, [group.size() as f32; 256]);
        let mut gathered = vec![0; group.size()];
        group.all_gather(&[group.rank() as i32], &mut gathered)?;
        assert!(gathered.iter().enumerate().all(|(rank, &number)| rank == number as usize));
        group.barrier()?;
    }
    tell("all");
    Ok(())
}

fn threads(size: usize, axes: &str) -> Result<()> {
    let begun = Instant::now();
    let groups = Group::threads_with(size, &Options::default())?;
    let outcome: Result<Vec<()>> = std::thread::scope(|scope| {
        let rank = |group: Group| {
            scope.spawn(move || {
                work(&group, axes, |what| {
                    if group.rank() == 0 {
                        println!("{size} threads, {axes}: {what} {:.2} s", begun.elapsed().as_secs_f64());
                    }
                })
            })
        };
        let ranks: Vec<_> = groups.into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    });
    outcome?;
    println!("{size} threads, {axes}: ended {:.2} s", begun.elapsed().as_secs_f64());
    Ok(())
}

fn rank(axes: &str) -> Result<()> {
    let world = World::from_env()?.expect("a place in a job");
    let group = Group::connect(&world, &Options::from_env()?)?;
    work(&group, axes, |what| {
        let count = |folder: &str| std::fs::read_dir(folder).map_or(0, Iterator::count);
        println!("{what} {} {}", count("/proc/self/fd"), count("/proc/self/task"));
        // Everything stays open until the parent has counted.
        let _ = std::io::stdout().flush();
        let _ = std::io::stdin().lock().read_line(&mut String::new());
    })
}

fn processes(size: usize, axes: &str, transport: &str) -> Result<()> {
    let program = std::env::current_exe().expect("this program's path");
    let server = StoreServer::start("127.0.0.1:0", size, &Security::default())?;
    let port = server.addr().port();
    let begun = Instant::now();
    let start = |rank: usize| {
        let mut command = Command::new(&program);
        command
            .args([&size.to_string(), axes, transport])
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("REGATTA_STORE", server.addr().to_string())
            .env("REGATTA_TRANSPORT", transport)
            .env("REGATTA_JOIN_S", "300")
            .env("REGATTA_DEADLINE_S", "120")
            .env("REGATTA_TRACE", "off")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command.spawn().expect("a rank starts")
    };
    let mut ranks: Vec<Child> = (0..size).map(start).collect();
    let mut outputs: Vec<_> =
        ranks.iter_mut().map(|rank| BufReader::new(rank.stdout.take().expect("a pipe")).lines()).collect();
    let mut waiting = Duration::ZERO;
    for what in ["first", "all"] {
        let mut most = [0; 2];
        for output in &mut outputs {
            let line = output.next().and_then(std::result::Result::ok).unwrap_or_default();
            let mut words = line.split_whitespace();
            assert_eq!(words.next(), Some(what), "a rank has failed");
            for (most, count) in most.iter_mut().zip(words) {
                *most = count.parse::<usize>().expect("a number").max(*most);
            }
        }
        let seconds = (begun.elapsed() - waiting).as_secs_f64();
        let paused = Instant::now();
        let bytes = store_bytes(port);
        println!(
            "{size} ranks over {transport}, {axes}: {what} {seconds:.2} s, {} open files and {} threads a rank, store {bytes}",
            most[0], most[1]
        );
        for rank in &mut ranks {
            rank.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("a rank reads");
        }
        waiting += paused.elapsed();
    }
    for mut rank in ranks {
        assert!(rank.wait().expect("a rank ends").success(), "a rank has failed");
    }
    println!(
        "{size} ranks over {transport}, {axes}: ended {:.2} s",
        (begun.elapsed() - waiting).as_secs_f64()
    );
    Ok(())
}

/// Bytes that the connections of the server at `port` have carried, as `ss` tells.
fn store_bytes(port: u16) -> String {
    let output = Command::new("ss").args(["-tinH", "sport", "=", &format!(":{port}")]).output();
    let Ok(output) = output else { return "unknown (needs ss)".into() };
    let text = String::from_utf8_lossy(&output.stdout);
    let sum = |name: &str| -> u64 {
        text.split_whitespace().filter_map(|word| word.strip_prefix(name)?.parse::<u64>().ok()).sum()
    };
    format!("{} bytes in, {} out", sum("bytes_received:"), sum("bytes_sent:"))
}
