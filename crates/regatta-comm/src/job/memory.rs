//! Registered memory that buffers come from.

use crate::transport::registered::Registered;
#[cfg(target_os = "linux")]
use std::sync::Arc;

/// Registered memory that buffers come from.
pub(crate) trait Memory: Registered + Send + Sync {
    #[cfg(target_os = "linux")]
    fn allocate(&self, bytes: usize) -> Option<crate::transport::shm::Piece>;
}

#[cfg(target_os = "linux")]
pub(crate) struct ArenaMemory(pub(crate) Arc<crate::transport::shm::Arena>);

#[cfg(target_os = "linux")]
impl Registered for ArenaMemory {
    fn place(&self, data: &[u8]) -> Option<u64> {
        self.0.place(data)
    }

    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8> {
        self.0.at(rank, place, len)
    }
}

#[cfg(target_os = "linux")]
impl Memory for ArenaMemory {
    fn allocate(&self, bytes: usize) -> Option<crate::transport::shm::Piece> {
        self.0.allocate(bytes)
    }
}
