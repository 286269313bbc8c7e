//! Waiting for the other ranks of a job at its start.
//!
//! A rank makes itself known to the job's store as soon as it is started, and joins when it has prepared what it needs.
//! One that nobody has seen in time is missing. One that is known and still prepares is alive - the store would tell of
//! its death - and is waited for as long as it takes; those who wait say so.

use crate::algorithm::select::Table;
use crate::error::{Error, Result};
use crate::job::options::Options;
use crate::job::start::{Reached, join_timer};
use crate::member::timer::Timer;
use crate::rendezvous::store::{PRESENT, StoreClient, TROUBLE};
use crate::rendezvous::{StoreAt, World, wire};
use crate::transport::tcp::{self, Connections, Contact, Listening};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the store keeps what each rank says of itself when it has joined, until all have read it.
const NODES: &str = "node/";
/// Where it keeps what rank 0 says of the job.
const LEAD: &str = "node/lead";
/// Longest request to the store between looks at who is there.
const SLICE: Duration = Duration::from_secs(1);
/// How often it is said that a rank still prepares.
const REMIND: Duration = Duration::from_secs(60);

/// One rank's wait for all others.
struct Gathering<'a> {
    store: &'a StoreClient,
    world: &'a World,
    options: &'a Options,
    begun: Instant,
    /// When to say next that a rank still prepares.
    remind: Duration,
    /// How long ranks may take that nobody has seen.
    timer: Timer,
}

impl<'a> Gathering<'a> {
    fn new(store: &'a StoreClient, world: &'a World, options: &'a Options, timer: Timer) -> Self {
        Self { store, world, options, begun: Instant::now(), remind: options.warn, timer }
    }

    /// What rank 0 says of the job.
    fn lead(&mut self) -> Result<Vec<u8>> {
        self.wait(|store, until| Ok(store.try_get(LEAD, until)?.ok_or(vec![0])))
    }

    /// What each rank says of itself when it has joined.
    fn all(&mut self) -> Result<Vec<Vec<u8>>> {
        let size = self.world.size;
        self.wait(|store, until| store.try_gather(NODES, size, until))
    }

    /// Waits for what ranks say; `ask` waits for it for a while, and then tells which ranks are missing.
    fn wait<T>(
        &mut self,
        ask: impl Fn(&StoreClient, Instant) -> Result<std::result::Result<T, Vec<usize>>>,
    ) -> Result<T> {
        let store = self.store;
        loop {
            // Asked for before the answer: what they said last has come by then.
            let left = store.health().all_left();
            let slice = self.timer.left().min(SLICE).max(Duration::from_millis(10));
            let missing = match ask(store, Instant::now() + slice)? {
                Ok(said) => return Ok(said),
                Err(missing) => missing,
            };
            store.health().check()?;
            if let Some(rank) = missing.iter().find(|rank| left.contains(rank)) {
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
        let joined = self.ranks(NODES)?;
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

/// The hosts of all ranks, the tuning table and the name of the job.
pub(super) fn meet(world: &World, options: &Options, reached: &Reached) -> Result<Met> {
    let store = &*reached.store;
    store.health().check()?;
    store.keep_time(options.deadline);
    // What is set first tells of the job; the rank's own place comes last and says that all is there.
    if world.rank == 0 {
        let tuning = options.tuning.as_ref().map(Table::to_string).unwrap_or_default();
        let (alike, name) = (alike(world, options).join("\n"), crate::rendezvous::random_name());
        store.set(LEAD, &wire::pack(&[alike.as_bytes(), name.as_bytes(), tuning.as_bytes()]))?;
    }
    // Where it fails, a group that needs it says so.
    let listening = Listening::new(store.local_ip());
    let contact = listening.as_ref().map_or("-".into(), |listening| listening.contact().to_string());
    let about = format!("{} {contact} {}", store.local_ip(), world.host);
    store.set(&format!("{NODES}{}", world.rank), about.as_bytes())?;
    let mut gathering = Gathering::new(store, world, options, join_timer(options));
    // Ranks that differ in what must be alike may wait for each other in vain, so that is looked at first.
    let lead = gathering.lead()?;
    let lead = wire::unpack::<3>(&lead).map(|fields| fields.map(String::from_utf8_lossy));
    let [lead, name, tuning] =
        lead.ok_or_else(|| Error::Rendezvous("rank 0 is of another version of this program".into()))?;
    compare(world, options, &lead)?;
    let (mut hosts, mut ips, mut contacts) = (vec![], vec![], vec![]);
    for about in gathering.all()? {
        let about = String::from_utf8_lossy(&about);
        let mut fields = about.splitn(3, ' ');
        let [ip, contact, host] = [(); 3].map(|()| fields.next().unwrap_or_default());
        hosts.push(host.as_bytes().to_vec());
        contacts.push(Contact::parse(contact));
        ips.push((ips.len(), ip.parse().ok()));
    }
    store.learn_hosts(&ips);
    let tuning = if tuning.is_empty() { Table::default() } else { Table::parse(&tuning)? };
    if let (StoreAt::File(path), 0) = (&world.store, world.rank) {
        // Everyone is here; a later job must not find it.
        let _ = std::fs::remove_file(path);
    }
    let connections = Connections::new(tcp::Settings {
        rank: world.rank,
        contacts,
        listening,
        security: reached.security.clone(),
        health: store.health().clone(),
        streams: options.tcp_streams,
        join: options.join,
    });
    Ok(Met { hosts, tuning, name: name.into_owned(), connections })
}

/// What a rank knows once all have come.
pub(super) struct Met {
    /// The host of each rank.
    pub hosts: Vec<Vec<u8>>,
    pub tuning: Table,
    /// The name of the job.
    pub name: String,
    pub connections: Arc<Connections>,
}

/// Settings that ranks can connect with only where all have the same.
const ALIKE: [&str; 3] = ["WORLD_SIZE", "REGATTA_TRANSPORT", "REGATTA_TCP_STREAMS"];

/// What they are on this rank.
fn alike(world: &World, options: &Options) -> [String; 3] {
    let transport = options.transport.map_or("left out".into(), |transport| transport.to_string());
    [world.size.to_string(), transport, options.tcp_streams.to_string()]
}

/// Compares them with those of rank 0, so that ranks that differ do not wait for each other until the deadline.
fn compare(world: &World, options: &Options, lead: &str) -> Result<()> {
    for ((variable, own), lead) in ALIKE.into_iter().zip(alike(world, options)).zip(lead.lines()) {
        if own != lead {
            let rank = world.rank;
            let problem =
                format!("is {own} on rank {rank}, and {lead} on rank 0: it must be the same on all ranks");
            return Err(Error::Env { variable: variable.into(), problem });
        }
    }
    Ok(())
}
