//! Ranks as processes of one Linux host, over a segment in `/dev/shm`, or in a file where that is too small.
//!
//! The segment is one sparse file: the shared core first, then an arena of registered memory for each rank, then
//! the large slots. Of both only what a rank allocates takes memory. All ranks map it, then the file is unlinked, so that nothing
//! is left however the job ends.

use super::shared::{LARGE, Region, SLOT, Shared, Waker};
use super::{Transport, TransportKind};
use crate::error::{Error, Result};
use crate::transport::registered::Registered;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, fstatvfs, ftruncate, open, statvfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::futex;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const FOLDER: &str = "/dev/shm";
/// The variable that names another folder.
const VARIABLE: &str = "REGATTA_SHM_DIR";
const PREFIX: &str = "regatta-shm-";
const PAGE: usize = 4096;
const MAGIC: u64 = 0x0001_4154_5441_4745;
/// Address space for one rank's registered memory.
const LARGEST_ARENA: usize = 16 << 30;
/// A segment whose creator is gone is removed when it is older than this: a younger one may be about to be
/// unlinked by its job.
const STALE: Duration = Duration::from_secs(60);

/// It has been said that `/dev/shm` is not used.
static ELSEWHERE: AtomicBool = AtomicBool::new(false);
/// It has been said that a buffer found no room.
static FULL: AtomicBool = AtomicBool::new(false);

/// A mapped segment.
pub(crate) struct Segment {
    file: OwnedFd,
    start: NonNull<u8>,
    len: usize,
    fixed: usize,
    arena: usize,
    /// Where the large slots begin.
    large: usize,
}

/// Bytes of the large slots of `size` ranks with so many lanes.
fn large_bytes(size: usize, lanes: usize) -> usize {
    size * lanes * 2 * LARGE
}

// SAFETY: the memory is reached through `Shared` and `Arena`, which synchronise.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// The beginning of the segment: enough to know that it is the one that was meant.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    magic: u64,
    nonce: u64,
    size: u64,
    arena: u64,
    lanes: u64,
}

impl Segment {
    /// Creates a segment for `size` ranks with so many lanes, and the path under which peers find it: in the folder
    /// that `REGATTA_SHM_DIR` names, else in `/dev/shm`, else among the temporary files.
    pub(crate) fn create(size: usize, lanes: usize, nonce: u64) -> Result<(Self, PathBuf)> {
        if let Some(folder) = std::env::var_os(VARIABLE) {
            return Self::create_in(Path::new(&folder), size, lanes, nonce);
        }
        let error = match Self::create_in(Path::new(FOLDER), size, lanes, nonce) {
            Ok(created) => return Ok(created),
            Err(error) => error,
        };
        let folder = std::env::temp_dir();
        let created = Self::create_in(&folder, size, lanes, nonce);
        // Once, whatever groups follow.
        if created.is_ok() && !ELSEWHERE.swap(true, Ordering::Relaxed) {
            crate::say::say(format_args!(
                "warning: {error}; the ranks share memory through a file in {} instead, which may be slower",
                folder.display()
            ));
        }
        created.map_err(|_| error)
    }

    /// As [`create`](Self::create), in `folder`.
    pub(crate) fn create_in(folder: &Path, size: usize, lanes: usize, nonce: u64) -> Result<(Self, PathBuf)> {
        let fixed = Shared::bytes_with_lanes(size, lanes)?.next_multiple_of(PAGE);
        remove_stale(folder);
        let path = folder.join(format!("{PREFIX}{}-{nonce:016x}", std::process::id()));
        let fail = |error: rustix::io::Errno| Error::System {
            action: format!("create {fixed} bytes of shared memory in {}", folder.display()),
            reason: format!(
                "{error}; make it larger (in a container: --shm-size), or name another folder by {VARIABLE}"
            ),
        };
        let space = statvfs(folder).map_err(fail)?;
        let arena =
            ((space.f_blocks * space.f_frsize) as usize / size).clamp(PAGE, LARGEST_ARENA) / PAGE * PAGE;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let len = fixed + size * arena + large_bytes(size, lanes);
        let segment = fallocate(&file, FallocateFlags::empty(), 0, fixed as u64)
            .and_then(|()| ftruncate(&file, len as u64))
            .and_then(|()| Self::map(file, fixed, arena, size, len));
        let segment = segment.inspect_err(|_| unlink(&path)).map_err(fail)?;
        let header =
            Header { magic: MAGIC, nonce, size: size as u64, arena: arena as u64, lanes: lanes as u64 };
        // SAFETY: the mapping is larger than a header, page-aligned, and nobody else knows of it yet.
        unsafe { segment.start.cast::<Header>().write(header) };
        Ok((segment, path))
    }

