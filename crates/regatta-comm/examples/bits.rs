//! A hash of what every operation leaves on all ranks, for each transport, number of ranks, algorithm, type and reduction:
//! two builds give the same bits where they print the same lines.
//!
//! `bits [LARGEST WORLD]`: worlds of 1 to 9 ranks unless another number is given; processes, which it starts itself.

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{
    Algorithm, DType, Element, Group, Kind, Options, ReduceOp, Reduction, Result, Typed, bf16,
};
use std::process::{Command, Stdio};

const LENGTHS: [usize; 3] = [1, 13, 2_001];
/// More than goes on in one piece; for some types, since it takes long.
const LONG: usize = 70_003;

fn main() -> Result<()> {
    if std::env::var_os("RANK").is_some() {
        return rank();
    }
    let most = std::env::args().nth(1).map_or(9, |text| text.parse().expect("a number of ranks"));
    let program = std::env::current_exe().expect("this program's path");
    for transport in ["shm", "tcp", "mixed"] {
        for size in 1..=most {
            let server = StoreServer::start("127.0.0.1:0", size, &Security::default())?;
            let start = |rank: usize| {
                let mut command = Command::new(&program);
                command
                    .env("RANK", rank.to_string())
                    .env("WORLD_SIZE", size.to_string())
                    .env("REGATTA_STORE", server.addr().to_string())
                    .env("REGATTA_DEADLINE_S", "300")
                    .env("REGATTA_TRACE", "off")
                    .stdout(if rank == 0 { Stdio::inherit() } else { Stdio::null() });
                match transport {
                    // Two hosts, of which the first has more ranks where their number is odd.
                    "mixed" => {
                        command.env("REGATTA_HOST", if rank < size.div_ceil(2) { "one" } else { "two" })
                    }
                    name => command.env("REGATTA_TRANSPORT", name),
                };
                command.spawn().expect("a rank starts")
            };
            let ranks: Vec<_> = (0..size).map(start).collect();
            for mut rank in ranks {
                assert!(rank.wait().expect("a rank ends").success(), "a rank failed");
            }
        }
    }
    Ok(())
}

fn rank() -> Result<()> {
    let world = World::from_env()?.expect("a place in a job");
    let group = Group::connect(&world, &Options::from_env()?)?;
    for &algorithm in Algorithm::ALL {
        let offers = |kind: &&Kind| algorithm.works_over(group.transport(), **kind);
        let kinds: Vec<Kind> = Kind::ALL.iter().filter(offers).copied().collect();
        if kinds.is_empty() {
            continue;
        }
        let group = group.with_algorithm(Some(algorithm))?;
        for kind in kinds {
            all_types(&group, algorithm, kind)?;
        }
    }
    // Fused, scaled, uneven and by pairs.
    grouped(&group)
}

fn all_types(group: &Group, algorithm: Algorithm, kind: Kind) -> Result<()> {
    DType::ALL.iter().try_for_each(|dtype| dtype.with(OneType { group, algorithm, kind }))
}

struct OneType<'a> {
    group: &'a Group,
    algorithm: Algorithm,
    kind: Kind,
}

impl Typed for OneType<'_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        one_type::<T>(self.group, self.algorithm, self.kind)
    }
}

