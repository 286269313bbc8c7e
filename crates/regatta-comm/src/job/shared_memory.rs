//! The memory that the ranks of a host share: made by one of them, and agreed on by all ranks of the group.

use crate::error::{Error, Result};
use crate::member::context::Context;
use crate::member::timer::Timer;
use crate::rendezvous::store::StoreClient;
use crate::transport::Arena;
use crate::transport::shared::Shared;
#[cfg(target_os = "linux")]
use std::path::Path;
use std::sync::Arc;

/// The memory that the ranks of this host share, or why one of the ranks has none: all ranks of the group agree on that.
#[cfg(target_os = "linux")]
pub(super) fn shared_memory(
    store: &StoreClient,
    id: u64,
    context: &Context,
    lanes: usize,
    timer: &Timer,
) -> Result<Result<(Shared, Arc<Arena>)>> {
    use crate::transport::shm::{Name, Segment};
    let here = context.host_of(context.rank);
    let (first, size) = (here[0], here.len());
    let prefix = format!("shm/{id:x}/");
    let key = format!("{prefix}at/{first}");
    // Whatever fails from here on, nothing is left behind.
    let mut name = None;
    let segment = if context.rank == first {
        let nonce = crate::rendezvous::random();
        let created = Segment::create(size, lanes, nonce);
        let published = match &created {
            Ok((_, at)) => format!("{nonce} {}", at.display()),
            Err(error) => format!("! {error}"),
        };
        if let Ok((_, at)) = &created {
            name = Some(Name(at.clone()));
        }
        store.set(&key, published.as_bytes())?;
        created.map(|(segment, _)| segment)
    } else {
        let published = String::from_utf8_lossy(&store.get(&key, context.names[first], timer)?).into_owned();
        match published.split_once(' ').map(|(nonce, at)| (nonce.parse::<u64>(), at)) {
            Some((Ok(nonce), at)) => Segment::open(Path::new(at), size, lanes, nonce),
            _ => Err(Error::Rendezvous(format!("rank {}: {published}", context.names[first]))),
        }
    };
    let outcome = match &segment {
        Ok(_) => "ok".to_string(),
        Err(error) => error.to_string(),
    };
    store.set(&format!("{prefix}{}", context.rank), outcome.as_bytes())?;
    for (answer, peer) in store.gather(&prefix, &context.names, timer)?.into_iter().zip(&*context.names) {
        if answer != b"ok" {
            let reason = String::from_utf8_lossy(&answer).into_owned();
            return Ok(Err(Error::Rendezvous(format!("rank {peer} has no shared memory: {reason}"))));
        }
    }
    // All have mapped it.
    drop(name);
    let segment = match segment {
        Ok(segment) => Arc::new(segment),
        Err(error) => return Ok(Err(error)),
    };
    let local = context.among(here);
    let arena = Arc::new(Arena::new(segment.clone(), local.rank));
    Ok(Ok((Shared::with_lanes(segment, local, lanes), arena)))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn shared_memory(
    _: &StoreClient,
    _: u64,
    _: &Context,
    _: usize,
    _: &Timer,
) -> Result<Result<(Shared, Arc<Arena>)>> {
    Ok(Err(Error::Usage("the shm transport is for Linux; use tcp".into())))
}
