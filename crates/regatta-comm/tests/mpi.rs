//! Ranks that an MPI library connects: this program starts itself under `mpirun`, or what `REGATTA_MPIRUN` names, and each
//! rank checks itself.

#![cfg(all(feature = "mpi", unix))]

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Algorithm, Buffer, Element, Group, Kind, Options, ReduceOp, TransportKind, bf16, f16};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Longer than any of these jobs takes.
const LIMIT: Duration = Duration::from_secs(120);

/// This program as rank of a job in which each plays `part`.
fn rank(command: &mut Command, part: &str, options: &[(&str, &str)]) -> (bool, String) {
    let variables = [
        ("REGATTA_TEST_MPI", part),
        ("REGATTA_TRANSPORT", "mpi"),
        ("REGATTA_TRACE", "off"),
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ];
    let command = command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    let command = command.envs(variables).envs(options.iter().copied());
    let mut job = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let output = BufReader::new(job.stdout.take().unwrap());
    let (sender, lines) = channel();
    let reader = std::thread::spawn(move || {
        output.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
    });
    let (begun, mut text) = (Instant::now(), String::new());
    while let Ok(line) = lines.recv_timeout(LIMIT.saturating_sub(begun.elapsed())) {
        text.push_str(&line);
        text.push('\n');
    }
    if begun.elapsed() >= LIMIT {
        job.kill().unwrap();
        job.wait().unwrap();
        panic!("{part} takes too long: {text}");
    }
    reader.join().unwrap();
    (job.wait().unwrap().success(), text)
}

/// The launcher of the MPI library that this program was built with.
fn mpirun() -> String {
    std::env::var("REGATTA_MPIRUN").unwrap_or("mpirun".into())
}

/// Whether the launcher is Open MPI's, which can be told to let ranks go on when one has died. That of MPICH and Intel MPI
/// may end them before they can say anything.
fn lets_others_go_on() -> bool {
    let version = Command::new(mpirun()).arg("--version").output();
    version.is_ok_and(|version| String::from_utf8_lossy(&version.stdout).contains("Open MPI"))
}

/// Runs `size` ranks; whether all went well, and what they wrote. Nothing where there is no `mpirun`.
fn job(size: usize, part: &str, options: &[(&str, &str)]) -> Option<(bool, String)> {
    let mpirun = mpirun();
    let mut command = Command::new(&mpirun);
    if command.arg("--version").output().is_err() {
        eprintln!("skipped: there is no {mpirun}");
        return None;
    }
    let mut command = Command::new(&mpirun);
    command.args(["-n", &size.to_string()]).arg(std::env::current_exe().unwrap());
    Some(rank(&mut command, part, options))
}

/// The errors that ranks have written.
fn errors(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.split_once("error: ")).map(|(_, error)| error).collect()
}

/// Not a test by itself: a rank of those below.
#[test]
fn child() {
    let Ok(part) = std::env::var("REGATTA_TEST_MPI") else { return };
    match part.as_str() {
        "operations" => operations(&connect()),
        "groups" => groups(&connect()),
        "serialized" => {
            let level = mpi::Threading::Serialized;
            let (_universe, given) = mpi::initialize_with_threading(level).unwrap();
            assert_eq!(given, level);
            let group = connect();
            operations(&group);
            groups(&group);
        }
        "funneled" => {
            let (_universe, given) = mpi::initialize_with_threading(mpi::Threading::Funneled).unwrap();
            assert_eq!(given, mpi::Threading::Funneled);
            println!("error: {}", Group::from_env(&Options::from_env().unwrap()).unwrap_err());
        }
        "alone" => println!("error: {}", Group::from_env(&Options::from_env().unwrap()).unwrap_err()),
        "differ" => differ(),
        "signal" => signal(),
        _ => panic!("{part} is no part"),
    }
}

fn connect() -> Group {
    let group = Group::from_env(&Options::from_env().unwrap()).unwrap();
    assert_eq!(group.transport(), TransportKind::Mpi);
    group
}