    /// Opens the segment at `path` and checks that it is the one with `nonce`.
    pub(crate) fn open(path: &Path, size: usize, lanes: usize, nonce: u64) -> Result<Self> {
        let action = || format!("open shared memory {}", path.display());
        let file =
            open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Error::system(action()))?;
        let len = fstat(&file).map_err(Error::system(action()))?.st_size as usize;
        let foreign = || Error::System {
            action: action(),
            reason: "it belongs to another job, or ranks differ in REGATTA_SHM_LANES".into(),
        };
        let fixed = Shared::bytes_with_lanes(size, lanes)?.next_multiple_of(PAGE);
        let rest = len.checked_sub(fixed + large_bytes(size, lanes));
        let Some(rest) = rest.filter(|&rest| rest >= size * PAGE && rest.is_multiple_of(size)) else {
            return Err(foreign());
        };
        let arena = rest / size;
        let segment = Self::map(file, fixed, arena, size, len).map_err(Error::system(action()))?;
        // SAFETY: the mapping is larger than a header and page-aligned.
        let header = unsafe { segment.start.cast::<Header>().read() };
        if header.magic != MAGIC
            || header.nonce != nonce
            || header.size != size as u64
            || header.arena != arena as u64
            || header.lanes != lanes as u64
        {
            return Err(foreign());
        }
        Ok(segment)
    }

    fn map(file: OwnedFd, fixed: usize, arena: usize, size: usize, len: usize) -> rustix::io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { file, start, len, fixed, arena, large: fixed + size * arena })
    }

    /// Where large slot `index` of `owner` begins in the segment.
    fn large_offset(&self, owner: usize, index: usize) -> usize {
        let offset = self.large + (owner * 2 + index) * LARGE;
        assert!(index < 2 && offset + LARGE <= self.len, "there is no owner {owner} of large slots");
        offset
    }
}

/// Removes the name of a segment; what is mapped stays.
fn unlink(path: &Path) {
    // It may be gone already.
    let _ = fs::remove_file(path);
}

/// The name of a segment, which is removed when this is dropped.
pub(crate) struct Name(pub(crate) PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        unlink(&self.0);
    }
}

