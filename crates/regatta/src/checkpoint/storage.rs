//! Storage of checkpoints: a local folder, written with `fsync`, or an object store named by a URL.

use super::object::{Object, ObjectFolder, Upload};
use crate::error::{Error, Result};
use crate::files::{sync_folder, write_atomically};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Bytes that are read at once from a local file.
const LOCAL_CHUNK_BYTES: usize = 1 << 20;
/// Bytes that are read at once from an object.
const OBJECT_CHUNK_BYTES: usize = 16 << 20;

/// A location with folders of checkpoints and the small files `last` and `best`.
#[derive(Debug, Clone)]
pub struct Location(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Folder(PathBuf),
    Objects(ObjectFolder),
}

impl Location {
    /// The checkpoints of the run folder `run`.
    pub fn of_run(run: &Path) -> Self {
        Self::folder(super::folder(run))
    }

    /// The local folder `path`, which holds the checkpoints' folders.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Kind::Folder(path.into()))
    }

    /// The object store that `text` names if it is a URL (`s3://bucket/prefix`, `gs://bucket/prefix`,
    /// `az://container/prefix`, `file:///folder`, or `memory://name/prefix`, which lives as long as this process);
    /// else the checkpoints of the run folder `text`. The credentials of cloud stores come from their usual
    /// environment variables.
    ///
    /// # Errors
    /// The URL's scheme is unknown, this build has no client for it, or settings that it needs are missing.
    ///
    /// ```
    /// use regatta::checkpoint::Location;
    /// let location = Location::parse("memory://example/run")?;
    /// assert_eq!(location.show("last").to_str(), Some("memory://example/run/last"));
    /// # Ok::<(), regatta::Error>(())
    /// ```
    pub fn parse(text: &str) -> Result<Self> {
        if text.contains("://") {
            return Ok(Self(Kind::Objects(ObjectFolder::parse(text)?)));
        }
        Ok(Self::of_run(Path::new(text)))
    }

    /// The path or URL of `name`, for messages.
    pub fn show(&self, name: &str) -> PathBuf {
        match &self.0 {
            Kind::Folder(folder) => folder.join(name),
            Kind::Objects(objects) => objects.show(name).into(),
        }
    }

    /// Splits a location that is itself a checkpoint's folder into the location around it and the folder's name.
    pub(super) fn split(&self) -> Option<(Self, String)> {
        match &self.0 {
            Kind::Folder(folder) => {
                let name = folder.file_name()?.to_str()?.to_string();
                Some((Self::folder(folder.parent()?), name))
            }
            Kind::Objects(objects) => {
                objects.split().map(|(parent, name)| (Self(Kind::Objects(parent)), name))
            }
        }
    }

    pub(super) fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        match &self.0 {
            Kind::Folder(folder) => fs::read(folder.join(name)),
            Kind::Objects(objects) => objects.get(name),
        }
    }

    /// The text of a small file; none if it does not exist.
    pub(crate) fn text(&self, name: &str) -> io::Result<Option<String>> {
        match self.get(name) {
            Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a small file atomically: it has its old or its new content at any time.
    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        match &self.0 {
            Kind::Folder(folder) => write_atomically(&folder.join(name), &bytes),
            Kind::Objects(objects) => objects.put(name, bytes).map_err(Error::io("write", self.show(name))),
        }
    }

    /// Size of a file in bytes; none if it does not exist.
    pub(super) fn size(&self, name: &str) -> io::Result<Option<u64>> {
        let size = match &self.0 {
            Kind::Folder(folder) => fs::metadata(folder.join(name)).map(|data| data.len()),
            Kind::Objects(objects) => objects.size(name),
        };
        match size {
            Ok(size) => Ok(Some(size)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates the folder of this location if it does not exist. Object stores have no folders to create.
    pub(crate) fn create_folder(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Folder(folder) => fs::create_dir_all(folder),
            Kind::Objects(_) => Ok(()),
        }
    }

    /// Lists the folder and its parents: clients of network file systems cache for a while that a name does not exist.
    pub(crate) fn refresh(&self) {
        let Kind::Folder(folder) = &self.0 else { return };
        let around: Vec<&Path> = folder.ancestors().take(4).collect();
        for folder in around.into_iter().rev() {
            // It may not exist yet.
            let _ = fs::read_dir(folder).map(Iterator::count);
        }
    }

    /// Removes a small file. It is not an error if it does not exist.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        let removed = match &self.0 {
            Kind::Folder(folder) => fs::remove_file(folder.join(name)),
            Kind::Objects(objects) => objects.remove(name),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Names of the folders here.
    pub(super) fn folders(&self) -> io::Result<Vec<String>> {
        let folder = match &self.0 {
            Kind::Folder(folder) => folder,
            Kind::Objects(objects) => return objects.folders(),
        };
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let mut names = vec![];
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string().ok());
            }
        }
        Ok(names)
    }

    /// Removes a folder and its files, the file `first` before all others.
    pub(super) fn remove_folder(&self, name: &str, first: &str) -> io::Result<()> {
        let folder = match &self.0 {
            Kind::Folder(folder) => folder.join(name),
            Kind::Objects(objects) => return objects.remove_folder(name, first),
        };
        match fs::remove_file(folder.join(first)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the temporary files of writers of the small file `name` that were killed.
    pub(super) fn remove_temporaries_of(&self, name: &str) {
        // An object store does not keep an upload that was not finished.
        let Kind::Folder(folder) = &self.0 else { return };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file.strip_prefix(name).is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".tmp")) {
                // A file that stays costs only space, and the next save tries again.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Begins a file of `total` bytes. It exists under its name only after [`Sink::finish`].
    pub(super) fn create(&self, name: &str, total: u64) -> io::Result<Sink> {
        match &self.0 {
            Kind::Folder(folder) => LocalSink::create(folder.join(name)).map(Sink::Local),
            Kind::Objects(objects) => objects.create(name, total).map(Sink::Object),
        }
    }

    /// Opens a file to read parts of it.
    pub(super) fn open(&self, name: &str) -> io::Result<Source> {
        match &self.0 {
            Kind::Folder(folder) => {
                let file = File::open(folder.join(name))?;
                Ok(Source { len: file.metadata()?.len(), kind: SourceKind::Local(file) })
            }
            Kind::Objects(objects) => {
                let (object, len) = objects.open(name)?;
                Ok(Source { len, kind: SourceKind::Object(object) })
            }
        }
    }
}

/// A file that is being written. If it is dropped before it is finished, it is removed.
pub(super) enum Sink {
    Local(LocalSink),
    Object(Upload),
}

impl Sink {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Local(sink) => sink.file.write_all(bytes),
            Self::Object(upload) => upload.write(bytes),
        }
    }

    /// Makes the file durable and gives it its name.
    pub fn finish(self) -> io::Result<()> {
        match self {
            Self::Local(sink) => sink.finish(),
            Self::Object(upload) => upload.finish(),
        }
    }
}

