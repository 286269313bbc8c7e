//! Buffers that come and go, kept for the next use.

use crate::error::Result;
use regatta_comm::{Buffer, Group};

/// Most buffers that are kept while nobody uses them.
const KEPT: usize = 4;

/// Buffers of one group.
pub(crate) struct Pool {
    group: Group,
    free: Vec<Buffer<f32>>,
    taken: usize,
    peak: usize,
}

impl Pool {
    pub(crate) fn new(group: Group) -> Self {
        Self { group, free: vec![], taken: 0, peak: 0 }
    }

    /// A buffer of `len` elements, with any numbers.
    pub(crate) fn take(&mut self, len: usize) -> Result<Buffer<f32>> {
        self.taken += len;
        self.peak = self.peak.max(self.taken);
        match self.free.iter().position(|buffer| buffer.len() == len) {
            Some(index) => Ok(self.free.swap_remove(index)),
            None => Ok(self.group.buffer(len)?),
        }
    }

    /// Gives one back.
    pub(crate) fn give(&mut self, buffer: Buffer<f32>) {
        self.taken = self.taken.saturating_sub(buffer.len());
        if self.free.len() == KEPT {
            self.free.remove(0);
        }
        self.free.push(buffer);
    }

    /// Most bytes that were taken at once.
    pub(crate) fn peak_bytes(&self) -> usize {
        self.peak * size_of::<f32>()
    }
}
