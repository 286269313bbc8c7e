//! A rank's view of the store in one generation of the job.

use super::connected::{Connected, no_answer};
use super::protocol::{Answer, Request, scope};
use super::reach::Reach;
use super::server::SLICE;
use crate::error::{Error, Result};
use crate::member::directory::{Directory, Heard, Invitation, Note, Round};
use crate::member::health::Health;
use crate::member::timer::Timer;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The store, as a rank sees it in one generation.
pub(crate) struct StoreClient {
    connected: Arc<Connected>,
    generation: u64,
    health: Arc<Health>,
}

impl StoreClient {
    /// Connects to the store.
    pub(crate) fn connect(reach: &Reach<'_>) -> Result<Arc<Self>> {
        let connected = Connected::new(reach)?;
        let (generation, health) = (reach.generation, connected.health(reach.generation));
        Ok(Arc::new(Self { connected, generation, health }))
    }

    /// The rank goes on to a later generation, which has these members. The earlier ones are over for it.
    pub(crate) fn begin(&self, generation: u64, members: &[usize]) -> Result<Arc<Self>> {
        let (connected, health) = (self.connected.clone(), self.connected.health(generation));
        let request = Request::Begin { generation, members: members.to_vec() };
        connected.ask(&request, &health).and_then(done)?;
        connected.begin(generation);
        Ok(Arc::new(Self { connected, generation, health }))
    }

    /// The generation that it is for.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Sets how long a wait in an operation may last: a store that is cut off must not hold a rank up for longer.
    pub(crate) fn keep_time(&self, deadline: Duration) {
        self.connected.keep_time(deadline);
    }

    /// Learns from which address each rank reaches the store: those who do so from its own are on its host.
    pub(crate) fn learn_hosts(&self, addresses: &[(usize, Option<IpAddr>)]) {
        self.connected.learn_hosts(addresses);
    }

    /// What to add to this host's clock to get the store's, in microseconds.
    pub(crate) fn clock_offset_us(&self) -> i64 {
        self.connected.clock_offset_us()
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The address of this host from which the store is reached.
    pub(crate) fn local_ip(&self) -> IpAddr {
        self.connected.local_ip()
    }

    fn ask(&self, request: &Request<'_>) -> Result<Answer> {
        self.connected.ask(request, &self.health)
    }

    /// The entry's whole key.
    fn key(&self, key: &str) -> String {
        scope(self.generation) + key
    }

    /// Asks until there is an answer, or until `until`; `request` makes the request from the time that the server may
    /// wait.
    fn ask_until<'r>(&self, until: Instant, request: impl Fn(Duration) -> Request<'r>) -> Result<Answer> {
        loop {
            let left = until.saturating_duration_since(Instant::now()).min(self.connected.slice());
            match self.ask(&request(left))? {
                Answer::NotYet | Answer::Missing(_) if Instant::now() < until => {}
                answer => return Ok(answer),
            }
        }
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask(&Request::Set { key: &self.key(key), value }).and_then(done)
    }

    /// The value of `key`, waiting for it until `until`.
    pub(crate) fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>> {
        let key = self.key(key);
        self.ask_until(until, |wait| Request::Get { key: &key, wait }).and_then(value)
    }

    /// All entries whose key begins with `prefix`.
    pub(crate) fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>> {
        match self.ask(&Request::List { prefix })? {
            Answer::Entries(entries) => Ok(entries),
            _ => Err(no_answer()),
        }
    }

    /// The values of `{prefix}0` to `{prefix}{count - 1}`, or the numbers of those that are not there at `until`. When
    /// `count` ranks have them, the store drops all entries under `prefix`.
    pub(crate) fn try_gather(
        &self,
        prefix: &str,
        count: usize,
        until: Instant,
    ) -> Result<std::result::Result<Vec<Vec<u8>>, Vec<usize>>> {
        let prefix = self.key(prefix);
        let mut all = vec![];
        while all.len() < count {
            let from = all.len();
            match self.ask_until(until, |wait| Request::Gather { prefix: &prefix, from, count, wait })? {
                Answer::Values(values) if !values.is_empty() => all.extend(values),
                Answer::Missing(missing) => return Ok(Err(missing)),
                _ => return Err(no_answer()),
            }
        }
        Ok(Ok(all))
    }