/// As [`connect`], with a store that outlives all ranks.
fn connect_from_outside() -> Group {
    let address = std::env::var("REGATTA_TEST_STORE").unwrap();
    let told = World::from_env().unwrap().unwrap();
    let world = World::local(told.rank, told.size, &address);
    Group::connect(&world, &Options::from_env().unwrap()).unwrap()
}

/// A type with a plain f64 on each side; the values used are exact in all types.
trait Plain: Element + PartialEq {
    fn of(value: f64) -> Self;
    fn plain(self) -> f64;
}

macro_rules! plain {
    ($($type:ty: $of:expr, $plain:expr;)*) => {
        $(impl Plain for $type {
            fn of(value: f64) -> Self { $of(value) }
            fn plain(self) -> f64 { $plain(self) }
        })*
    };
}

plain! {
    f32: |x| x as f32, f64::from;
    f64: |x| x, |x| x;
    f16: f16::from_f64, f16::to_f64;
    bf16: bf16::from_f64, bf16::to_f64;
    i32: |x| x as i32, f64::from;
    i64: |x| x as i64, |x| x as f64;
    u8: |x| x as u8, f64::from;
    i8: |x| x as i8, f64::from;
}

/// Rank `rank`'s `index`-th number: small, so that sums and products are exact in every type.
fn number(rank: usize, index: usize, op: ReduceOp) -> f64 {
    match op {
        ReduceOp::Product => [1.0, 2.0, 1.0, 1.0][(rank + 3 * index) % 4],
        _ => ((rank * 5 + index * 7) % 11) as f64,
    }
}

fn reference(size: usize, index: usize, op: ReduceOp, integer: bool) -> f64 {
    let values = (0..size).map(|rank| number(rank, index, op));
    match op {
        ReduceOp::Sum => values.sum(),
        ReduceOp::Mean if integer => (values.sum::<f64>() / size as f64).trunc(),
        ReduceOp::Mean => values.sum::<f64>() / size as f64,
        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
        ReduceOp::Product => values.product(),
        ReduceOp::And => values.fold(-1i64, |all, value| all & value as i64) as f64,
        ReduceOp::Or => values.fold(0i64, |all, value| all | value as i64) as f64,
        other => unreachable!("{other} is not used here"),
    }
}

fn reductions<T: Plain>(group: &Group, len: usize, op: ReduceOp) {
    let (rank, size) = (group.rank(), group.size());
    if !op.suits(T::DTYPE) {
        return;
    }
    let name = format!("{group:?} {} {op} {len}", T::DTYPE);
    let mine = |len: usize| (0..len).map(|index| T::of(number(rank, index, op))).collect::<Vec<T>>();
    let right = |data: &[T], from: usize, what: &str| {
        for (index, value) in data.iter().enumerate() {
            let expected = reference(size, from + index, op, !T::DTYPE.is_float());
            let error = (value.plain() - expected).abs();
            // A mean need not be exact in 16 bits.
            assert!(error <= 0.01 * expected.abs().max(1.0), "{what} {name}: {value:?} is not {expected}");
        }
    };
    let root = len % size;
    let mut data = mine(len);
    group.all_reduce(&mut data, op).unwrap();
    right(&data, 0, "all_reduce");
    let mut data = mine(len);
    group.reduce(&mut data, op, root).unwrap();
    match rank == root {
        true => right(&data, 0, "reduce"),
        false => assert_eq!(data, mine(len), "reduce {name}"),
    }
    let mut output = vec![T::of(0.0); len];
    group.reduce_scatter(&mine(len * size), &mut output, op).unwrap();
    right(&output, rank * len, "reduce_scatter");
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let mut output = vec![T::of(0.0); counts[rank]];
    group.reduce_scatter_v(&mine(counts.iter().sum()), &mut output, &counts, op).unwrap();
    right(&output, counts[..rank].iter().sum(), "reduce_scatter_v");
}

