//! A rank's connections to the store: one for requests, one that brings news.

use super::at_exit::{self, Leaving, Turn};
use super::protocol::{Answer, Farewell, NOBODY, News, Request, Role};
use super::reach::Reach;
use super::server::SLICE;
use super::state::unix_us;
use super::{HELLO_TIME, SILENCE};
use crate::error::{Error, Result};
use crate::member::directory::{Directory, Heard, Invitation, Note, Round};
use crate::member::health::Health;
use crate::member::timer::Timer;
use crate::rendezvous::reasons::Reasons;
use crate::rendezvous::{keepalive, wire};
use crate::tls::Stream;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long one of several possible stores may take to answer.
const PROBE_TIME: Duration = Duration::from_millis(500);
/// How long an answer may take, beside what it waits on the server.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// A rank's connections to the store.
pub(crate) struct StoreClient {
    requests: Mutex<Stream>,
    /// Carries the server's news to us, and our end, in either form, to the server.
    watch: Arc<Stream>,
    /// One message at a time.
    saying: Mutex<()>,
    health: Arc<Health>,
    local_ip: IpAddr,
    gone: AtomicBool,
    /// Longest time a get waits on the server, in milliseconds.
    slice_ms: AtomicU32,
    /// What to add to this host's clock to get the server's, in microseconds.
    clock_offset_us: i64,
    /// It has not answered once.
    lost: AtomicBool,
    /// The store's own address.
    store_ip: Option<IpAddr>,
    /// A rank on the store's host, where that is not this host.
    beside: AtomicU32,
}

impl StoreClient {
    /// Connects to the store.
    pub(crate) fn connect(reach: &Reach<'_>, health: Arc<Health>) -> Result<Arc<Self>> {
        let Reach { rank, timer, .. } = *reach;
        let mut reasons = Reasons::default();
        // What may be a stranger's address need not ever answer, so it gets less time, at first.
        let mut patience = if reach.certain { HELLO_TIME } else { PROBE_TIME };
        loop {
            for (address, security) in (reach.addresses)()? {
                let left = patience.min(timer.left().max(PROBE_TIME));
                let open = |role| reach.open(&address, &security, role, left);
                match open(Role::Requests).and_then(|requests| Ok((requests, open(Role::Watch)?))) {
                    Ok((requests, watch)) => return Self::start(requests, watch, health, reach.deadline),
                    Err(error) => reasons.add(&address, error)?,
                }
            }
            if timer.is_over() || reach.certain && reasons.is_hopeless() {
                return Err(reasons.into_error(rank, timer.used()));
            }
            patience = (2 * patience).min(HELLO_TIME);
            // The store may not have been started yet; there is no event to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(requests: Stream, watch: Stream, health: Arc<Health>, deadline: Duration) -> Result<Arc<Self>> {
        let local_ip = requests.local_addr().map_err(Error::system("connect to the store"))?.ip();
        let mut client = Self {
            requests: Mutex::new(requests),
            watch: Arc::new(watch),
            saying: Mutex::default(),
            health,
            local_ip,
            gone: AtomicBool::new(false),
            slice_ms: AtomicU32::new(0),
            clock_offset_us: 0,
            lost: AtomicBool::new(false),
            store_ip: None,
            beside: AtomicU32::new(NOBODY),
        };
        client.keep_time(deadline);
        client.store_ip = client.watch.peer_addr().ok().map(|address| address.ip());
        let before = unix_us();
        let theirs = client.ask(&Request::Time).and_then(number)?;
        // The answer was written half-way, about.
        let middle = before / 2 + unix_us() / 2;
        client.clock_offset_us = theirs.wrapping_sub(middle).cast_signed();
        let client = Arc::new(client);
        let leaving: Weak<Self> = Arc::downgrade(&client);
        at_exit::register(Turn::Client, leaving);
        let (health, weak) = (client.health.clone(), Arc::downgrade(&client));
        let news = client.watch.clone();
        std::thread::Builder::new()
            .name("regatta-watch".into())
            .spawn(move || watch_news(&news, &health, &weak))
            .map_err(Error::system("start a thread"))?;
        Ok(client)
    }

    /// Sets how long a wait in an operation may last: a store that is cut off must not hold a rank up for longer.
    pub(crate) fn keep_time(&self, deadline: Duration) {
        let answer = ANSWER_TIME.min(deadline / 2).max(Duration::from_millis(200));
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).set_read_timeout(Some(answer));
        self.slice_ms.store(SLICE.min(answer / 2).as_millis() as u32, Ordering::Relaxed);
        keepalive(&*self.watch, SILENCE.min(deadline.max(Duration::from_secs(2))));
    }

    /// Learns from which address each rank reaches the store: those who do so from its own are on its host.
    pub(crate) fn learn_hosts(&self, addresses: &[Option<IpAddr>]) {
        let beside = addresses.iter().position(|address| {
            address.is_some() && *address == self.store_ip && self.store_ip != Some(self.local_ip)
        });
        self.beside.store(beside.map_or(NOBODY, |rank| rank as u32), Ordering::Relaxed);
    }

