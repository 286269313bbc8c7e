//! The processes of a job: a rank, which executes the sequence of operations until one fails, and a store.

use crate::random::Random;
use regatta_comm::rendezvous::{Security, StoreServer};
use regatta_comm::{Group, Options, Pending, ReduceOp, Result};
use std::error::Error;

/// Elements of the largest operation.
const LONGEST: u64 = 300_000;
/// Handles that may be open at the same time.
const HANDLES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Barrier,
    Reduce,
    Gather,
    AllToAll,
}

const KINDS: [Kind; 8] = [
    Kind::AllReduce,
    Kind::AllGather,
    Kind::ReduceScatter,
    Kind::Broadcast,
    Kind::Barrier,
    Kind::Reduce,
    Kind::Gather,
    Kind::AllToAll,
];
/// The first of [`KINDS`] have variants that return a handle.
const WITH_HANDLES: usize = 5;

/// One operation of the sequence, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    kind: Kind,
    /// Elements as in the call: for all_gather and reduce_scatter those of one rank's part.
    len: usize,
    root: usize,
    handle: bool,
}

impl Operation {
    /// Operation `number` of the job with this seed.
    pub fn of(seed: u64, number: u64, world: usize) -> Self {
        let mut random = Random::new(seed ^ (number << 32));
        let kind = KINDS[random.below(KINDS.len() as u64) as usize];
        // Short and long operations use different algorithms, so there are many of both.
        let longest = [16, 10_000, LONGEST][random.below(3) as usize];
        let whole = random.below(longest) as usize;
        let len = match kind {
            Kind::AllReduce | Kind::Broadcast | Kind::Reduce => whole,
            Kind::AllGather | Kind::ReduceScatter | Kind::Gather | Kind::AllToAll => whole / world,
            Kind::Barrier => 0,
        };
        let root = random.below(world as u64) as usize;
        let handle = random.below(3) == 0 && KINDS[..WITH_HANDLES].contains(&kind);
        Self { kind, len, root, handle }
    }

    /// The mismatched operation that the victim calls instead: another kind, or another length.
    pub fn mismatched(self, seed: u64) -> Self {
        let mut random = Random::new(!seed);
        let other = KINDS[(KINDS.iter().position(|&kind| kind == self.kind).unwrap_or(0)
            + 1
            + random.below(KINDS.len() as u64 - 1) as usize)
            % KINDS.len()];
        if self.kind != Kind::Barrier && random.below(2) == 0 {
            return Self { len: self.len + 1 + random.below(1000) as usize, ..self };
        }
        let handle = self.handle && KINDS[..WITH_HANDLES].contains(&other);
        Self { kind: other, len: if other == Kind::Barrier { 0 } else { self.len }, handle, ..self }
    }

    /// The operation as errors write it. `number` is its number in the sequence.
    pub fn text(self, number: u64) -> String {
        let Self { len, root, .. } = self;
        // The first operation of the group is the barrier at the start.
        let number = number + 2;
        match self.kind {
            Kind::AllReduce => format!("all_reduce #{number} f32[{len}] sum"),
            Kind::AllGather => format!("all_gather #{number} f32[{len}]"),
            Kind::ReduceScatter => format!("reduce_scatter #{number} f32[{len}] sum"),
            Kind::Broadcast => format!("broadcast #{number} f32[{len}] from {root}"),
            Kind::Barrier => format!("barrier #{number}"),
            Kind::Reduce => format!("reduce #{number} f32[{len}] sum to {root}"),
            Kind::Gather => format!("gather #{number} f32[{len}] to {root}"),
            Kind::AllToAll => format!("all_to_all #{number} f32[{len}]"),
        }
    }

