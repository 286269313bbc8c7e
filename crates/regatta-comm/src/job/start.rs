//! The start of a job on one rank: runs the job's store where that is this rank's part, and finds it.

use crate::error::{Error, Result};
use crate::job::options::Options;
use crate::member::timer::Timer;
use crate::rendezvous::store::{Reach, StoreClient};
use crate::rendezvous::{Secret, Security, StoreAt, StoreServer, Tls, World};
use std::cell::RefCell;
use std::io::{self, Write};
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What a rank has of its job before the others have come.
pub(crate) struct Reached {
    pub(super) store: Arc<StoreClient>,
    pub(super) server: Option<StoreServer>,
    pub(super) security: Security,
}

impl Reached {
    /// Runs the job's store where that is this rank's part, and makes this rank known there.
    pub(crate) fn new(world: &World, options: &Options) -> Result<Self> {
        Self::in_generation(world, options, 0)
    }

    /// Makes this rank known in the store of a job, of which it comes to `generation`. The store of one that has begun
    /// runs elsewhere.
    pub(crate) fn in_generation(world: &World, options: &Options, generation: u64) -> Result<Self> {
        options.check()?;
        if generation == 0 {
            world.check()?;
        }
        // The attempts to reach the store may pause for as long as a connection takes.
        let timer = join_timer(options);
        let mut security = Security { secret: options.secret.clone(), tls: options.tls };
        if let (StoreAt::File(_), 0, None, true) =
            (&world.store, world.rank, &security.secret, security.tls != Tls::Off)
        {
            // What only this user's processes can read may carry a secret.
            security.secret = Some(Secret::random()?);
        }
        let serves = world.rank == 0 && generation == 0;
        let server = if serves { serve(world, &security, &timer, options)? } else { None };
        let certain = !matches!(world.store, StoreAt::File(_) | StoreAt::Rank0 { beside: true, .. });
        let found = RefCell::new(security.clone());
        let addresses = || {
            let found_at = addresses(&world.store, server.as_ref(), &security);
            if let Some((_, security)) = found_at.last() {
                found.replace(security.clone());
            }
            Ok(found_at)
        };
        let reach = Reach {
            addresses: &addresses,
            job: world.job.as_bytes(),
            rank: world.rank,
            generation,
            timer: &timer,
            certain,
            deadline: options.deadline,
        };
        let store = StoreClient::connect(&reach)?;
        let security = found.into_inner();
        Ok(Self { store, server, security })
    }

