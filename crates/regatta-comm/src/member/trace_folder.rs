//! The folder that the flight recorder writes to where the user names none: private to the user, and kept small.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What jobs have left here for longer is removed.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// The folder among the temporary files, one for each user.
pub(crate) fn default() -> PathBuf {
    #[cfg(unix)]
    let name = format!("regatta-trace-{}", rustix::process::getuid().as_raw());
    #[cfg(not(unix))]
    let name = "regatta-trace";
    std::env::temp_dir().join(name)
}

/// Makes the folder of one job within `folder`. In the default folder, which lies where everyone can write, it first
/// sees that it is this user's, and removes what is old.
pub(crate) fn prepare(folder: &Path, job: &str) -> io::Result<PathBuf> {
    if folder == default() {
        make_private(folder)?;
        remove_old(folder);
    }
    let folder = folder.join(job);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Makes `folder` so that only this user can use it. One that somebody else has made there is refused, and so is a link.
#[cfg(unix)]
fn make_private(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder)?;
    let problem = if !found.is_dir() {
        "it is a link or a file"
    } else if found.uid() != rustix::process::getuid().as_raw() {
        "it belongs to another user"
    } else if found.mode() & 0o022 != 0 {
        "other users can write there"
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, problem))
}

#[cfg(not(unix))]
fn make_private(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)
}

/// Removes the folders of jobs that ended long ago. Whatever cannot be removed stays.
fn remove_old(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        // Of a link this is the link itself.
        let Ok(meta) = entry.metadata() else { continue };
        let age = meta.modified().ok().and_then(|modified| modified.elapsed().ok());
        if meta.is_dir() && age.is_some_and(|age| age > OLD) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Writes `text` to `path`, anew: what is there is removed and not written through, since it may be a link.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text.as_bytes())
}
