//! `regatta bench`: measures collectives.

use crate::error::Result;
use crate::launcher;
use clap::{Args, Subcommand, ValueEnum};
use regatta_comm::rendezvous::World;
use regatta_comm::{Algorithm, Group, Kind, Options, ReduceOp, TransportKind};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time one collective operation for several sizes.
    Collective(CollectiveArgs),
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
    SendRecv,
}

impl Op {
    fn kind(self) -> Kind {
        match self {
            Self::AllReduce => Kind::AllReduce,
            Self::ReduceScatter => Kind::ReduceScatter,
            Self::AllGather => Kind::AllGather,
            Self::Broadcast => Kind::Broadcast,
            Self::Barrier => Kind::Barrier,
            Self::SendRecv => Kind::Send,
        }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum MemoryKind {
    /// Ordinary memory of each rank.
    Private,
    /// Memory from the group that the transport reduces in place, as gradient buckets are.
    Registered,
}

#[derive(Args)]
struct CollectiveArgs {
    /// The operation.
    #[arg(long, value_enum, default_value_t = Op::AllReduce)]
    op: Op,
    /// Number of ranks.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// `thread`, `shm` or `tcp`; left out: the fastest that works.
    #[arg(long)]
    transport: Option<TransportKind>,
    /// `direct` or `ring`; left out: what suits the transport.
    #[arg(long)]
    algorithm: Option<Algorithm>,
    /// Bytes of f32 data on each rank, separated by commas; K, M and G multiply by 1024.
    #[arg(long, value_delimiter = ',', value_parser = bytes, default_value = "4,1K,16K,256K,4M,16M,64M")]
    sizes: Vec<usize>,
    /// Which memory the data is in (all_reduce and broadcast).
    #[arg(long, value_enum, default_value_t = MemoryKind::Private)]
    memory: MemoryKind,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

fn bytes(text: &str) -> std::result::Result<usize, String> {
    let (digits, factor) = match text.trim().strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 1 << 10),
        Some(digits) if text.ends_with('M') => (digits, 1 << 20),
        Some(digits) => (digits, 1 << 30),
        None => (text.trim(), 1),
    };
    let count: usize = digits.parse().map_err(|_| format!("{text} is no size; write 4096, 16K, 4M"))?;
    count
        .checked_mul(factor)
        .filter(|bytes| bytes.is_multiple_of(4))
        .ok_or(format!("{text}: f32 data is a multiple of 4 bytes"))
}

#[derive(Serialize)]
struct Line {
    op: Op,
    transport: String,
    algorithm: String,
    memory: MemoryKind,
    world: usize,
    bytes: usize,
    median_us: f64,
    algbw_gbs: f64,
    busbw_gbs: f64,
}

pub fn run(args: BenchArgs) -> Result<ExitCode> {
    let What::Collective(args) = args.what;
    if let Some(world) = World::from_env()? {
        return measure(&args, &Group::connect(&world, &options(&args)?)?);
    }
    if args.workers == 1 {
        return measure(&args, &Group::solo());
    }
    if args.transport == Some(TransportKind::Thread) {
        let groups = Group::threads_with(args.workers, &options(&args)?);
        return std::thread::scope(|scope| {
            let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(|| measure(&args, group))).collect();
            let mut outcome = Ok(ExitCode::SUCCESS);
            for rank in ranks {
                match rank.join() {
                    Ok(Ok(_)) => {}
                    Ok(error) => outcome = error,
                    Err(_) => outcome = Err("a rank panicked".into()),
                }
            }
            outcome
        });
    }
    launcher::launch(&launcher::Job {
        program: std::env::current_exe()?,
        arguments: std::env::args().skip(1).collect(),
        workers: args.workers,
        threads: 1,
        transport: args.transport,
        environment: vec![],
        lead_owns_terminal: true,
    })
}

fn options(args: &CollectiveArgs) -> Result<Options> {
    let mut options = Options::from_env()?;
    options.transport = args.transport.or(options.transport);
    options.algorithm = args.algorithm.or(options.algorithm);
    Ok(options)
}

fn measure(args: &CollectiveArgs, group: &Group) -> Result<ExitCode> {
    for &bytes in &args.sizes {
        let seconds = time(args, group, bytes / 4)?;
        if group.rank() != 0 {
            continue;
        }
        let n = group.size() as f64;
        let bandwidth = |factor: f64| bytes as f64 / seconds / 1e9 * factor;
        // Bytes that cross each rank's link per byte of data, as nccl-tests define bus bandwidth.
        let bus = match args.op {
            Op::AllReduce => 2.0 * (n - 1.0) / n,
            Op::ReduceScatter | Op::AllGather => (n - 1.0) / n,
            Op::Broadcast | Op::SendRecv => 1.0,
            Op::Barrier => 0.0,
        };
        let line = Line {
            op: args.op,
            transport: group.transport().to_string(),
            algorithm: group.algorithm(args.op.kind(), bytes).to_string(),
            memory: args.memory,
            world: group.size(),
            bytes,
            median_us: seconds * 1e6,
            algbw_gbs: bandwidth(1.0),
            busbw_gbs: bandwidth(bus),
        };
        if args.json {
            println!("{}", serde_json::to_string(&line)?);
        } else {
            println!(
                "{:>10} bytes  {:>10.1} us  algbw {:>7.3} GB/s  busbw {:>7.3} GB/s",
                line.bytes, line.median_us, line.algbw_gbs, line.busbw_gbs
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Median seconds of one operation on `len` elements.
fn time(args: &CollectiveArgs, group: &Group, len: usize) -> Result<f64> {
    let iterations = ((64 << 20) / (4 * len.max(1))).clamp(5, 400);
    let n = group.size();
    let share = len / n;
    let mut private = vec![1.0f32; len];
    let mut registered = match args.memory {
        MemoryKind::Registered => Some(group.buffer::<f32>(len)?),
        MemoryKind::Private => None,
    };
    let data: &mut [f32] = registered.as_deref_mut().unwrap_or(&mut private);
    let mut part = vec![0.0f32; share];
    let (next, previous) = ((group.rank() + 1) % n, (group.rank() + n - 1) % n);
    let mut times = Vec::with_capacity(iterations);
    for iteration in 0..iterations + 3 {
        // The same numbers each time: sums must not grow to infinity.
        data.iter_mut().take(16).for_each(|x| *x = 1.0);
        if iteration == 3 {
            group.barrier()?;
        }
        let begun = Instant::now();
        match args.op {
            Op::AllReduce => group.all_reduce(data, ReduceOp::Sum)?,
            Op::ReduceScatter => group.reduce_scatter(&data[..share * n], &mut part, ReduceOp::Sum)?,
            Op::AllGather => group.all_gather(&part, &mut data[..share * n])?,
            Op::Broadcast => group.broadcast(data, 0)?,
            Op::Barrier => group.barrier()?,
            Op::SendRecv if n == 1 => {}
            Op::SendRecv if group.rank().is_multiple_of(2) && group.rank() + 1 < n => {
                group.send(data, next)?
            }
            Op::SendRecv if !group.rank().is_multiple_of(2) => group.recv(data, previous)?,
            Op::SendRecv => {}
        }
        if iteration >= 3 {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
