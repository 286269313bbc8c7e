//! Atomic writes of files, locks on files, and files to which lines are appended.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

/// Writes `bytes` to `path` atomically: to a temporary file in the same folder, which is synced and renamed.
///
/// # Errors
/// A step fails. Then `path` is unchanged, and the temporary file is removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if let Err(error) = written {
        // The error of the write matters more.
        let _ = fs::remove_file(&temporary);
        return Err(Error::io("write", path)(error));
    }
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Syncs `folder`, which makes renames in it durable.
///
/// # Errors
/// The folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io("sync", folder))
}

/// The result of an attempt to lock a file.
#[derive(Debug)]
pub(crate) enum Locked {
    /// This process has the lock until the file is closed, at the latest when the process ends.
    Ours(File),
    /// Another process has the lock.
    Taken,
    /// The file cannot be locked, for example because the file system has no locks; with the system's reason.
    Unavailable(io::Error),
}

/// Tries to lock the file `path`, which is created if it does not exist. Does not wait.
///
/// # Errors
/// The file cannot be opened for writing.
pub(crate) fn try_lock(path: &Path) -> io::Result<Locked> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            // The process that had the lock may have removed the file meanwhile: then this lock excludes no other
            // process.
            Ok(()) if !is_at(&file, path) => continue,
            Ok(()) => return Ok(Locked::Ours(file)),
            Err(TryLockError::WouldBlock) => return Ok(Locked::Taken),
            Err(TryLockError::Error(error)) => return Ok(Locked::Unavailable(error)),
        }
    }
}

/// Whether `path` is the path of the open `file`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    fs::exists(path).unwrap_or(false)
}

/// Opens a file of lines to append to it. Truncates it before the first line that is incomplete, not UTF-8, or for
/// which `keep` is false. Returns the file and the number of lines that are kept.
///
/// # Errors
/// The file cannot be opened, read or truncated.
pub(crate) fn append_after(path: &Path, keep: impl Fn(&str) -> bool) -> io::Result<(File, usize)> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let (mut reader, mut line) = (BufReader::new(&file), vec![]);
    let (mut end, mut lines) = (0, 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        let whole = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
        if !whole.is_some_and(&keep) {
            break;
        }
        (end, lines) = (end + line.len() as u64, lines + 1);
        line.clear();
    }
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    Ok((file, lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_lock_is_exclusive_until_it_is_dropped() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(matches!(held, Locked::Ours(_)));
        assert!(matches!(try_lock(&path).unwrap(), Locked::Taken));
        drop(held);
        assert!(matches!(try_lock(&path).unwrap(), Locked::Ours(_)));
        assert!(try_lock(&place.path().join("none/lock")).is_err());
    }

    #[test]
    fn a_lock_on_a_removed_file_does_not_count() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lock");
        let Locked::Ours(first) = try_lock(&path).unwrap() else { panic!("not locked") };
        assert!(is_at(&first, &path));
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&first, &path));
        let Locked::Ours(second) = try_lock(&path).unwrap() else { panic!("not locked") };
        assert!(is_at(&second, &path) && !is_at(&first, &path));
    }

    #[test]
    fn lines_are_appended_after_the_last_complete_one() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lines");
        let keep = |line: &str| line.parse::<u32>().is_ok_and(|number| number <= 3);
        for (before, after, lines) in [
            ("", "9\n", 0),
            ("1\n2\n3\n4\n", "1\n2\n3\n9\n", 3),
            ("1\n2\n3", "1\n2\n9\n", 2),
            ("1\n\u{0}\u{0}\n2\n", "1\n9\n", 1),
        ] {
            fs::write(&path, before).unwrap();
            let (mut file, kept) = append_after(&path, keep).unwrap();
            file.write_all(b"9\n").unwrap();
            assert_eq!((fs::read_to_string(&path).unwrap().as_str(), kept), (after, lines), "{before:?}");
        }
    }
}
