//! Where things lie in a segment: a header, then what each rank of the host may give.
//!
//! | place | size |
//! |---|---|
//! | header | a page |
//! | registered buffers of each rank | as much as the file system has for each, at most 16 GiB |
//! | parts of groups whose first rank is the host's first | for hundreds of groups of all ranks |
//! | parts of groups, for each other rank | as many, as far as there is address space |
//!
//! All of it is address space in a sparse file: memory is reserved for what is used.

use crate::error::Result;
use crate::transport::shared::{LARGE, Shared};
use std::ops::Range;

pub(super) const PAGE: usize = 4096;
/// Most address space for one rank's registered buffers.
const MOST_BUFFERS: usize = 16 << 30;
/// Groups of all ranks that there is address space for.
const GROUPS: usize = 256;
/// Address space for groups whose first rank is the host's first, at most, and about as much again for all others.
const MOST_PARTS: usize = 1 << 40;

/// Bytes of a group's part.
#[derive(Clone, Copy)]
pub(super) struct PartSize {
    /// Control blocks, channels and small slots, which are reserved from the beginning.
    pub(super) fixed: usize,
    /// The large slots that follow, which are reserved when they are needed.
    pub(super) large: usize,
}

impl PartSize {
    /// Of a group with `ranks` ranks on the host and `lanes` lanes.
    pub(super) fn new(ranks: usize, lanes: usize) -> Result<Self> {
        let fixed = Shared::bytes_with_lanes(ranks, lanes)?.next_multiple_of(PAGE);
        Ok(Self { fixed, large: ranks * lanes * 2 * LARGE })
    }
}

/// Where things lie in a segment.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    ranks: usize,
    /// Bytes for one rank's registered buffers.
    buffers: usize,
    /// Bytes for the parts that the first rank gives.
    first: usize,
    /// Bytes for the parts that any other rank gives.
    others: usize,
}

impl Layout {
    /// For a file system of `space` bytes.
    pub(super) fn new(ranks: usize, lanes: usize, space: usize) -> Result<Self> {
        Self::with_buffers(ranks, lanes, (space / ranks).clamp(PAGE, MOST_BUFFERS) / PAGE * PAGE)
    }

    /// Of a file of `len` bytes; none where no segment of these ranks and lanes has that length.
    pub(super) fn of_file(ranks: usize, lanes: usize, len: usize) -> Result<Option<Self>> {
        let least = Self::with_buffers(ranks, lanes, 0)?;
        let buffers = len.checked_sub(least.len()).filter(|all| all.is_multiple_of(ranks * PAGE));
        Ok(buffers.filter(|&all| all > 0).map(|all| Self { buffers: all / ranks, ..least }))
    }

    fn with_buffers(ranks: usize, lanes: usize, buffers: usize) -> Result<Self> {
        let PartSize { fixed, large } = PartSize::new(ranks, lanes)?;
        let first = (GROUPS * (fixed + large)).min(MOST_PARTS);
        let others = first.min(MOST_PARTS / ranks);
        // A group without large slots always has its place.
        let [first, others] = [first, others].map(|bytes| bytes.max(2 * fixed) / PAGE * PAGE);
        Ok(Self { ranks, buffers, first, others })
    }

    /// Bytes of the segment.
    pub(super) fn len(&self) -> usize {
        self.parts(self.ranks - 1).end
    }

    /// Bytes for one rank's registered buffers.
    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffers
    }

    /// Where the registered buffers of `rank` are.
    pub(super) fn buffers(&self, rank: usize) -> Range<usize> {
        assert!(rank < self.ranks, "there is no rank {rank} on this host");
        let start = PAGE + rank * self.buffers;
        start..start + self.buffers
    }

    /// Where the parts are that `rank` gives to groups.
    pub(super) fn parts(&self, rank: usize) -> Range<usize> {
        let start = self.buffers(self.ranks - 1).end;
        match rank.checked_sub(1) {
            None => start..start + self.first,
            Some(before) => {
                assert!(rank < self.ranks, "there is no rank {rank} on this host");
                let start = start + self.first + before * self.others;
                start..start + self.others
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_one_another_and_the_length_tells_all() {
        for (ranks, lanes, space) in [(1, 1, 1 << 16), (2, 64, 1 << 35), (16, 1, 1 << 50), (1024, 1, 1 << 30)]
        {
            let layout = Layout::new(ranks, lanes, space).unwrap();
            let mut end = PAGE;
            let ranges = (0..ranks).map(|rank| layout.buffers(rank));
            for range in ranges.chain((0..ranks).map(|rank| layout.parts(rank))) {
                assert!(range.start == end && range.end > end && range.end.is_multiple_of(PAGE));
                end = range.end;
            }
            assert_eq!(layout.len(), end);
            // What a process can address.
            assert!(end < 1 << 46);
            let found = Layout::of_file(ranks, lanes, end).unwrap().unwrap();
            assert_eq!((found.buffers, found.len()), (layout.buffers, end));
            assert!(Layout::of_file(ranks, lanes, end + 1).unwrap().is_none());
            assert!(Layout::of_file(ranks, lanes, 1000).unwrap().is_none());
        }
    }

    #[test]
    fn hundreds_of_groups_have_their_place() {
        for ranks in [2, 16, 64] {
            let layout = Layout::new(ranks, 1, 1 << 40).unwrap();
            let size = PartSize::new(ranks, 1).unwrap();
            assert!(layout.parts(0).len() / (size.fixed + size.large) >= 250, "{ranks}");
        }
    }
}
