//! The file that the ranks of a host map: how one of them makes it, and how the others find it.

use super::layout::{Layout, PAGE, PartSize};
use crate::error::{Error, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, fstatvfs, ftruncate, open, statvfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use std::fs;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(super) const FOLDER: &str = "/dev/shm";
/// The variable that names another folder.
pub(super) const VARIABLE: &str = "REGATTA_SHM_DIR";
const PREFIX: &str = "regatta-shm-";
const MAGIC: u64 = 0x0002_4154_5441_4745;
/// A segment whose creator is gone is removed when it is older than this: a younger one may be about to be
/// unlinked by its job.
const STALE: Duration = Duration::from_secs(60);

/// It has been said that `/dev/shm` is not used.
static ELSEWHERE: AtomicBool = AtomicBool::new(false);

/// A mapped segment.
pub(crate) struct Segment {
    file: OwnedFd,
    folder: PathBuf,
    pub(super) nonce: u64,
    start: NonNull<u8>,
    len: usize,
    pub(super) layout: Layout,
    pub(super) lanes: usize,
}

// SAFETY: the memory is reached through `Part` and `Arena`, whose users synchronise.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// The beginning of the segment: enough to know that it is the one that was meant.
#[repr(C)]
#[derive(Clone, Copy, PartialEq)]
struct Header {
    magic: u64,
    nonce: u64,
    ranks: u64,
    buffers: u64,
    lanes: u64,
}

impl Header {
    fn new(layout: &Layout, ranks: usize, lanes: usize, nonce: u64) -> Self {
        let [ranks, buffers, lanes] = [ranks, layout.buffer_bytes(), lanes].map(|count| count as u64);
        Self { magic: MAGIC, nonce, ranks, buffers, lanes }
    }
}

impl Segment {
    /// Creates a segment for `ranks` ranks with `lanes` lanes each, and the path under which peers find it: in the folder
    /// that `REGATTA_SHM_DIR` names, else in `/dev/shm`, else among the temporary files.
    pub(crate) fn create(ranks: usize, lanes: usize, nonce: u64) -> Result<(Self, PathBuf)> {
        if let Some(folder) = std::env::var_os(VARIABLE) {
            return Self::create_in(Path::new(&folder), ranks, lanes, nonce);
        }
        let error = match Self::create_in(Path::new(FOLDER), ranks, lanes, nonce) {
            Ok(created) => return Ok(created),
            Err(error) => error,
        };
        let folder = std::env::temp_dir();
        let created = Self::create_in(&folder, ranks, lanes, nonce);
        // Once, whatever jobs follow.
        if created.is_ok() && !ELSEWHERE.swap(true, Ordering::Relaxed) {
            crate::say::say(format_args!(
                "warning: {error}; the ranks share memory through a file in {} instead, which may be slower",
                folder.display()
            ));
        }
        created.map_err(|_| error)
    }

    /// As [`create`](Self::create), in `folder`.
    pub(crate) fn create_in(
        folder: &Path,
        ranks: usize,
        lanes: usize,
        nonce: u64,
    ) -> Result<(Self, PathBuf)> {
        let fixed = PartSize::new(ranks, lanes)?.fixed;
        remove_stale(folder);
        let path = folder.join(format!("{PREFIX}{}-{nonce:016x}", std::process::id()));
        let fail = |error: Errno| no_room(folder, fixed, error);
        let space = statvfs(folder).map_err(fail)?;
        let layout = Layout::new(ranks, lanes, (space.f_blocks * space.f_frsize) as usize)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let segment = ftruncate(&file, layout.len() as u64)
            .and_then(|()| Self::map(file, folder.into(), layout, lanes, nonce))
            // With the part of a group of all ranks: where even that has no room, another folder may have.
            .and_then(|segment| {
                segment.reserve(0..PAGE)?;
                let part = layout.parts(0).start;
                segment.reserve(part..part + fixed).map(|()| segment)
            });
        let segment = segment.inspect_err(|_| unlink(&path)).map_err(fail)?;
        // SAFETY: the mapping is larger than a header, page-aligned, and nobody else knows of it yet.
        unsafe { segment.start.cast::<Header>().write(Header::new(&layout, ranks, lanes, nonce)) };
        Ok((segment, path))
    }

    /// Opens the segment at `path` and checks that it is the one with `nonce`.
    pub(crate) fn open(path: &Path, ranks: usize, lanes: usize, nonce: u64) -> Result<Self> {
        let action = || format!("open shared memory {}", path.display());
        let file =
            open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Error::system(action()))?;
        let len = fstat(&file).map_err(Error::system(action()))?.st_size as usize;
        let foreign = || Error::System {
            action: action(),
            reason: "it belongs to another job, or ranks differ in REGATTA_SHM_LANES".into(),
        };
        let layout = Layout::of_file(ranks, lanes, len)?.ok_or_else(foreign)?;
        let folder = path.parent().unwrap_or(path).into();
        let segment = Self::map(file, folder, layout, lanes, nonce).map_err(Error::system(action()))?;
        // SAFETY: the mapping is larger than a header and page-aligned.
        let header = unsafe { segment.start.cast::<Header>().read() };
        if header != Header::new(&layout, ranks, lanes, nonce) {
            return Err(foreign());
        }
        Ok(segment)
    }

    fn map(
        file: OwnedFd,
        folder: PathBuf,
        layout: Layout,
        lanes: usize,
        nonce: u64,
    ) -> rustix::io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let len = layout.len();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // SAFETY: the advice changes what is dumped of this mapping only. Writing a core would look at every page, and
        // so give memory to all of them. A system that does not know the advice does without.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontDump) };
        Ok(Self { file, folder, nonce, start, len, layout, lanes })
    }

    /// The byte at `offset`.
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len, "the segment ends before {offset}");
        // SAFETY: within the mapping by the check.
        unsafe { self.start.add(offset) }
    }

    /// Bytes of the segment.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Gives `range` memory now: a full file system would otherwise end us by a signal later.
    pub(super) fn reserve(&self, range: Range<usize>) -> rustix::io::Result<()> {
        fallocate(&self.file, FallocateFlags::empty(), range.start as u64, range.len() as u64)
    }

    /// Gives the memory of `range` back to the system, and makes it zeros.
    pub(super) fn release(&self, range: Range<usize>) -> rustix::io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, range.start as u64, range.len() as u64)
    }

    /// Bytes that the file system has for this user.
    pub(super) fn room(&self) -> u64 {
        fstatvfs(&self.file).map_or(0, |space| space.f_bavail * space.f_frsize)
    }

    /// Memory of the segment, in units of 512 bytes.
    #[cfg(test)]
    pub(super) fn blocks(&self) -> i64 {
        fstat(&self.file).unwrap().st_blocks
    }

    /// Says that the segment has no room for `bytes` more.
    pub(super) fn no_room(&self, bytes: usize, error: Errno) -> Error {
        no_room(&self.folder, bytes, error)
    }
}

fn no_room(folder: &Path, bytes: usize, error: Errno) -> Error {
    Error::System {
        action: format!("create {bytes} bytes of shared memory in {}", folder.display()),
        reason: format!(
            "{error}; make it larger (in a container: --shm-size), or name another folder by {VARIABLE}"
        ),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn segments_of_dead_jobs_are_removed_and_never_joined() {
        let folder = tempfile::tempdir().unwrap();
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
        for (ranks, lanes, nonce) in [(2, 1, 8), (3, 1, 7), (2, 2, 7)] {
            let error = Segment::open(&path, ranks, lanes, nonce).err().unwrap().to_string();
            assert!(error.contains("it belongs to another job"), "{error}");
        }
        assert!(Segment::open(&young, 2, 1, 7).is_err());
        assert!(Segment::open(&path, 2, 1, 7).is_ok());
        drop(segment);
        unlink(&path);
    }
}
