//! The files from which texts are read, and a digest of their content.

use super::decode;
use super::hash::hash;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes that are read at once to be digested.
const CHUNK: usize = 1 << 20;

/// A text file, or the files of a folder in the order of their paths.
pub(crate) struct Source {
    path: PathBuf,
    files: Vec<PathBuf>,
    folder: bool,
}

/// The texts of a source.
pub(crate) struct Read {
    pub texts: Vec<String>,
    /// Files that were skipped, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
    /// The digest of the files.
    pub digest: u128,
}

impl Source {
    /// The file `path`, or all files below the folder `path`. Links to files are followed, links to folders are not,
    /// and hidden files are skipped.
    pub(crate) fn find(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|error| {
            Error::data(path, format!("cannot be read ({error}); set data.path to a text file or folder"))
        })?;
        let folder = meta.is_dir();
        let files = if folder { walk(path)? } else { vec![path.to_path_buf()] };
        Ok(Self { path: path.into(), files, folder })
    }

    /// A digest of the content of all files, in their order. It does not depend on names and times.
    pub(crate) fn digest(&self) -> Result<u128> {
        let mut all = Xxh3::new();
        let mut buffer = vec![0; CHUNK];
        for file in &self.files {
            match digest_of(file, &mut buffer) {
                Ok(digest) => all.update(&digest.to_le_bytes()),
                Err(error) => self.unreadable(file, error, &mut all)?,
            }
        }
        Ok(all.digest128())
    }

    /// Reads all texts. Of a folder, copies of a text and files that are not text are skipped.
    ///
    /// # Errors
    /// There is no text, or the source is a single file that is not text.
    pub(crate) fn read(&self) -> Result<Read> {
        let mut read = Read { texts: vec![], skipped: vec![], digest: 0 };
        let (mut all, mut seen) = (Xxh3::new(), HashSet::new());
        for file in &self.files {
            let bytes = match fs::read(file) {
                Ok(bytes) => bytes,
                Err(error) => {
                    read.skipped.push((file.clone(), format!("cannot be read: {error}")));
                    self.unreadable(file, error, &mut all)?;
                    continue;
                }
            };
            all.update(&xxh3_128(&bytes).to_le_bytes());
            match decode::text(bytes) {
                Ok(text) if !self.folder || (!text.is_empty() && seen.insert(hash(text.as_bytes()))) => {
                    read.texts.push(text);
                }
                Ok(_) => {}
                // An image among the texts is not an error.
                Err(problem) if self.folder => read.skipped.push((file.clone(), problem)),
                Err(problem) => return Err(Error::data(file, problem)),
            }
        }
        read.digest = all.digest128();
        if read.texts.iter().all(String::is_empty) {
            let problem = match &read.skipped[..] {
                [] => "has no text".to_string(),
                [(file, problem), rest @ ..] => {
                    let more =
                        if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
                    format!("has no text: {} {problem}{more}", file.display())
                }
            };
            return Err(Error::data(&self.path, problem));
        }
        Ok(read)
    }

    /// Records an unreadable file of a folder in its digest. A single file that is unreadable is an error.
    fn unreadable(&self, file: &Path, error: std::io::Error, all: &mut Xxh3) -> Result<()> {
        if !self.folder {
            return Err(Error::io("read", file)(error));
        }
        all.update(b"unreadable");
        Ok(())
    }

    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

fn digest_of(path: &Path, buffer: &mut [u8]) -> std::io::Result<u128> {
    let mut file = File::open(path)?;
    let mut digest = Xxh3::new();
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(digest.digest128()),
            Ok(count) => digest.update(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The files below `folder`, in the order of their paths.
fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut open = vec![folder.to_path_buf()];
    let mut paths: Vec<PathBuf> = vec![];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io("read the folder", &folder))? {
            let entry = entry.map_err(Error::io("read the folder", &folder))?;
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && !hidden => open.push(entry.path()),
                Ok(kind) if kind.is_file() && !hidden => paths.push(entry.path()),
                // Data sets often link to their files. A link to a folder could lead back to one above it.
                Ok(kind) if kind.is_symlink() && !hidden && entry.path().is_file() => {
                    paths.push(entry.path())
                }
                _ => {}
            }
        }
    }
    paths.sort();
    Ok(paths)
}