    /// The value of `key`, which `rank` publishes, waiting for it as long as `timer` allows.
    #[cfg(any(target_os = "linux", feature = "mpi"))]
    pub(crate) fn get(&self, key: &str, rank: usize, timer: &Timer) -> Result<Vec<u8>> {
        self.await_ranks(&[rank], timer, |until| Ok(self.try_get(key, until)?.ok_or(vec![0])))
    }

    /// The entries `{prefix}0`, `{prefix}1` and so on, which the ranks `names` of the world publish, in one round trip;
    /// waits for them as long as `timer` allows. All of these ranks call it once: when they have, the store drops all
    /// entries under `prefix`.
    pub(crate) fn gather(&self, prefix: &str, names: &[usize], timer: &Timer) -> Result<Vec<Vec<u8>>> {
        self.await_ranks(names, timer, |until| self.try_gather(prefix, names.len(), until))
    }

    /// Asks for what the ranks `names` publish until it is there; `ask` says which of them are missing.
    fn await_ranks<T>(
        &self,
        names: &[usize],
        timer: &Timer,
        ask: impl Fn(Instant) -> Result<std::result::Result<T, Vec<usize>>>,
    ) -> Result<T> {
        loop {
            let left = timer.left();
            // Asked for before the answer: what they published last has come by then.
            let gone = self.health.all_left();
            let missing = match ask(Instant::now() + left.min(SLICE))? {
                Ok(found) => return Ok(found),
                Err(missing) => missing,
            };
            self.health.check()?;
            let missing = || missing.iter().filter_map(|&number| names.get(number));
            let (rank, problem) = match (missing().find(|rank| gone.contains(rank)), missing().next()) {
                (Some(rank), _) => (rank, "has left the job before it came".into()),
                (None, Some(rank)) if left.is_zero() => (
                    rank,
                    format!(
                        "did not come within {:.1} s: it is late, stopped, or makes other calls (the time can be set by \
                         REGATTA_JOIN_S)",
                        timer.used().as_secs_f64()
                    ),
                ),
                _ => continue,
            };
            return Err(Error::Rendezvous(format!("a group is being made, and rank {rank} {problem}")));
        }
    }

    /// Tells all ranks of the generation that this one gives up.
    pub(crate) fn abort(&self, reason: &str) {
        self.connected.give_up(self.generation, reason);
    }
}

impl Directory for StoreClient {
    fn say(&self, group: u64, note: &Note, seen: u64) -> Result<Heard> {
        match self.ask(&Request::Say { group, note: *note, seen })? {
            Answer::Heard(heard) => Ok(heard),
            _ => Err(no_answer()),
        }
    }

    fn unsay(&self, group: u64, rank: usize) -> Result<()> {
        self.ask(&Request::Unsay { group, rank }).and_then(done)
    }

    fn chain_end(&self, group: u64, rank: usize, peer: usize) -> Result<usize> {
        Ok(self.ask(&Request::ChainEnd { group, rank, peer }).and_then(number)? as usize)
    }

    fn join(&self, round: Round, sequence: u32) -> Result<usize> {
        Ok(self.ask(&Request::Join { round, sequence }).and_then(number)? as usize)
    }

    fn joined(&self, token: u64) -> Result<Vec<usize>> {
        match self.ask(&Request::Joined { token })? {
            Answer::Ranks(ranks) => Ok(ranks),
            _ => Err(no_answer()),
        }
    }

    fn invite(&self, round: Round, sequence: u32, invitation: Invitation) -> Result<()> {
        self.ask(&Request::Invite { round, sequence, invitation }).and_then(done)
    }

    fn invited(&self, round: Round, sequence: u32, until: Instant) -> Result<Option<Invitation>> {
        let answer = self.ask_until(until, |wait| Request::Invited { round, sequence, wait })?;
        Ok(value(answer)?.and_then(|value| Invitation::from_bytes(&value)))
    }

    fn lost(&self) -> Option<Option<usize>> {
        self.connected.lost()
    }
}

fn done(answer: Answer) -> Result<()> {
    match answer {
        Answer::Done => Ok(()),
        _ => Err(no_answer()),
    }
}

fn number(answer: Answer) -> Result<u64> {
    match answer {
        Answer::Number(number) => Ok(number),
        _ => Err(no_answer()),
    }
}

fn value(answer: Answer) -> Result<Option<Vec<u8>>> {
    match answer {
        Answer::Value(value) => Ok(Some(value)),
        Answer::NotYet => Ok(None),
        _ => Err(no_answer()),
    }
}