pub(super) struct LocalSink {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    finished: bool,
}

impl LocalSink {
    fn create(path: PathBuf) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let file = File::create(&temporary)?;
        Ok(Self { path, temporary, file, finished: false })
    }

    fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.finished = true;
        let mut folders = self.path.ancestors().skip(1);
        if let Some(folder) = folders.next() {
            sync_folder(folder).map_err(io::Error::other)?;
        }
        // The parent folders up to the run's may be new, too. Errors do not matter: others may not be ours to open.
        folders.filter(|folder| !folder.as_os_str().is_empty()).take(2).for_each(|folder| {
            let _ = sync_folder(folder);
        });
        Ok(())
    }
}

impl Drop for LocalSink {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The error that caused the drop matters more. The folder is removed only if no other rank has a file in it.
        let _ = fs::remove_file(&self.temporary);
        if let Some(folder) = self.path.parent() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// A file that is read in parts.
pub(super) struct Source {
    len: u64,
    kind: SourceKind,
}

enum SourceKind {
    Local(File),
    Object(Object),
}

impl Source {
    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes to read at once: few enough for the cache, or enough to be worth a request.
    pub fn chunk(&self) -> usize {
        match self.kind {
            SourceKind::Local(_) => LOCAL_CHUNK_BYTES,
            SourceKind::Object(_) => OBJECT_CHUNK_BYTES,
        }
    }

    /// Reads `target.len()` bytes from `offset`. Does not use a memory map, because a signal would end the process if
    /// the disk failed or the file shrank.
    pub fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        match &self.kind {
            SourceKind::Local(file) => read_exact_at(file, offset, target),
            SourceKind::Object(object) => object.read_at(offset, target),
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, target: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, target, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, offset: u64, target: &mut [u8]) -> io::Result<()> {
    use std::io::{Read, Seek};
    // All threads share the file's position.
    static POSITION: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = POSITION.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact(target)
}
