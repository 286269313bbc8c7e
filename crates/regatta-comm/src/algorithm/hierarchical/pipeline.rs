//! Pieces on their way through a host, to others, and back: each at another place at the same time.

use crate::error::{Error, Result};
use crate::numbers::element::Element;
use std::sync::mpsc::channel;

/// Takes each of `pieces` through `before`, `carry` and `after`, in their order. More than one: a thread carries a piece
/// while this one is at the next one and the one before, so the time is that of the slower of the two. What `after` gives
/// back, a later `before` gets.
pub(super) fn pipeline<S, P: Send + Default>(
    pieces: usize,
    state: &mut S,
    before: impl Fn(&mut S, usize, P) -> Result<P>,
    mut carry: impl FnMut(usize, P) -> Result<P> + Send,
    after: impl Fn(&mut S, usize, P) -> Result<P>,
) -> Result<()> {
    if pieces == 1 {
        let piece = before(state, 0, P::default())?;
        let piece = carry(0, piece)?;
        return after(state, 0, piece).map(drop);
    }
    std::thread::scope(|scope| {
        let (reduced, to_carry) = channel::<P>();
        let (carried, to_gather) = channel::<P>();
        let courier = move || -> Result<()> {
            for (index, piece) in to_carry.into_iter().enumerate() {
                // Where this rank has failed meanwhile, nobody gathers.
                let _ = carried.send(carry(index, piece)?);
            }
            Ok(())
        };
        let spawned = std::thread::Builder::new().spawn_scoped(scope, courier);
        let thread = spawned.map_err(Error::system("start a thread that exchanges data with other hosts"))?;
        let (mut outcome, mut memory) = (Ok(()), P::default());
        // The order of what ranks do in shared memory is the same on all of a host.
        for index in 0..=pieces {
            if index < pieces {
                match before(state, index, std::mem::take(&mut memory)) {
                    Ok(piece) => drop(reduced.send(piece)),
                    Err(error) => outcome = Err(error),
                }
            }
            if outcome.is_err() {
                break;
            }
            if index == 0 {
                continue;
            }
            // Where the thread has failed, it says why below.
            let Ok(piece) = to_gather.recv() else { break };
            match after(state, index - 1, piece) {
                Ok(piece) => memory = piece,
                Err(error) => outcome = Err(error),
            }
        }
        drop(reduced);
        let across = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.and(across)
    })
}

/// `memory` for `len` numbers; its contents are whatever they were.
pub(super) fn sized<T: Element>(mut memory: Vec<T>, len: usize) -> Vec<T> {
    memory.resize(len, T::zeroed());
    memory
}
