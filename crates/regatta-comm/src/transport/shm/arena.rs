//! Registered memory: a rank takes its buffers from its own arena, and sees those of its peers.

use super::layout::PAGE;
use super::ranges::Ranges;
use super::segment::{FOLDER, Segment, VARIABLE};
use crate::transport::registered::Registered;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// It has been said that a buffer found no room.
static FULL: AtomicBool = AtomicBool::new(false);

/// One rank's registered memory.
pub(super) struct Arena {
    segment: Arc<Segment>,
    /// The rank among those of the job on this host.
    rank: usize,
    state: Mutex<State>,
}

struct State {
    /// What was used before; it keeps its memory for the next buffer.
    free: Ranges,
    /// Everything from here on has never been used.
    fresh: usize,
}

impl Arena {
    pub(super) fn new(segment: Arc<Segment>, rank: usize) -> Self {
        let fresh = segment.layout.buffers(rank).start;
        Self { segment, rank, state: Mutex::new(State { free: Ranges::default(), fresh }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` bytes of zeroed memory; none where the arena or `/dev/shm` is full.
    fn allocate(self: &Arc<Self>, len: usize) -> Option<Piece> {
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        let mut state = self.state();
        let offset = match state.free.take(len) {
            Some(offset) => offset,
            None => {
                let offset = state.fresh;
                if len > self.segment.layout.buffers(self.rank).end - offset {
                    full(len);
                    return None;
                }
                self.segment.reserve(offset..offset + len).inspect_err(|_| full(len)).ok()?;
                state.fresh = offset + len;
                offset
            }
        };
        drop(state);
        let piece = Piece { arena: self.clone(), offset, len };
        // SAFETY: the piece is this caller's alone and reserved.
        unsafe { std::ptr::write_bytes(piece.start(), 0, len) };
        Some(piece)
    }
}

/// Says, once, that a buffer is not where peers could reach it.
fn full(len: usize) {
    if !FULL.swap(true, Ordering::Relaxed) {
        crate::say::say(format_args!(
            "warning: shared memory has no room for a buffer of {} MiB, which lies in this process's own memory instead: \
             operations on it are slower; make {FOLDER} larger (in a container: --shm-size), or name another folder by \
             {VARIABLE}",
            len.div_ceil(1 << 20)
        ));
    }
}

/// A piece of registered memory; free again when dropped.
pub(crate) struct Piece {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
}

impl Piece {
    pub(crate) fn start(&self) -> *mut u8 {
        self.arena.segment.at(self.offset).as_ptr()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.arena.state().free.give(self.offset..self.offset + self.len);
    }
}

/// The registered memory of a group's ranks: any buffer of the job is in place there, whichever group gave it.
pub(crate) struct Registry {
    arena: Arc<Arena>,
    /// Which of the job's ranks on this host each rank of the group is.
    ranks: Box<[usize]>,
}

impl Registry {
    pub(super) fn new(arena: Arc<Arena>, ranks: Box<[usize]>) -> Self {
        Self { arena, ranks }
    }

    /// `len` bytes of zeroed memory of this rank; none where its arena or `/dev/shm` is full.
    pub(crate) fn allocate(&self, len: usize) -> Option<Piece> {
        self.arena.allocate(len)
    }
}

impl Registered for Registry {
    fn place(&self, data: &[u8]) -> Option<u64> {
        let own = self.arena.segment.layout.buffers(self.arena.rank);
        let base = self.arena.segment.at(own.start).as_ptr() as usize;
        let offset = (data.as_ptr() as usize).checked_sub(base)?;
        (offset < own.len() && data.len() <= own.len() - offset).then_some(offset as u64)
    }

    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8> {
        let theirs = self.arena.segment.layout.buffers(*self.ranks.get(rank)?);
        let place = usize::try_from(place).ok()?;
        let fits = place.checked_add(len)? <= theirs.len() && place < theirs.len();
        fits.then(|| self.arena.segment.at(theirs.start + place).as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;
    use crate::algorithm::backend::Start;
    use crate::algorithm::direct;
    use crate::member::call::{Call, Kind};
    use crate::member::recorder::Recorder;
    use crate::numbers::element::DType;

    #[test]
    fn memory_beyond_4_gib_is_reduced_in_place() {
        const FAR: usize = (4 << 30) + (1 << 20);
        let ranks = host(2);
        if ranks[0].1.arena.segment.layout.buffer_bytes() < FAR + (4 << 20) {
            return eprintln!("skipped: not enough room for a sparse file");
        }
        let len = 300_001;
        std::thread::scope(|scope| {
            for (rank, (mut shared, registry)) in ranks.into_iter().enumerate() {
                scope.spawn(move || {
                    // The file is sparse: only what is allocated from here on takes space.
                    registry.arena.state().fresh += FAR;
                    let piece = registry.allocate(len * 4).unwrap();
                    // SAFETY: the piece is this thread's alone, page-aligned and long enough.
                    let data = unsafe { std::slice::from_raw_parts_mut(piece.start().cast::<f32>(), len) };
                    assert!(registry.place(bytemuck::cast_slice(data)).unwrap() > u64::from(u32::MAX));
                    data.fill(1.0 + rank as f32);
                    let call = Call::new(Kind::AllReduce, DType::F32, len);
                    let recorder = Recorder::default();
                    let start = Start::new(&recorder, call);
                    direct::all_reduce(&mut shared, Some(&registry), &start, call, data).unwrap();
                    assert!(data.iter().all(|&x| x == 3.0));
                });
            }
        });
    }
}
