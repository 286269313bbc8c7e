//! Measures the all-reduce of sums between processes of this host.
//!
//! `cargo run --release -p regatta-comm --example bench_all_reduce -- [ranks] [shm|tcp|thread] [f32|f16|bf16]`
//!
//! Prints, for every number of elements, the median time of a call on memory of the caller and on a registered buffer,
//! and bytes by time. Under a launcher (`mpirun`, `torchrun`, `srun`) it measures that launcher's ranks.

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{DType, Element, Error, Group, Options, ReduceOp, TransportKind, bf16, f16};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// Elements: of f32, 4 bytes to 64 MiB.
const LENGTHS: [usize; 9] = [1, 256, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
/// Says which type the ranks measure.
const TYPE: &str = "BENCH_TYPE";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(world) = World::from_env()? {
        let dtype = std::env::var(TYPE).map_or(Ok(DType::F32), |name| name.parse())?;
        return Ok(measure(&Group::connect(&world, &Options::from_env()?)?, dtype)?);
    }
    let mut args = std::env::args().skip(1);
    let ranks: usize = args.next().map_or(Ok(2), |text| text.parse())?;
    let transport: TransportKind = args.next().map_or(Ok(TransportKind::Shm), |text| text.parse())?;
    let dtype: DType = args.next().map_or(Ok(DType::F32), |text| text.parse())?;
    if transport == TransportKind::Thread {
        let groups = Group::threads(ranks);
        return std::thread::scope(|scope| {
            let threads: Vec<_> =
                groups.iter().map(|group| scope.spawn(move || measure(group, dtype))).collect();
            threads.into_iter().try_for_each(|thread| Ok(thread.join().map_err(|_| "a rank panicked")??))
        });
    }
    let server = StoreServer::start("127.0.0.1:0", ranks, &Security::default())?;
    let children: Vec<_> = (0..ranks)
        .map(|rank| {
            Command::new(std::env::current_exe()?)
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.to_string())
                .env("REGATTA_STORE", server.addr().to_string())
                .env("REGATTA_TRANSPORT", transport.to_string())
                .env(TYPE, dtype.to_string())
                .spawn()
        })
        .collect::<Result<_, _>>()?;
    for mut child in children {
        child.wait()?;
    }
    Ok(())
}

fn measure(group: &Group, dtype: DType) -> Result<(), Error> {
    match dtype {
        DType::F32 => measure_type::<f32>(group),
        DType::F16 => measure_type::<f16>(group),
        DType::BF16 => measure_type::<bf16>(group),
        other => Err(Error::Usage(format!("{other} is not measured, but f32, f16 and bf16 are"))),
    }
}

fn measure_type<T: Element>(group: &Group) -> Result<(), Error> {
    if group.rank() == 0 {
        println!("{} ranks over {}, {}", group.size(), group.transport(), T::DTYPE);
        println!("{:>10}  {:>21}  {:>21}", "bytes", "private", "registered");
    }
    for len in LENGTHS {
        let bytes = len * size_of::<T>();
        let mut private = vec![T::zeroed(); len];
        let mut registered = group.buffer::<T>(len)?;
        let times = [time(group, &mut private)?, time(group, &mut registered)?];
        if group.rank() == 0 {
            let [private, registered] =
                times.map(|time| format!("{:>8.1} us {:>5.1} GB/s", time * 1e6, bytes as f64 / time / 1e9));
            println!("{bytes:>10}  {private}  {registered}");
        }
    }
    Ok(())
}

/// The median time of an all-reduce of `data` in seconds.
fn time<T: Element>(group: &Group, data: &mut [T]) -> Result<f64, Error> {
    // About as many calls as take half a second, and the first few to warm up.
    let calls = (4_000_000_000 / (size_of_val(data) + 1_000_000)).clamp(20, 2000);
    let mut times = Vec::with_capacity(calls);
    for call in 0..calls + 3 {
        let begun = Instant::now();
        group.all_reduce(data, ReduceOp::Sum)?;
        if call >= 3 {
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