fn moves<T: Plain>(group: &Group, len: usize) {
    let (rank, size) = (group.rank(), group.size());
    let of = |rank: usize, len: usize| {
        (0..len).map(|index| T::of(number(rank, index, ReduceOp::Sum))).collect::<Vec<T>>()
    };
    let zeros = |len: usize| vec![T::of(0.0); len];
    let name = format!("{group:?} {} {len}", T::DTYPE);
    let root = len % size;
    let even: Vec<T> = (0..size).flat_map(|rank| of(rank, len)).collect();

    let mut all = zeros(len * size);
    group.all_gather(&of(rank, len), &mut all).unwrap();
    assert_eq!(all, even, "all_gather {name}");
    let mut all = zeros(len * size);
    all[rank * len..][..len].copy_from_slice(&of(rank, len));
    group.all_gather_in_place(&mut all).unwrap();
    assert_eq!(all, even, "all_gather_in_place {name}");
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let mut all = zeros(counts.iter().sum());
    group.all_gather_v(&of(rank, counts[rank]), &mut all, &counts).unwrap();
    let uneven: Vec<T> = (0..size).flat_map(|rank| of(rank, counts[rank])).collect();
    assert_eq!(all, uneven, "all_gather_v {name}");

    let mut data = of(rank, len);
    group.broadcast(&mut data, root).unwrap();
    assert_eq!(data, of(root, len), "broadcast {name}");

    let mut all = zeros(if rank == root { len * size } else { 0 });
    group.gather(&of(rank, len), &mut all, root).unwrap();
    assert!(rank != root || all == even, "gather {name}");
    let mut own = zeros(len);
    let whole = if rank == root { of(root, len * size) } else { vec![] };
    group.scatter(&whole, &mut own, root).unwrap();
    assert_eq!(own, of(root, len * size)[rank * len..][..len], "scatter {name}");

    let mut output = zeros(len * size);
    group.all_to_all(&of(rank, len * size), &mut output).unwrap();
    let expected: Vec<T> =
        (0..size).flat_map(|from| of(from, len * size)[rank * len..][..len].to_vec()).collect();
    assert_eq!(output, expected, "all_to_all {name}");
    group.barrier().unwrap();

    // Around a ring: the first sends first.
    if size > 1 {
        let (left, right) = ((rank + size - 1) % size, (rank + 1) % size);
        let mut theirs = zeros(len);
        if rank == 0 {
            group.send(&of(rank, len), right).unwrap();
            group.recv(&mut theirs, left).unwrap();
        } else {
            group.recv(&mut theirs, left).unwrap();
            group.send(&of(rank, len), right).unwrap();
        }
        assert_eq!(theirs, of(left, len), "send/recv {name}");
    }
}

fn operations(group: &Group) {
    const OPS: [ReduceOp; 7] = [
        ReduceOp::Sum,
        ReduceOp::Mean,
        ReduceOp::Min,
        ReduceOp::Max,
        ReduceOp::Product,
        ReduceOp::And,
        ReduceOp::Or,
    ];
    let wanted = Options::from_env().unwrap().algorithm.unwrap_or(Algorithm::Native);
    assert_eq!(group.algorithm(Kind::AllReduce, 1 << 20), wanted);
    assert_eq!(group.algorithm(Kind::Gather, 4), Algorithm::Linear);
    for len in [0, 1, 1001] {
        for op in OPS {
            reductions::<f32>(group, len, op);
            reductions::<f64>(group, len, op);
            reductions::<f16>(group, len, op);
            reductions::<bf16>(group, len, op);
            reductions::<i32>(group, len, op);
            reductions::<i64>(group, len, op);
            reductions::<u8>(group, len, op);
            reductions::<i8>(group, len, op);
        }
        moves::<f32>(group, len);
        moves::<i64>(group, len);
        moves::<u8>(group, len);
        moves::<bf16>(group, len);
    }
    // Several steps and many messages, none of them full at the end.
    reductions::<f32>(group, (1 << 18) + 3, ReduceOp::Mean);
    reductions::<bf16>(group, (1 << 20) + 1, ReduceOp::Max);
    moves::<u8>(group, 1 << 20);
    moves::<f64>(group, (1 << 17) + 1);
    // A number that is none stays so, whichever rank has it.
    for rank in 0..group.size() {
        for op in [ReduceOp::Min, ReduceOp::Max] {
            let mut data = [1.0f32, if rank == group.rank() { f32::NAN } else { 2.0 }];
            group.all_reduce(&mut data, op).unwrap();
            assert!(data[0] == 1.0 && data[1].is_nan(), "{op} {data:?}");
        }
    }
    let mut data = [group.rank() as f32, 1.0];
    group.all_reduce(&mut data, ReduceOp::Adasum).unwrap();
}

