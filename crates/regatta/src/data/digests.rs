//! Caches digests of large sources, so that not every rank of every run must read all of the text to find its tokens.
//!
//! A cached digest is used only if the files cannot have changed: they are the same by device and inode, and have the
//! same sizes and times of change. The kernel sets the time of change (ctime) with every write, and no program can set
//! it, unlike the time of modification, which `cp -p`, `tar` and `touch` set. This holds on the Linux file systems
//! that are listed here; on others (network shares, FUSE, FAT) the text is read each time.

use super::source::Source;
use crate::error::Result;
use crate::files::write_atomically;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes from which on a source's digest is cached; smaller sources are read quickly.
const LARGE: u64 = 16 << 20;

/// Seconds since the last change after which a file counts as unchanging: a change within the same tick of the clock
/// could not be noticed.
#[cfg(target_os = "linux")]
const REST_SECONDS: i64 = 3;

/// The digests in the folder of a cache.
pub(crate) struct Digests {
    path: PathBuf,
    /// Bytes from which on a digest is cached.
    large: u64,
}

/// By source: the metadata of its files, and their digest.
type Known = BTreeMap<String, (String, String)>;

impl Digests {
    pub(crate) fn of(cache: &Path) -> Self {
        Self { path: cache.join("digests.json"), large: LARGE }
    }

    /// The digest of `source`, which is at `path`.
    pub(crate) fn digest(&self, path: &Path, source: &Source) -> Result<u128> {
        let Some(before) = metadata(source.files(), self.large) else { return source.digest() };
        // The digests of paths that are not UTF-8 are not cached.
        let name = fs::canonicalize(path).ok().and_then(|path| path.to_str().map(str::to_string));
        let mut known: Known = fs::read(&self.path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        if let Some((seen, digest)) = name.as_ref().and_then(|name| known.get(name))
            && *seen == before.text
            && let Ok(digest) = u128::from_str_radix(digest, 16)
        {
            return Ok(digest);
        }
        let digest = source.digest()?;
        // Two changes within one tick of the clock look like one, so the last change must be some seconds ago.
        let still =
            before.at_rest && metadata(source.files(), self.large).is_some_and(|now| now.text == before.text);
        if let (true, Some(name)) = (still, name) {
            known.retain(|path, _| Path::new(path).exists());
            known.insert(name, (before.text, format!("{digest:032x}")));
            if let (Some(folder), Ok(json)) = (self.path.parent(), serde_json::to_vec(&known)) {
                // The cache only saves time: it is not an error if it cannot be written.
                let _ = fs::create_dir_all(folder).is_ok() && write_atomically(&self.path, &json).is_ok();
            }
        }
        Ok(digest)
    }
}

/// The metadata of a source's files.
struct Metadata {
    text: String,
    /// Whether the last change is some seconds ago.
    at_rest: bool,
}

/// None if the file system's metadata are not reliable, or if the files have fewer than `large` bytes in all.
#[cfg(target_os = "linux")]
fn metadata(files: &[PathBuf], large: u64) -> Option<Metadata> {
    use std::collections::HashSet;
    use std::os::unix::fs::MetadataExt;
    use std::time::{SystemTime, UNIX_EPOCH};
    /// Magic numbers (statfs(2)) of ext2 to ext4, XFS, Btrfs, tmpfs, overlayfs, F2FS, ZFS.
    const RELIABLE: [u64; 7] =
        [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0xf2f5_2010, 0x2fc1_2fc1];
    let (mut bytes, mut latest, mut devices) = (0, i64::MIN, HashSet::new());
    let mut all = xxhash_rust::xxh3::Xxh3::new();
    for file in files {
        let meta = fs::metadata(file).ok()?;
        if devices.insert(meta.dev()) && !RELIABLE.contains(&(rustix::fs::statfs(file).ok()?.f_type as u64)) {
            return None;
        }
        bytes += meta.len();
        latest = latest.max(meta.ctime());
        let seen = [meta.dev(), meta.ino(), meta.len(), meta.mtime() as u64, meta.mtime_nsec() as u64];
        let changed = [meta.ctime() as u64, meta.ctime_nsec() as u64];
        for number in seen.into_iter().chain(changed) {
            all.update(&number.to_le_bytes());
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs() as i64;
    let text = format!("{} files, {bytes} bytes, {:032x}", files.len(), all.digest128());
    (bytes >= large).then_some(Metadata { text, at_rest: latest + REST_SECONDS <= now })
}

#[cfg(not(target_os = "linux"))]
fn metadata(_: &[PathBuf], _: u64) -> Option<Metadata> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::fs::File;
    use std::time::{Duration, Instant};

    #[test]
    fn only_digests_of_files_that_cannot_have_changed_are_cached() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("a.txt");
        let digests = Digests { path: folder.path().join("digests.json"), large: 0 };
        let digest = || digests.digest(&text, &Source::find(&text).unwrap()).unwrap();
        fs::write(&text, "one").unwrap();
        let time = fs::metadata(&text).unwrap().modified().unwrap();
        let first = digest();
        assert!(!digests.path.exists(), "it was written just now");
        if metadata(std::slice::from_ref(&text), 0).is_none() {
            eprintln!("skipped: this file system does not keep times of change");
            return;
        }
        let begun = Instant::now();
        while !digests.path.exists() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(digest(), first);
        }
        // The cache is used: another digest in it is returned.
        let known = fs::read_to_string(&digests.path).unwrap();
        fs::write(&digests.path, known.replace(&format!("{first:032x}"), &format!("{:032x}", 7))).unwrap();
        assert_eq!(digest(), 7);
        // The same size and the same time of modification.
        fs::write(&text, "two").unwrap();
        File::options().append(true).open(&text).unwrap().set_modified(time).unwrap();
        assert!(digest() != 7 && digest() != first);
        assert_eq!(fs::metadata(&text).unwrap().modified().unwrap(), time);
        // A damaged cache is ignored.
        fs::write(&digests.path, "{").unwrap();
        digest();
    }
}
