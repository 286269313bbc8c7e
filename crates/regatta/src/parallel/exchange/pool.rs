//! A pool of temporary buffers, which keeps them for reuse.

use crate::error::Result;
use regatta_comm::{Buffer, Group};

/// Most unused buffers that a pool keeps.
const MAX_FREE: usize = 4;

/// The buffers of one group.
pub(super) struct Pool {
    group: Group,
    free: Vec<Buffer<f32>>,
    /// Elements of the buffers in use, and the peak of that number.
    taken: usize,
    peak: usize,
}

impl Pool {
    pub(super) fn new(group: Group) -> Self {
        Self { group, free: vec![], taken: 0, peak: 0 }
    }

    /// A buffer of `len` elements, which are undefined.
    pub(super) fn take(&mut self, len: usize) -> Result<Buffer<f32>> {
        self.taken += len;
        self.peak = self.peak.max(self.taken);
        match self.free.iter().position(|buffer| buffer.len() == len) {
            Some(index) => Ok(self.free.swap_remove(index)),
            None => Ok(self.group.buffer(len)?),
        }
    }

    /// Returns a buffer to the pool.
    pub(super) fn put_back(&mut self, buffer: Buffer<f32>) {
        self.taken = self.taken.saturating_sub(buffer.len());
        if self.free.len() == MAX_FREE {
            self.free.remove(0);
        }
        self.free.push(buffer);
    }

    /// The peak bytes of buffers in use.
    pub(super) fn peak_bytes(&self) -> usize {
        self.peak * size_of::<f32>()
    }
}
