//! How the ranks of a job find each other.

mod env;
mod failed_handshakes;
mod launchers;
mod reasons;
mod secret;
pub(crate) mod store;
mod vars;
pub(crate) mod wire;
mod world;

pub use secret::{Secret, Security, Tls};
pub use store::{StoreServer, StoreTraffic};
pub(crate) use world::BESIDE;
pub use world::{StoreAt, World};

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// A number that nobody guesses or repeats, from the randomness that std seeds its hash maps with.
pub(crate) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// A name for a job, with the time first, so that names sort.
pub(crate) fn random_name() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    format!("{}-{:08x}", since.unwrap_or_default().as_secs(), random() as u32)
}

/// Makes the kernel ask a silent peer whether it is still there, and end the connection after about `silence`: a host
/// that lost its power or its cable sends no farewell. Best effort: a connection without it ends by deadlines.
#[cfg(unix)]
pub(crate) fn keepalive(socket: &impl std::os::fd::AsFd, silence: Duration) {
    use rustix::net::sockopt;
    let probes = 4;
    let interval = (silence / (probes + 1)).max(Duration::from_secs(1));
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, interval);
    let _ = sockopt::set_tcp_keepintvl(socket, interval);
    let _ = sockopt::set_tcp_keepcnt(socket, probes);
    // The same for what was sent and is not acknowledged.
    #[cfg(target_os = "linux")]
    let _ = sockopt::set_tcp_user_timeout(socket, silence.as_millis() as u32);
}

/// As above, where the system does it its own way.
#[cfg(not(unix))]
pub(crate) fn keepalive<S>(_: &S, _: Duration) {}