    /// Executes the operation and checks the result. For an operation with a handle, returns a function that waits
    /// for it and checks its result.
    fn call(self, group: &Group) -> Result<Option<Open>> {
        let (rank, size) = (group.rank(), group.size());
        let own = (rank + 1) as f32;
        let sum = (size * (size + 1) / 2) as f32;
        let zeros = |len| group.buffer::<f32>(len);
        let filled = |len| {
            zeros(len).map(|mut buffer| {
                buffer.fill(own);
                buffer
            })
        };
        let all = |data: &[f32], wanted: f32| data.iter().all(|&value| value == wanted);
        let gathered = move |data: &[f32]| {
            let part = data.len() / size;
            (0..size).all(|rank| all(&data[rank * part..(rank + 1) * part], (rank + 1) as f32))
        };
        let Self { len, root, .. } = self;
        let from = (root + 1) as f32;
        if self.handle {
            return Ok(Some(match self.kind {
                Kind::AllReduce => {
                    let open = group.all_reduce_async(filled(len)?, ReduceOp::Sum);
                    open_handle(self, open, move |data| all(data, sum))
                }
                Kind::AllGather => {
                    let open = group.all_gather_async(filled(len)?, zeros(len * size)?);
                    open_handle(self, open, move |data| gathered(&data.1))
                }
                Kind::ReduceScatter => {
                    let open = group.reduce_scatter_async(filled(len * size)?, zeros(len)?, ReduceOp::Sum);
                    open_handle(self, open, move |data| all(&data.1, sum))
                }
                Kind::Broadcast => {
                    open_handle(self, group.broadcast_async(filled(len)?, root), move |data| all(data, from))
                }
                // Other kinds have no variant with a handle.
                _ => open_handle(self, group.barrier_async(), |()| true),
            }));
        }
        let correct = match self.kind {
            Kind::AllReduce => {
                let mut data = vec![own; len];
                group.all_reduce(&mut data, ReduceOp::Sum)?;
                all(&data, sum)
            }
            Kind::AllGather => {
                let mut data = vec![0.0; len * size];
                group.all_gather(&vec![own; len], &mut data)?;
                gathered(&data)
            }
            Kind::ReduceScatter => {
                let mut data = vec![0.0; len];
                group.reduce_scatter(&vec![own; len * size], &mut data, ReduceOp::Sum)?;
                all(&data, sum)
            }
            Kind::Broadcast => {
                let mut data = vec![own; len];
                group.broadcast(&mut data, root)?;
                all(&data, from)
            }
            Kind::Barrier => group.barrier().map(|()| true)?,
            Kind::Reduce => {
                let mut data = vec![own; len];
                group.reduce(&mut data, ReduceOp::Sum, root)?;
                all(&data, if rank == root { sum } else { own })
            }
            Kind::Gather => {
                let mut data = vec![0.0; if rank == root { len * size } else { 0 }];
                group.gather(&vec![own; len], &mut data, root)?;
                rank != root || gathered(&data)
            }
            Kind::AllToAll => {
                let mut data = vec![0.0; len * size];
                group.all_to_all(&vec![own; len * size], &mut data)?;
                gathered(&data)
            }
        };
        report(self, correct);
        Ok(None)
    }
}

/// Waits for an open handle and checks its result.
type Open = Box<dyn FnOnce() -> Result<()>>;

/// Makes an [`Open`] from a handle and a check of its result.
fn open_handle<T: Send + 'static>(
    operation: Operation,
    open: Pending<T>,
    check: impl FnOnce(&T) -> bool + 'static,
) -> Open {
    Box::new(move || {
        report(operation, check(&open.wait()?));
        Ok(())
    })
}

/// Prints a line if the result was not correct.
fn report(operation: Operation, correct: bool) {
    if !correct {
        println!("wrong numbers: {}", operation.text(0));
    }
}

/// The number in an environment variable.
fn number(name: &str) -> Result<u64, Box<dyn Error>> {
    Ok(std::env::var(name)?.parse()?)
}

/// A rank. It prints `ready`, then `mismatch` before it makes a mismatched call, and `error: <text>` at its end.
pub fn run() -> Result<(), Box<dyn Error>> {
    let seed = number("CHAOS_SEED")?;
    let mismatch = number("CHAOS_MISMATCH").ok();
    let group = Group::from_env(&Options::from_env()?)?;
    group.barrier()?;
    println!("ready");
    let mut open: Vec<Open> = vec![];
    let mut outcome = Ok(());
    for count in 0.. {
        let mut operation = Operation::of(seed, count, group.size());
        if mismatch == Some(count) {
            // Operations before the mismatch are completed first, so that it cannot affect them.
            outcome = open.drain(..).try_for_each(|open| open());
            operation = operation.mismatched(seed);
            // The parent records the time and then answers, so no error can come before that time.
            println!("mismatch");
            std::io::stdin().read_line(&mut String::new())?;
        }
        outcome = outcome.and_then(|()| operation.call(&group)).map(|more| open.extend(more));
        if outcome.is_ok() && (open.len() == HANDLES || !operation.handle) {
            outcome = open.drain(..).try_for_each(|open| open());
        }
        if outcome.is_err() {
            break;
        }
    }
    if let Err(error) = outcome {
        println!("error: {error}");
    }
    Ok(())
}

/// The store of a job on this host. It prints its address, and ends when its input ends.
pub fn store() -> Result<(), Box<dyn Error>> {
    let own = std::env::var("REGATTA_IFACE_ADDR")?;
    let options = Options::from_env()?;
    let security = Security { secret: options.secret, tls: options.tls };
    let server = StoreServer::start(&format!("{own}:0"), number("WORLD_SIZE")? as usize, &security)?;
    println!("{}", server.addr());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
