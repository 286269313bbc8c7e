//! What one operation over streams works with.

use super::schedule::Schedule;
use crate::error::Result;
use crate::member::call::Call;
use crate::member::context::Context;
use crate::numbers::element::Element;
use crate::transport::Transport;

/// Memory for what is received to be reduced, kept from operation to operation.
pub(crate) type Pool = Vec<Vec<u64>>;

/// Where a rank stands in an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub rank: usize,
    pub size: usize,
    /// Elements that go on together.
    pub chunk: usize,
}

impl Place {
    pub(crate) fn schedule(self) -> Schedule {
        Schedule::new(self.chunk)
    }

    /// All other ranks, the right neighbour first.
    pub(crate) fn others(self) -> impl Iterator<Item = usize> {
        (1..self.size).map(move |distance| (self.rank + distance) % self.size)
    }
}

/// One operation over streams.
pub(crate) struct Session<'a> {
    pub transport: &'a mut dyn Transport,
    pub context: &'a Context,
    pub call: Call,
    pub pool: &'a mut Pool,
    /// Bytes of numbers that this rank has sent so far.
    pub sent: &'a mut u64,
    /// Bytes that go on together.
    pub chunk: usize,
}

impl Session<'_> {
    pub(crate) fn place<T>(&self) -> Place {
        Place {
            rank: self.context.rank,
            size: self.context.size,
            chunk: (self.chunk / size_of::<T>()).max(1),
        }
    }
}

/// Words that `len` numbers take.
pub(crate) fn words<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(size_of::<u64>())
}

/// Memory for `len` numbers from the session's pool; its contents are whatever they were.
fn borrow<T: Element>(session: &mut Session<'_>, len: usize) -> Vec<u64> {
    let words = words::<T>(len);
    let pool = &mut session.pool;
    // The largest, so that not all grow to the size of the largest operation.
    let largest = (0..pool.len()).max_by_key(|&index| pool[index].len());
    let mut memory = largest.map_or_else(Vec::new, |index| pool.swap_remove(index));
    if memory.len() < words {
        memory.resize(words, 0);
    }
    memory
}

fn view<T: Element>(memory: &mut [u64], len: usize) -> &mut [T] {
    &mut bytemuck::cast_slice_mut(&mut memory[..words::<T>(len)])[..len]
}

/// Does `operation` with memory for `len` wider numbers from the session's pool.
pub(crate) fn with_wider<W: Element>(
    session: &mut Session<'_>,
    len: usize,
    operation: impl FnOnce(&mut Session<'_>, &mut [W]) -> Result<()>,
) -> Result<()> {
    let mut memory = borrow::<W>(session, len);
    let outcome = operation(session, view::<W>(&mut memory, len));
    session.pool.push(memory);
    outcome
}
