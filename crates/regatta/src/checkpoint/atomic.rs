//! Files that are either whole or not there.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Writes `bytes` to `path` by way of a temporary file in the same folder, synced before it is renamed.
///
/// # Errors
/// When any step fails; then `path` is as it was and the temporary file is gone.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if let Err(error) = written {
        // Best effort: the write's own error is what matters.
        let _ = fs::remove_file(&temporary);
        return Err(Error::io("write", path)(error));
    }
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Makes renames in `folder` last.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io("sync", folder))
}