    /// What to add to this host's clock to get the store's, in microseconds.
    pub(crate) fn clock_offset_us(&self) -> i64 {
        self.clock_offset_us
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The address of this host from which the store is reached.
    pub(crate) fn local_ip(&self) -> IpAddr {
        self.local_ip
    }

    fn ask(&self, request: &Request<'_>) -> Result<Answer> {
        let stream = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::Rendezvous("the job's store does not answer".into()));
        }
        let answer = wire::write(&mut &*stream, &request.encode()).and_then(|()| wire::read(&mut &*stream));
        if answer.is_err() {
            // An answer that comes late must not be taken for that to the next request, and waiting once is enough.
            self.lost.store(true, Ordering::Relaxed);
            stream.shutdown();
        }
        drop(stream);
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let own =
                    Error::Rendezvous(format!("the job's store does not answer ({error}): rank 0 has ended"));
                return Err(self.health.verdict(own));
            }
        };
        match Answer::decode(&answer) {
            Some(Answer::Refused(why)) => {
                Err(Error::Rendezvous(format!("the job's store refuses a request: {why}")))
            }
            Some(Answer::Ended) => Err(self.health.verdict(Error::Rendezvous("the job has ended".into()))),
            Some(answer) => Ok(answer),
            None => Err(no_answer()),
        }
    }

    /// Asks until there is an answer, or until `until`; `request` makes the request from the time that the server may
    /// wait.
    fn ask_until<'r>(&self, until: Instant, request: impl Fn(Duration) -> Request<'r>) -> Result<Answer> {
        loop {
            let slice = Duration::from_millis(self.slice_ms.load(Ordering::Relaxed).into());
            let left = until.saturating_duration_since(Instant::now()).min(slice);
            match self.ask(&request(left))? {
                Answer::NotYet | Answer::Missing(_) if Instant::now() < until => {}
                answer => return Ok(answer),
            }
        }
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask(&Request::Set { key, value }).and_then(done)
    }

    /// The value of `key`, waiting for it until `until`.
    pub(crate) fn try_get(&self, key: &str, until: Instant) -> Result<Option<Vec<u8>>> {
        self.ask_until(until, |wait| Request::Get { key, wait }).and_then(value)
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
        let mut all = vec![];
        while all.len() < count {
            let from = all.len();
            match self.ask_until(until, |wait| Request::Gather { prefix, from, count, wait })? {
                Answer::Values(values) if !values.is_empty() => all.extend(values),
                Answer::Missing(missing) => return Ok(Err(missing)),
                _ => return Err(no_answer()),
            }
        }
        Ok(Ok(all))
    }

    /// The value of `key`, which `rank` publishes, waiting for it as long as `timer` allows.
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

    /// Tells all ranks that this one gives up. Goes beside the requests, one of which may be waiting.
    pub(crate) fn abort(&self, reason: &str) {
        // Without a store there is nobody to tell.
        let _ = self.last_word(&Farewell::GivesUp { reason: reason.into() });
    }

    fn last_word(&self, word: &Farewell) -> io::Result<()> {
        let _one_at_a_time = self.saying.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut &*self.watch, &word.encode())
    }
}

impl Leaving for StoreClient {
    /// Says goodbye, once: from here on this rank is not missed.
    fn goodbye(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            let _ = self.last_word(&Farewell::Goodbye);
            self.watch.shutdown();
        }
    }
}

impl Drop for StoreClient {
    fn drop(&mut self) {
        self.goodbye();
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

    fn culprit(&self, group: u64, rank: usize, peer: usize) -> Result<usize> {
        Ok(self.ask(&Request::Culprit { group, rank, peer }).and_then(number)? as usize)
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
        let beside = self.beside.load(Ordering::Relaxed);
        self.lost.load(Ordering::Relaxed).then_some((beside != NOBODY).then_some(beside as usize))
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

fn no_answer() -> Error {
    Error::Rendezvous("the job's store answers in a form that this version does not know".into())
}

/// Passes the server's news on, until the connection closes.
fn watch_news(stream: &Stream, health: &Health, client: &Weak<StoreClient>) {
    loop {
        let message = wire::read(&mut &*stream);
        match message.as_deref().ok().and_then(News::decode) {
            Some(News::End { rank, reason }) => health.end(rank, &reason),
            Some(News::Left { rank }) => health.left(rank),
            Some(News::Joined { token, sequence }) => health.joined(token, sequence),
            Some(News::Closing) => return health.silent(),
            None => {
                // Closed: by ourselves, or because the server's process or its host is gone.
                if client.upgrade().is_some_and(|client| !client.gone.load(Ordering::Acquire)) {
                    health.end(
                        None,
                        "the job's store is gone: the launcher, or the process or host of rank 0, died or was cut off",
                    );
                }
                return;
            }
        }
    }
}
