//! A rank's connections to the store, which stay as long as its process is in the job: one for requests, one that brings
//! news.

use super::at_exit::{self, Leaving, Turn};
use super::protocol::{Answer, Farewell, NOBODY, News, Request, Role};
use super::reach::Reach;
use super::server::SLICE;
use super::state::unix_us;
use super::{HELLO_TIME, SILENCE};
use crate::error::{Error, Result};
use crate::member::health::{Health, gone_on};
use crate::rendezvous::reasons::Reasons;
use crate::rendezvous::{keepalive, wire};
use crate::tls::Stream;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long one of several possible stores may take to answer.
const PROBE_TIME: Duration = Duration::from_millis(500);
/// How long an answer may take, beside what it waits on the server.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// A rank's connections to the store.
pub(crate) struct Connected {
    requests: Mutex<Stream>,
    /// Carries the server's news to us, and our end, in either form, to the server.
    watch: Arc<Stream>,
    /// One message at a time.
    saying: Mutex<()>,
    news: Arc<Mutex<Heard>>,
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

/// Where news goes.
#[derive(Default)]
struct Heard {
    /// Of each generation that there is news of, or that this rank is in or may come to.
    healths: BTreeMap<u64, Arc<Health>>,
    /// The end of the whole job.
    over: Option<(Option<usize>, String)>,
    /// No more news will come.
    silent: bool,
}

impl Heard {
    /// That of a generation.
    fn health(&mut self, generation: u64) -> &Arc<Health> {
        self.healths.entry(generation).or_insert_with(|| {
            let health = Arc::<Health>::default();
            if let Some((rank, reason)) = &self.over {
                health.end(*rank, reason);
            }
            if self.silent {
                health.silent();
            }
            health
        })
    }

    /// The job is over.
    fn end_all(&mut self, rank: Option<usize>, reason: &str) {
        self.over.get_or_insert_with(|| (rank, reason.into()));
        self.healths.values().for_each(|health| health.end(rank, reason));
    }
}

impl Connected {
    /// Connects to the store.
    pub(super) fn new(reach: &Reach<'_>) -> Result<Arc<Self>> {
        let Reach { rank, timer, .. } = *reach;
        let mut reasons = Reasons::default();
        // What may be an unknown client's address need not ever answer, so it gets less time, at first.
        let mut patience = if reach.certain { HELLO_TIME } else { PROBE_TIME };
        loop {
            for (address, security) in (reach.addresses)()? {
                let left = patience.min(timer.left().max(PROBE_TIME));
                let open = |role| reach.open(&address, &security, role, left);
                match open(Role::Requests).and_then(|requests| Ok((requests, open(Role::Watch)?))) {
                    Ok((requests, watch)) => return Self::start(requests, watch, reach.deadline),
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

    fn start(requests: Stream, watch: Stream, deadline: Duration) -> Result<Arc<Self>> {
        let local_ip = requests.local_addr().map_err(Error::system("connect to the store"))?.ip();
        let mut connected = Self {
            requests: Mutex::new(requests),
            watch: Arc::new(watch),
            saying: Mutex::default(),
            news: Arc::default(),
            local_ip,
            gone: AtomicBool::new(false),
            slice_ms: AtomicU32::new(0),
            clock_offset_us: 0,
            lost: AtomicBool::new(false),
            store_ip: None,
            beside: AtomicU32::new(NOBODY),
        };
        connected.keep_time(deadline);
        connected.store_ip = connected.watch.peer_addr().ok().map(|address| address.ip());
        let before = unix_us();
        let theirs = match connected.ask(&Request::Time, &Health::default())? {
            Answer::Number(number) => number,
            _ => return Err(no_answer()),
        };
        // The answer was written half-way, about.
        let middle = before / 2 + unix_us() / 2;
        connected.clock_offset_us = theirs.wrapping_sub(middle).cast_signed();
        let connected = Arc::new(connected);
        let leaving: Weak<Self> = Arc::downgrade(&connected);
        at_exit::register(Turn::Client, leaving);
        let (heard, weak) = (connected.news.clone(), Arc::downgrade(&connected));
        let news = connected.watch.clone();
        std::thread::Builder::new()
            .name("regatta-watch".into())
            .spawn(move || watch_news(&news, &heard, &weak))
            .map_err(Error::system("start a thread"))?;
        Ok(connected)
    }

    fn news(&self) -> MutexGuard<'_, Heard> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a generation, and will be.
    pub(super) fn health(&self, generation: u64) -> Arc<Health> {
        self.news().health(generation).clone()
    }

    /// The rank goes on to a generation: those before are over for it.
    pub(super) fn begin(&self, generation: u64) -> Arc<Health> {
        let mut news = self.news();
        let later = news.healths.split_off(&generation);
        let earlier = std::mem::replace(&mut news.healths, later);
        let health = news.health(generation).clone();
        drop(news);
        earlier.values().for_each(|health| health.end(None, &gone_on(generation)));
        health
    }

    /// Sets how long a wait in an operation may last: a store that is cut off must not hold a rank up for longer.
    pub(super) fn keep_time(&self, deadline: Duration) {
        let answer = ANSWER_TIME.min(deadline / 2).max(Duration::from_millis(200));
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).set_read_timeout(Some(answer));
        self.slice_ms.store(SLICE.min(answer / 2).as_millis() as u32, Ordering::Relaxed);
        keepalive(&*self.watch, SILENCE.min(deadline.max(Duration::from_secs(2))));
    }

    /// Longest time a request may wait on the server.
    pub(super) fn slice(&self) -> Duration {
        Duration::from_millis(self.slice_ms.load(Ordering::Relaxed).into())
    }

    /// Learns from which address each rank reaches the store: those who do so from its own are on its host.
    pub(super) fn learn_hosts(&self, addresses: &[(usize, Option<IpAddr>)]) {
        let beside = addresses.iter().find(|(_, address)| {
            address.is_some() && *address == self.store_ip && self.store_ip != Some(self.local_ip)
        });
        self.beside.store(beside.map_or(NOBODY, |(rank, _)| *rank as u32), Ordering::Relaxed);
    }

    /// What to add to this host's clock to get the store's, in microseconds.
    pub(super) fn clock_offset_us(&self) -> i64 {
        self.clock_offset_us
    }

    /// The address of this host from which the store is reached.
    pub(super) fn local_ip(&self) -> IpAddr {
        self.local_ip
    }

    /// The answer to a request in the generation with this health.
    pub(super) fn ask(&self, request: &Request<'_>, health: &Health) -> Result<Answer> {
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
                return Err(health.verdict(own));
            }
        };
        match Answer::decode(&answer) {
            Some(Answer::Refused(why)) => {
                Err(Error::Rendezvous(format!("the job's store refuses a request: {why}")))
            }
            Some(Answer::Ended) => Err(health.verdict(Error::Rendezvous("the job has ended".into()))),
            Some(answer) => Ok(answer),
            None => Err(no_answer()),
        }
    }

    /// Tells all ranks that this one gives up. Goes beside the requests, one of which may be waiting.
    pub(super) fn give_up(&self, generation: u64, reason: &str) {
        // Without a store there is nobody to tell.
        let _ = self.last_word(&Farewell::GivesUp { generation, reason: reason.into() });
    }

    fn last_word(&self, word: &Farewell) -> io::Result<()> {
        let _one_at_a_time = self.saying.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut &*self.watch, &word.encode())
    }