/// Numbers that no sum of a few holds exactly.
fn numbers<T: Element>(len: usize, rank: usize, seed: u64) -> Vec<T> {
    let number = |index: usize| {
        let mut x =
            (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (rank as u64 + 1 + seed * 977) << 17;
        x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 27;
        let unit = (x >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0;
        T::from_f64(if T::DTYPE.is_float() { unit * 1.7 } else { unit * 1e10 % 120.0 })
    };
    (0..len).map(number).collect()
}

fn reductions<T: Element>(kind: Kind) -> Vec<ReduceOp> {
    let reduces = matches!(kind, Kind::AllReduce | Kind::Reduce | Kind::ReduceScatter);
    if !reduces {
        return vec![ReduceOp::Sum];
    }
    let suits = |op: &ReduceOp| op.suits(T::DTYPE) && (*op != ReduceOp::Adasum || kind == Kind::AllReduce);
    ReduceOp::ALL.iter().copied().filter(suits).collect()
}

fn one_type<T: Element>(group: &Group, algorithm: Algorithm, kind: Kind) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    for op in reductions::<T>(kind) {
        let mut hash = Hash::new();
        let long =
            matches!(T::DTYPE, DType::F32 | DType::BF16) && matches!(op, ReduceOp::Sum | ReduceOp::Mean);
        let lengths = LENGTHS.into_iter().chain(long.then_some(LONG));
        for (seed, len) in lengths.enumerate() {
            let mut data = numbers::<T>(len, rank, seed as u64);
            let parts = matches!(kind, Kind::ReduceScatter | Kind::Scatter | Kind::AllToAll);
            let whole = numbers::<T>(if parts { len * size } else { 0 }, rank, seed as u64);
            let gathers = matches!(kind, Kind::AllGather | Kind::Gather | Kind::AllToAll);
            let mut gathered = vec![T::zeroed(); if gathers { len * size } else { 0 }];
            let root = len % size;
            match kind {
                Kind::AllReduce => group.all_reduce(&mut data, op)?,
                Kind::Reduce => group.reduce(&mut data, op, root)?,
                Kind::ReduceScatter => group.reduce_scatter(&whole, &mut data, op)?,
                Kind::AllGather => group.all_gather(&data, &mut gathered)?,
                Kind::Gather => group.gather(&data, &mut gathered, root)?,
                Kind::Scatter => group.scatter(&whole, &mut data, root)?,
                Kind::Broadcast => group.broadcast(&mut data, root)?,
                Kind::AllToAll => group.all_to_all(&whole, &mut gathered)?,
                Kind::Barrier => group.barrier()?,
                _ => {}
            }
            hash.add(&data);
            hash.add(&gathered);
        }
        tell(group, &format!("{algorithm} {} {} {op}", kind.name(), T::DTYPE), hash)?;
    }
    Ok(())
}

fn grouped(group: &Group) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let mut hash = Hash::new();
    let mut one = numbers::<f32>(300, rank, 1);
    let mut two = numbers::<f32>(5_000, rank, 2);
    group.all_reduce_grouped(&mut [&mut one, &mut two], ReduceOp::Mean)?;
    hash.add(&one);
    hash.add(&two);
    let mut data = numbers::<bf16>(20_000, rank, 3);
    group.all_reduce(&mut data, Reduction { op: ReduceOp::Sum, before: 0.3, after: 1.1 })?;
    hash.add(&data);
    let counts: Vec<usize> = (0..size).map(|index| index * 70 % 211).collect();
    let own = numbers::<f32>(counts[rank], rank, 4);
    let total = counts.iter().sum();
    let mut all = vec![0.0; total];
    group.all_gather_v(&own, &mut all, &counts)?;
    hash.add(&all);
    let mut part = vec![0.0; counts[rank]];
    group.reduce_scatter_v(&numbers::<f32>(total, rank, 5), &mut part, &counts, ReduceOp::Sum)?;
    hash.add(&part);
    tell(group, "grouped, scaled, uneven", hash)
}

/// Rank 0 prints the hash of all ranks' hashes.
fn tell(group: &Group, what: &str, hash: Hash) -> Result<()> {
    let mut all = vec![0i64; group.size()];
    group.all_gather(&[hash.0.cast_signed()], &mut all)?;
    if group.rank() == 0 {
        let mut whole = Hash::new();
        whole.add(&all);
        let transport = group.transport();
        println!("{transport} {} {what} {:016x}", group.size(), whole.0);
    }
    Ok(())
}

/// FNV-1a.
struct Hash(u64);

impl Hash {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add<T: Element>(&mut self, numbers: &[T]) {
        let add = |hash: u64, number: &T| {
            let bits = number.to_f64().to_bits();
            // The bits of a number are those of its value: NaN and the sign of zero included.
            (hash ^ bits).wrapping_mul(0x0100_0000_01b3)
        };
        self.0 = numbers.iter().fold(self.0, add);
    }
}