fn groups(group: &Group) {
    let (rank, size) = (group.rank(), group.size());
    // Backwards, odd and even apart.
    let half = group.split(Some(rank as u64 % 2), -(rank as i64)).unwrap().unwrap();
    assert_eq!(half.members()[half.rank()], rank);
    moves::<f32>(&half, 1001);
    reductions::<f32>(&half, 1001, ReduceOp::Sum);
    assert!(group.split((rank == 0).then_some(7), 0).unwrap().is_some() == (rank == 0));
    if rank + 1 == size || rank == 0 {
        let mut ends = vec![size - 1, 0];
        ends.dedup();
        moves::<i32>(&group.subgroup(&ends).unwrap(), 77);
    }
    // Two groups at once, each in the order of its own submissions.
    for _ in 0..20 {
        let sums: Vec<_> =
            (0..4).map(|_| group.all_reduce_async(Buffer::from(vec![1.0f32; 5000]), ReduceOp::Sum)).collect();
        let mut whole = vec![0i32; half.size() * 300];
        half.all_gather(&[half.rank() as i32; 300], &mut whole).unwrap();
        let barrier = group.barrier_async();
        for (index, number) in whole.iter().enumerate() {
            assert_eq!(*number as usize, index / 300);
        }
        for sum in sums {
            assert!(sum.wait().unwrap().iter().all(|sum| *sum == size as f32));
        }
        barrier.wait().unwrap();
    }
    // Ranks that have run out of data.
    for _ in 0..=rank {
        group.all_reduce(&mut [1.0f32], ReduceOp::Sum).unwrap();
    }
    assert_eq!(group.join().unwrap(), size - 1);
}

fn differ() {
    let group = connect_from_outside();
    group.barrier().unwrap();
    let outcome = match (std::env::var("REGATTA_TEST_CALLS").unwrap().as_str(), group.rank()) {
        ("kinds" | "native_and_streams", 0) => group.all_reduce(&mut [1.0f32; 10], ReduceOp::Sum),
        ("kinds", _) => group.all_gather(&[1.0f32; 5], &mut vec![0.0; 5 * group.size()]),
        ("native_and_streams", _) => group.gather(&[1.0f32; 5], &mut vec![0.0; 5 * group.size()], 1),
        ("lengths", rank) => group.all_reduce(&mut vec![1.0f64; 1 << (10 + rank)], ReduceOp::Sum),
        ("roots", rank) => group.broadcast(&mut [1.0f32; 10], rank.min(1)),
        (calls, _) => panic!("{calls} are no calls"),
    };
    println!("error: {}", outcome.unwrap_err());
}

/// Rank 1 gets a signal in the middle of work.
fn signal() {
    let group = connect_from_outside();
    let mut pids = vec![0i32; group.size()];
    group.all_gather(&[std::process::id() as i32], &mut pids).unwrap();
    let signal = |name: &str| {
        // It may be gone already.
        Command::new("kill").args([format!("-{name}"), pids[1].to_string()]).output().unwrap();
    };
    let mut data = vec![1.0f32; 100_000];
    for number in 0.. {
        if number == 50 && group.rank() == 1 {
            signal(&std::env::var("REGATTA_TEST_SIGNAL").unwrap());
        }
        let begun = Instant::now();
        if let Err(error) = group.all_reduce(&mut data, ReduceOp::Max) {
            println!("error: {error}");
            assert!(begun.elapsed() < Duration::from_secs(100));
            // Nobody else would.
            signal("KILL");
            return;
        }
    }
}

