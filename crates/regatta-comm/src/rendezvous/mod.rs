//! How the ranks of a job find each other.

mod env;
pub(crate) mod store;
pub(crate) mod wire;

pub(crate) use env::BESIDE;
pub use env::{StoreAt, World};
pub use store::StoreServer;

use std::hash::{BuildHasher, Hasher, RandomState};

/// A number that nobody guesses or repeats, from the randomness that std seeds its hash maps with.
pub(crate) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// This host's name.
pub fn hostname() -> String {
    let name =
        std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    name.map_or("localhost".into(), |name| name.trim().to_string())
}
