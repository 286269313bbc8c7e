//! A soak test: each trial runs a job and injects a fault. It checks that every surviving rank gets an error in time
//! that names the cause, that every process ends, and that nothing is left behind.
//!
//! Usage: `chaos [TRIALS] [SEED]`. Trial t has the seed SEED + t, so `chaos 1 SEED` repeats a trial with the same
//! job, the same operations and the same fault. `CHAOS_VERBOSE=1` prints the output of every rank.

mod job;
mod random;
mod rank;
mod verdict;

use job::Transport;
use random::Random;
use regatta_testkit::{Hosts, Link};
use std::error::Error;
use std::time::Duration;
use verdict::Summary;

/// The fault that is injected into a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// A rank is killed.
    Kill,
    /// A rank is stopped (SIGSTOP).
    Stop,
    /// The cable of a host is unplugged.
    Cut,
    /// A rank calls another operation than the others.
    Mismatch,
}

/// One job and its fault. The seed determines everything.
#[derive(Debug, Clone)]
struct Trial {
    seed: u64,
    world: usize,
    transport: Transport,
    fault: Fault,
    /// The rank that the fault affects; for `Cut`, the host.
    victim: usize,
    /// Time from when all ranks are ready to the fault.
    after: Duration,
    /// The number of the mismatched operation.
    operation: u64,
}

impl Trial {
    fn new(seed: u64, hosts: bool) -> Self {
        let mut random = Random::new(seed);
        let mut world = 2 + random.below(4) as usize;
        let several = 2 + random.below(2) as usize;
        let transport = match random.below(4) {
            0 => Transport::Shm,
            2 | 3 if hosts => Transport::Hosts(several),
            _ => Transport::Tcp,
        };
        if let Transport::Hosts(hosts) = transport {
            world = world.max(hosts);
        }
        let (fault, targets) = match (random.below(4), transport) {
            (0, _) => (Fault::Kill, world),
            (1, _) => (Fault::Stop, world),
            (2, Transport::Hosts(hosts)) => (Fault::Cut, hosts),
            _ => (Fault::Mismatch, world),
        };
        let victim = random.below(targets as u64) as usize;
        let after = Duration::from_millis(random.below(400));
        Self { seed, world, transport, fault, victim, after, operation: 1 + random.below(100) }
    }

    /// The host of `rank`.
    fn host(&self, rank: usize) -> usize {
        match self.transport {
            Transport::Hosts(hosts) => rank % hosts,
            _ => 0,
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::var("CHAOS_ROLE").as_deref() {
        Ok("rank") => return rank::run(),
        Ok("store") => return rank::store(),
        _ => {}
    }
    let mut arguments = std::env::args().skip(1);
    let trials: u64 = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let seed: u64 = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let hosts = Hosts::or_skip(2, &Link::default()).is_some();
    let mut summary = Summary::default();
    for seed in seed..seed + trials {
        let trial = Trial::new(seed, hosts);
        let outcome = job::run(&trial)?;
        println!("{}", summary.add(&trial, &outcome));
    }
    println!("{summary}");
    if summary.all_passed() { Ok(()) } else { std::process::exit(1) }
}
