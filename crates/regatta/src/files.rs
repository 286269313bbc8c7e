//! Locks on files, also for file systems that have none, and files of lines that grow.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

/// What became of an attempt to lock a file.
#[derive(Debug)]
pub(crate) enum Locked {
    /// The lock is ours until the file is closed. The end of the process closes it too, however it ends.
    Ours(File),
    /// Another process has it.
    Taken,
    /// No lock can be had here, as on file systems without locks; the system's reason.
    Unavailable(io::Error),
}

/// Tries to lock the file `path`, which is made where it is not there. Does not wait.
///
/// # Errors
/// A file that cannot be opened for writing.
pub(crate) fn try_lock(path: &Path) -> io::Result<Locked> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            // Whoever had it may have removed the file in between: then the lock is on a file that nobody else finds.
            Ok(()) if !is_at(&file, path) => continue,
            Ok(()) => return Ok(Locked::Ours(file)),
            Err(TryLockError::WouldBlock) => return Ok(Locked::Taken),
            Err(TryLockError::Error(error)) => return Ok(Locked::Unavailable(error)),
        }
    }
}

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

/// Opens a file of lines to append to it, cut before the first line that `keep` does not want or that is not whole.
/// Returns it with the number of lines that stay.
///
/// # Errors
/// A file that cannot be opened, read or cut.
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
    fn a_lock_is_had_once_and_given_back() {
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
    fn a_lock_on_a_file_that_was_removed_is_none() {
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
    fn a_file_of_lines_goes_on_where_it_is_whole() {
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
