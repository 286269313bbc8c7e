//! Memory that peers reach without a copy.

/// Registered memory as this rank sees it: where its own data lies, and where a peer's does.
pub(crate) trait Registered: Sync {
    /// The place of `data` in this rank's registered memory, if it lies there.
    fn place(&self, data: &[u8]) -> Option<u64>;
    /// `len` bytes at `place` of `rank`'s registered memory.
    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8>;
}