/// Removes segments of jobs that died between creating and unlinking theirs.
fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        let Some(pid) = pid.filter(|pid| pid.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let age = entry.metadata().ok().and_then(|meta| meta.modified().ok()?.elapsed().ok());
        if !Path::new("/proc").join(pid).exists() && age.is_some_and(|age| age > STALE) {
            unlink(&entry.path());
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; nobody holds a reference into it any longer.
        unsafe {
            let _ = munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}

struct Futex;

impl Waker for Futex {
    fn sleep(&self, word: &AtomicU32, expected: u32, timeout: Duration) {
        let timeout = futex::Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // Woken, timed out, or the word had changed: the caller looks again in any case.
        let _ = futex::wait(word, futex::Flags::empty(), expected, Some(&timeout));
    }

    fn wake(&self, word: &AtomicU32) {
        // Only fails on a bad address.
        let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
    }
}

impl Region for Segment {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn bytes(&self) -> usize {
        self.fixed
    }

    fn waker(&self) -> &dyn Waker {
        &Futex
    }

    fn reserve(&self, owner: usize, mut bytes: usize) -> usize {
        bytes = bytes.min(LARGE).next_multiple_of(PAGE);
        while bytes > SLOT {
            // Half of what is free is left to others: for them this may be all the memory there is.
            let enough = |space: rustix::fs::StatVfs| space.f_bavail * space.f_frsize / 2 >= 2 * bytes as u64;
            let slot = |index| {
                let at = self.large_offset(owner, index) as u64;
                fallocate(&self.file, FallocateFlags::empty(), at, bytes as u64)
            };
            if fstatvfs(&self.file).is_ok_and(enough) && slot(0).and_then(|()| slot(1)).is_ok() {
                return bytes;
            }
            bytes = bytes / 2 / PAGE * PAGE;
        }
        0
    }

    fn large(&self, owner: usize, index: usize) -> Option<NonNull<u8>> {
        // SAFETY: within the segment, as `large_offset` has checked.
        Some(unsafe { self.start.add(self.large_offset(owner, index)) })
    }
}

/// One rank's registered memory, and the view of its peers'.
pub(crate) struct Arena {
    segment: Arc<Segment>,
    rank: usize,
    state: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    /// Free pieces, as (offset, length), sorted.
    pieces: Vec<(usize, usize)>,
    /// Everything from here on has never been used.
    fresh: usize,
}

impl Arena {
    pub(crate) fn new(segment: Arc<Segment>, rank: usize) -> Self {
        Self { segment, rank, state: Mutex::default() }
    }

    /// `len` bytes of zeroed memory; none where the arena or `/dev/shm` is full.
    pub(crate) fn allocate(self: &Arc<Self>, len: usize) -> Option<Piece> {
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = match state.pieces.iter().position(|&(_, size)| size >= len) {
            Some(index) => {
                let (offset, size) = state.pieces.remove(index);
                if size > len {
                    state.pieces.insert(index, (offset + len, size - len));
                }
                offset
            }
            None => {
                let offset = state.fresh;
                if len > self.segment.arena - offset {
                    full(len);
                    return None;
                }
                let at = self.segment.fixed + self.rank * self.segment.arena + offset;
                // Reserves the memory now: a full file system would otherwise end us by a signal later.
                fallocate(&self.segment.file, FallocateFlags::empty(), at as u64, len as u64)
                    .inspect_err(|_| full(len))
                    .ok()?;
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

    fn free(&self, offset: usize, len: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let index = state.pieces.partition_point(|&(at, _)| at < offset);
        state.pieces.insert(index, (offset, len));
        // Join with the neighbours.
        if state.pieces.get(index + 1).is_some_and(|next| offset + len == next.0) {
            state.pieces[index].1 += state.pieces.remove(index + 1).1;
        }
        if index > 0 && state.pieces[index - 1].0 + state.pieces[index - 1].1 == state.pieces[index].0 {
            state.pieces[index - 1].1 += state.pieces.remove(index).1;
        }
    }

    fn base(&self, rank: usize) -> *mut u8 {
        // SAFETY: the arenas follow the fixed part, and `rank` is below the group's size.
        unsafe { self.segment.start.as_ptr().add(self.segment.fixed + rank * self.segment.arena) }
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

impl Registered for Arena {
    fn place(&self, data: &[u8]) -> Option<u64> {
        let offset = (data.as_ptr() as usize).checked_sub(self.base(self.rank) as usize)?;
        (offset < self.segment.arena && data.len() <= self.segment.arena - offset).then_some(offset as u64)
    }

    fn at(&self, rank: usize, place: u64, len: usize) -> Option<*mut u8> {
        let end = usize::try_from(place).ok()?.checked_add(len)?;
        // SAFETY: within the rank's arena by the check.
        (end <= self.segment.arena).then(|| unsafe { self.base(rank).add(place as usize) })
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
        // SAFETY: the piece was allocated in this rank's arena.
        unsafe { self.arena.base(self.arena.rank).add(self.offset) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.arena.free(self.offset, self.len);
    }
}

/// The endpoint of one process.
pub(crate) struct ShmTransport {
    pub(crate) shared: Shared,
}

impl Transport for ShmTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        Ok(self.shared.try_send(to, parts))
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        Ok(self.shared.try_recv(from, parts))
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        self.shared.wait(to, from, timeout);
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.shared.set_patience(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        Some(&mut self.shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::direct;
    use crate::algorithm::simulate::context;
    use crate::member::call::{Call, Kind};
    use crate::numbers::element::DType;
    use std::time::SystemTime;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn segments_of_dead_jobs_are_removed_and_never_joined() {
        let folder = folder();
        let old = SystemTime::now() - 2 * STALE;
        // No process has this id: it is beyond the largest there can be.
        let dead = folder.path().join(format!("{PREFIX}99999999-0123456789abcdef"));
        let alive = folder.path().join(format!("{PREFIX}{}-0123456789abcdef", std::process::id()));
        let young = folder.path().join(format!("{PREFIX}99999998-0123456789abcdef"));
        let other = folder.path().join("regatta-0-job.addr");
        for path in [&dead, &alive, &young, &other] {
            fs::write(path, [0; 100_000]).unwrap();
        }
        for path in [&dead, &alive, &other] {
            fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        }
        let (segment, path) = Segment::create_in(folder.path(), 2, 1, 7).unwrap();
        assert!(!dead.exists() && alive.exists() && young.exists() && other.exists());
        // Whoever finds the name of another job's segment does not get in.
        for (size, lanes, nonce) in [(2, 1, 8), (3, 1, 7), (2, 2, 7)] {
            let error = Segment::open(&path, size, lanes, nonce).err().unwrap().to_string();
            assert!(error.contains("it belongs to another job"), "{error}");
        }
        assert!(Segment::open(&young, 2, 1, 7).is_err());
        assert!(Segment::open(&path, 2, 1, 7).is_ok());
        drop(segment);
        unlink(&path);
    }

    #[test]
    fn memory_beyond_4_gib_is_reduced_in_place() {
        const FAR: usize = (4 << 30) + (1 << 20);
        let folder = folder();
        let (first, path) = Segment::create_in(folder.path(), 2, 1, 7).unwrap();
        if first.arena < FAR + (4 << 20) {
            return eprintln!("skipped: not enough room in {} for a sparse file", folder.path().display());
        }
        let second = Segment::open(&path, 2, 1, 7).unwrap();
        unlink(&path);
        let len = 300_001;
        std::thread::scope(|scope| {
            for (rank, segment) in [first, second].into_iter().enumerate() {
                scope.spawn(move || {
                    let segment = Arc::new(segment);
                    let arena = Arc::new(Arena::new(segment.clone(), rank));
                    // The file is sparse: only what is allocated from here on takes space.
                    arena.state.lock().unwrap().fresh = FAR;
                    let piece = arena.allocate(len * 4).unwrap();
                    assert!(piece.offset > u32::MAX as usize);
                    // SAFETY: the piece is this thread's alone, page-aligned and long enough.
                    let data = unsafe { std::slice::from_raw_parts_mut(piece.start().cast::<f32>(), len) };
                    data.fill(1.0 + rank as f32);
                    let mut shared = Shared::new(segment, context(rank, 2));
                    let call = Call::new(Kind::AllReduce, DType::F32, len);
                    direct::all_reduce(&mut shared, Some(&*arena), call, data).unwrap();
                    assert!(data.iter().all(|&x| x == 3.0));
                });
            }
        });
    }
}