    /// Whether the store cannot be reached any longer; if so, a rank on its host, where that is another host.
    pub(super) fn lost(&self) -> Option<Option<usize>> {
        let beside = self.beside.load(Ordering::Relaxed);
        self.lost.load(Ordering::Relaxed).then_some((beside != NOBODY).then_some(beside as usize))
    }
}

impl Leaving for Connected {
    /// Says goodbye, once: from here on this rank is not missed.
    fn goodbye(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            let _ = self.last_word(&Farewell::Goodbye);
            self.watch.shutdown();
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.goodbye();
    }
}

pub(super) fn no_answer() -> Error {
    Error::Rendezvous("the job's store answers in a form that this version does not know".into())
}

/// Passes the server's news on, until the connection closes.
fn watch_news(stream: &Stream, heard: &Mutex<Heard>, connected: &Weak<Connected>) {
    let heard = || heard.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let message = wire::read(&mut &*stream);
        match message.as_deref().ok().and_then(News::decode) {
            Some(News::End { generation: None, rank, reason }) => heard().end_all(rank, &reason),
            Some(News::End { generation: Some(generation), rank, reason }) => {
                heard().health(generation).end(rank, &reason);
            }
            Some(News::Left { generation, rank }) => heard().health(generation).left(rank),
            Some(News::Joined { token, sequence }) => {
                heard().healths.values().for_each(|health| health.joined(token, sequence));
            }
            Some(News::Closing) => {
                let mut heard = heard();
                heard.silent = true;
                heard.healths.values().for_each(|health| health.silent());
                return;
            }
            None => {
                // Closed: by ourselves, or because the server's process or its host is gone.
                if connected.upgrade().is_some_and(|own| !own.gone.load(Ordering::Acquire)) {
                    heard().end_all(
                        None,
                        "the job's store is gone: the launcher, or the process or host of rank 0, died or was cut off",
                    );
                }
                return;
            }
        }
    }
}