    /// Ends the job for all ranks. Where this rank runs the store, waits up to `patience` for the others to come and
    /// hear of it.
    pub(crate) fn give_up(self, world: &World, reason: &str, patience: Duration) {
        tell(world.rank, &self.store, self.server.as_ref(), &gave_up(world.rank, reason));
        let Some(server) = &self.server else { return };
        let timer = Timer::new(patience);
        while server.heard() < world.size && !timer.is_over() {
            // The others are just being started; there is no event to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sends the end of the store's generation to all ranks.
pub(super) fn tell(rank: usize, store: &StoreClient, server: Option<&StoreServer>, reason: &str) {
    match server {
        // A message to the server of this process might come after the goodbye that its end says.
        Some(server) => server.end(store.generation(), rank, reason),
        None => store.abort(reason),
    }
}

pub(super) fn gave_up(rank: usize, reason: &str) -> String {
    format!("rank {rank} gave up: {reason}")
}

/// How long ranks may take to find each other, where one request may take some seconds.
pub(super) fn join_timer(options: &Options) -> Timer {
    Timer::with_pauses(options.join, Duration::from_secs(12))
}

/// Rank 0's part: runs the store, where nobody else does.
fn serve(
    world: &World,
    security: &Security,
    timer: &Timer,
    options: &Options,
) -> Result<Option<StoreServer>> {
    let start = |address: &str| StoreServer::start_for(address, world.size, security, world.job.as_bytes());
    match &world.store {
        StoreAt::Elsewhere(_) => Ok(None),
        StoreAt::Rank0 { host, port, beside: false } => {
            await_name(host, *port, timer, options)?;
            let server = start(&format!("{host}:{port}"))?;
            reachable(host, &server, world)?;
            Ok(Some(server))
        }
        StoreAt::Rank0 { host, port, .. } => {
            await_name(host, *port, timer, options)?;
            let mut last = None;
            for (address, _) in addresses(&world.store, None, security) {
                match start(&address) {
                    Ok(server) => return Ok(Some(server)),
                    Err(error) => last = Some(error),
                }
            }
            last.map_or(Ok(None), Err)
        }
        StoreAt::File(path) => {
            let server = start("127.0.0.1:0")?;
            let secret = security.secret.as_ref().map(Secret::to_text).unwrap_or_default();
            publish(path, &format!("{} {secret}", server.addr()))
                .map_err(Error::system(format!("write {}", path.display())))?;
            Ok(Some(server))
        }
    }
}

/// Waits until the host's name is known: that of a Kubernetes service appears some seconds after its pods have begun.
fn await_name(host: &str, port: u16, timer: &Timer, options: &Options) -> Result<()> {
    let mut said = false;
    loop {
        let Err(error) = (host, port).to_socket_addrs() else { return Ok(()) };
        let waited = timer.used();
        if waited >= options.join {
            return Err(Error::Env {
                variable: "MASTER_ADDR".into(),
                problem: format!(
                    "rank 0's host does not know the name {host:?} after {:.1} s ({error}); give an address, or more time \
                     by REGATTA_JOIN_S",
                    waited.as_secs_f64()
                ),
            });
        }
        if waited >= options.warn && !said {
            said = true;
            crate::say::say(format_args!(
                "warning: rank 0 waits for the name {host:?} (MASTER_ADDR) to appear: {error}"
            ));
        }
        // The system's resolver tells of no event to wait for.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Debian and others resolve a host's own name to 127.0.1.1, where no other host reaches it.
fn reachable(host: &str, server: &StoreServer, world: &World) -> Result<()> {
    let named = host != "localhost" && host.parse::<std::net::IpAddr>().is_err();
    let ip = server.addr().ip();
    if world.local_size == world.size || !named || !ip.is_loopback() {
        return Ok(());
    }
    Err(Error::Env {
        variable: "MASTER_ADDR".into(),
        problem: format!(
            "{host:?} is {ip} on rank 0's host, which other hosts cannot reach; give its address"
        ),
    })
}

/// Writes `text` to `path` so that readers see all of it or nothing, and only this user's processes can.
fn publish(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension(std::process::id().to_string());
    // A name left by a process that died; with `create_new`, nobody can have put a link there.
    let _ = std::fs::remove_file(&temporary);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&temporary)?.write_all(text.as_bytes())?;
    std::fs::rename(&temporary, path)
}

/// What this user's processes have published at `path`.
fn published(path: &Path) -> Option<String> {
    #[cfg(unix)]
    if std::os::unix::fs::MetadataExt::uid(&std::fs::symlink_metadata(path).ok()?)
        != rustix::process::getuid().as_raw()
    {
        return None;
    }
    std::fs::read_to_string(path).ok()
}

/// Where the store may be, and how it is reached.
fn addresses(store: &StoreAt, own: Option<&StoreServer>, security: &Security) -> Vec<(String, Security)> {
    let with = |address: String| (address, security.clone());
    if let Some(server) = own {
        return vec![with(server.addr().to_string())];
    }
    match store {
        StoreAt::Elsewhere(address) => vec![with(address.clone())],
        StoreAt::Rank0 { host, port, beside: false } => vec![with(format!("{host}:{port}"))],
        StoreAt::Rank0 { host, port, beside: true } => {
            let last = port.saturating_add(crate::rendezvous::BESIDE);
            (port.saturating_add(1)..=last).map(|port| with(format!("{host}:{port}"))).collect()
        }
        StoreAt::File(path) => published(path)
            .and_then(|text| {
                let (address, secret) = text.split_once(' ')?;
                let secret = (!secret.is_empty()).then(|| Secret::from_text(secret));
                Some((address.to_string(), Security { secret, ..security.clone() }))
            })
            .into_iter()
            .collect(),
    }
}
