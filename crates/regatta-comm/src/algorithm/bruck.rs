//! All-to-all of short messages (Bruck, Ho, Kipnis, Upfal & Weathersby 1997, "Efficient algorithms for all-to-all
//! communications in multiport message-passing systems").
//!
//! Blocks are first rotated so that block i is for the rank i places to the right. In step k = 1, 2, 4, ... a rank
//! passes on, in one message to the rank k places to its right, all blocks whose number has the bit k. After log2 n
//! steps each block has come as far as its number says. Cost per rank for B bytes: log2 n steps, log2 n / 2 * B bytes
//! sent: fewer messages and more bytes than [`pairwise`](super::pairwise).

use super::run::{Numbers, run};
use super::schedule::What;
use crate::algorithm::session::{Place, Session};
use crate::error::Result;
use crate::numbers::element::Element;

/// `block` numbers from everyone's `input` to everyone's `output`.
pub(crate) fn all_to_all<T: Element>(
    session: &mut Session<'_>,
    block: usize,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let Place { rank, size, .. } = session.place::<T>();
    let mut blocks = Vec::with_capacity(input.len());
    for i in 0..size {
        blocks.extend_from_slice(&input[(rank + i) % size * block..][..block]);
    }
    let mut step = 1;
    while step < size {
        let moving: Vec<usize> = (0..size).filter(|i| i & step != 0).collect();
        let packed: Vec<T> =
            moving.iter().flat_map(|i| blocks[i * block..][..block].iter().copied()).collect();
        let mut came = vec![T::zeroed(); packed.len()];
        let mut schedule = session.place::<T>().schedule();
        schedule.add((rank + step) % size, What::SendInput, 0..packed.len(), None);
        schedule.add((rank + size - step) % size, What::Copy, 0..packed.len(), None);
        let numbers = Numbers { input: &packed, working: &mut came };
        run(session, &schedule, numbers)?;
        for (at, i) in moving.iter().enumerate() {
            blocks[i * block..][..block].copy_from_slice(&came[at * block..][..block]);
        }
        step *= 2;
    }
    // What is now block i has come from the rank i places to the left.
    for i in 0..size {
        output[(rank + size - i) % size * block..][..block].copy_from_slice(&blocks[i * block..][..block]);
    }
    Ok(())
}
