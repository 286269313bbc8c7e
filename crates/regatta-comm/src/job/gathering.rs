//! Waiting for the other ranks of a job at its start.
//!
//! A rank makes itself known to the job's store as soon as it is started, and joins when it has prepared what it needs.
//! One that nobody has seen in time is missing. One that is known and still prepares is alive - the store would tell of
//! its death - and is waited for as long as it takes; those who wait say so.

use crate::error::{Error, Result};
use crate::job::node;
use crate::job::options::Options;
use crate::member::notes::Directory;
use crate::member::timer::Timer;
use crate::rendezvous::World;
use crate::rendezvous::store::{PRESENT, StoreClient, TROUBLE};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest request to the store between looks at who is there.
const SLICE: Duration = Duration::from_secs(1);
/// How often it is said that a rank still prepares.
const REMIND: Duration = Duration::from_secs(60);

/// One rank's wait for all others.
pub(crate) struct Gathering<'a> {
    store: &'a StoreClient,
    world: &'a World,
    options: &'a Options,
    begun: Instant,
    /// When to say next that a rank still prepares.
    remind: Duration,
    /// How long ranks may take that nobody has seen.
    pub(crate) timer: Timer,
}

impl<'a> Gathering<'a> {
    pub(crate) fn new(store: &'a StoreClient, world: &'a World, options: &'a Options, timer: Timer) -> Self {
        Self { store, world, options, begun: Instant::now(), remind: options.warn, timer }
    }

    /// What `rank` says of itself when it has joined.
    pub(crate) fn wait_for(&mut self, rank: usize) -> Result<Vec<u8>> {
        let store = self.store;
        loop {
            // Asked for before the answer: what it said last has come by then.
            let left = store.health().has_left(rank);
            let slice = self.timer.left().min(SLICE).max(Duration::from_millis(10));
            if let Some(about) = store.try_get(&node(rank), Instant::now() + slice)? {
                return Ok(about);
            }
            store.health().check()?;
            if left {
                return Err(Error::Rendezvous(format!(
                    "rank {rank} has left the job before all its ranks had joined"
                )));
            }
            let waited = self.begun.elapsed();
            if self.timer.is_over() || waited >= self.remind {
                self.look_around(waited)?;
            }
        }
    }

    /// Finds out who is missing and who prepares.
    fn look_around(&mut self, waited: Duration) -> Result<()> {
        let joined = self.ranks("node/")?;
        let present = self.ranks(PRESENT)?;
        let missing = |rank: &usize| !joined.contains_key(rank);
        let absent: Vec<String> = (0..self.world.size)
            .filter(|rank| missing(rank) && !present.contains_key(rank))
            .map(|rank| rank.to_string())
            .collect();
        if !absent.is_empty() {
            // Whoever is not there yet may come until the time is over.
            return if self.timer.is_over() { Err(self.incomplete(&absent)) } else { Ok(()) };
        }
        // One rank speaks for all that wait.
        let speaks = joined.keys().next() == Some(&self.world.rank);
        if waited >= self.remind {
            self.remind = waited + REMIND;
            let preparing: Vec<String> = (present.iter().filter(|(rank, _)| missing(rank)))
                .map(|(rank, who)| format!("{rank} ({who})"))
                .collect();
            if speaks && !preparing.is_empty() {
                crate::say::say(format_args!(
                    "rank {} has waited {:.0} s for rank {}: alive, but still preparing, or stopped",
                    self.world.rank,
                    waited.as_secs_f64(),
                    preparing.join(", ")
                ));
            }
        }
        Ok(())
    }

    /// The ranks that have an entry under `prefix`, with what it says.
    fn ranks(&self, prefix: &str) -> Result<BTreeMap<usize, String>> {
        let entries = self.store.list(prefix)?;
        let entry = |(key, value): (String, Vec<u8>)| {
            Some((key.strip_prefix(prefix)?.parse().ok()?, String::from_utf8_lossy(&value).into_owned()))
        };
        Ok(entries.into_iter().filter_map(entry).collect())
    }

    fn incomplete(&self, absent: &[String]) -> Error {
        let trouble = match self.store.try_get(TROUBLE, Instant::now()) {
            Ok(Some(text)) => format!("; {}", String::from_utf8_lossy(&text)),
            _ => String::new(),
        };
        Error::Rendezvous(format!(
            "rank {} of {} did not join within {:.1} s: are they all started? (the time can be set by \
             REGATTA_JOIN_S){trouble}",
            absent.join(", "),
            self.world.size,
            self.timer.used().min(self.options.join).as_secs_f64()
        ))
    }
}