#[test]
fn every_operation_in_every_way() {
    for algorithm in ["", "native", "ring", "tree"] {
        for size in if algorithm.is_empty() { 1..=2 } else { 2..=4 } {
            let Some((good, text)) = job(size, "operations", &[("REGATTA_ALGORITHM", algorithm)]) else {
                return;
            };
            assert!(good, "{size} {algorithm}: {text}");
        }
    }
}

#[test]
fn groups_handles_and_joining() {
    for algorithm in ["", "ring"] {
        for size in 2..=4 {
            let Some((good, text)) = job(size, "groups", &[("REGATTA_ALGORITHM", algorithm)]) else { return };
            assert!(good, "{size} {algorithm}: {text}");
        }
    }
}

#[test]
fn programs_that_have_initialised_mpi() {
    let Some((good, text)) = job(2, "serialized", &[]) else { return };
    assert!(good, "{text}");
    let Some((_, text)) = job(2, "funneled", &[]) else { return };
    assert!(errors(&text).iter().any(|error| error.contains("MPI_THREAD_SERIALIZED")), "{text}");
}

#[test]
fn different_calls_name_both_sides() {
    let cases = [
        ("kinds", "all_reduce #2 f32[10] sum", "all_gather #2 f32[5]"),
        ("native_and_streams", "all_reduce #2 f32[10] sum", "gather #2 f32[5] to 1"),
        ("lengths", "all_reduce #2 f64[1024] sum", "all_reduce #2 f64[2048] sum"),
        ("roots", "broadcast #2 f32[10] from 0", "broadcast #2 f32[10] from 1"),
    ];
    for (calls, one, other) in cases {
        let server = StoreServer::start("127.0.0.1:0", 2, &Security::default()).unwrap();
        let store = server.addr().to_string();
        let options = [("REGATTA_TEST_CALLS", calls), ("REGATTA_TEST_STORE", &store)];
        let Some((_, text)) = job(2, "differ", &options) else { return };
        let errors = errors(&text);
        assert!(!errors.is_empty(), "{calls}: {text}");
        for error in errors {
            assert!(error.contains(one) && error.contains(other), "{calls}: {text}");
        }
    }
}

#[test]
fn killed_and_stopped_ranks_are_named() {
    for algorithm in ["native", "ring"] {
        for (signal, deadline) in [("STOP", "10"), ("KILL", "600")] {
            let server = StoreServer::start("127.0.0.1:0", 3, &Security::default()).unwrap();
            let store = server.addr().to_string();
            let options = [
                ("REGATTA_TEST_STORE", store.as_str()),
                ("REGATTA_TEST_SIGNAL", signal),
                ("REGATTA_DEADLINE_S", deadline),
                ("REGATTA_ALGORITHM", algorithm),
                // Else mpirun ends the others before they can say anything.
                ("OMPI_MCA_orte_enable_recovery", "1"),
                ("OMPI_MCA_orte_abort_on_non_zero_status", "0"),
            ];
            let begun = Instant::now();
            let Some((_, text)) = job(3, "signal", &options) else { return };
            let errors = errors(&text);
            let silent = errors.is_empty() && signal == "KILL" && !lets_others_go_on();
            assert!(!errors.is_empty() || silent, "{algorithm} {signal}: {text}");
            assert!(errors.iter().all(|error| error.contains("rank 1")), "{algorithm} {signal}: {text}");
            assert!(begun.elapsed() < LIMIT, "{algorithm} {signal}: {:?}", begun.elapsed());
        }
    }
}

#[test]
fn without_mpirun_the_error_says_so() {
    let server = StoreServer::start("127.0.0.1:0", 2, &Security::default()).unwrap();
    let address = server.addr().to_string();
    let ranks = ["0", "1"].map(|number| {
        let address = address.clone();
        std::thread::spawn(move || {
            let options = [("RANK", number), ("WORLD_SIZE", "2"), ("REGATTA_STORE", &address)];
            rank(&mut Command::new(std::env::current_exe().unwrap()), "alone", &options).1
        })
    });
    let text = ranks.map(|rank| rank.join().unwrap()).concat();
    assert!(errors(&text).iter().any(|error| error.contains("start the program by mpirun")), "{text}");
}
