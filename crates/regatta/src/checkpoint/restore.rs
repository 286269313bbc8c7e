//! Reads checkpoints that were written under any plan.

use super::coverage::same_tensor;
use super::manifest::{FileEntry, Manifest, PartEntry};
use super::names::{BEST, LAST, MANIFEST, parse};
use super::storage::{Location, Source};
use super::{State, Which};
use crate::error::{Error, Result};
use regatta_plan::{Piece, copy_pieces};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Largest header of a file in bytes; Regatta writes shorter ones.
const LONGEST_HEADER: usize = 1 << 30;

/// A complete checkpoint. Many threads at once can read any piece of any tensor from it.
pub struct Checkpoint {
    location: Location,
    folder: String,
    manifest: Manifest,
    /// The parts of each tensor, by its name.
    parts: HashMap<String, Vec<Place>>,
    files: Vec<OnceLock<Source>>,
    warnings: Vec<String>,
}

struct Place {
    file: usize,
    part: usize,
    /// Whether its checksum was verified.
    verified: AtomicBool,
}

impl Checkpoint {
    /// Finds a checkpoint at `location`. If the file `last` (or `best`) is damaged or names a folder that is not
    /// complete, this is the newest complete one, and [`warnings`](Self::warnings) says so.
    ///
    /// # Errors
    /// There is no checkpoint, or none with a readable manifest.
    pub fn find(location: &Location, which: Which) -> Result<Self> {
        let Candidates { folders, mut warnings } = candidates(location, which)?;
        let mut first_error = None;
        for Candidate { folder, named } in folders {
            match (Self::open(location, &folder), named) {
                (Ok(found), named) => {
                    if !warnings.is_empty() && named.is_none() {
                        warnings.push(format!("using {folder}, the newest complete checkpoint"));
                    }
                    return Ok(Self { warnings, ..found });
                }
                (Err(error), named) => {
                    warnings.push(match named {
                        Some(name) => format!("`{name}` names a checkpoint that cannot be used: {error}"),
                        None => error.to_string(),
                    });
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or_else(|| none_at(location)))
    }

    /// Opens the checkpoint that `target` names: a run's folder, a checkpoint's folder, or a URL of either.
    ///
    /// # Errors
    /// As for [`find`](Self::find) and [`open`](Self::open).
    pub fn locate(target: &(impl AsRef<Path> + ?Sized), which: Which) -> Result<Self> {
        match resolve(target.as_ref())? {
            (location, Some(folder)) => Self::open(&location, &folder),
            (location, None) => Self::find(&location, which),
        }
    }

    /// Opens the checkpoint `folder` at `location`.
    ///
    /// # Errors
    /// The checkpoint is not complete, or its manifest is damaged, not Regatta's, or of another version.
    pub fn open(location: &Location, folder: &str) -> Result<Self> {
        let manifest = Manifest::read(location, folder)?;
        let mut parts: HashMap<String, Vec<Place>> = HashMap::new();
        for (file, entry) in manifest.files.iter().enumerate() {
            for (part, PartEntry { name, .. }) in entry.parts.iter().enumerate() {
                let place = Place { file, part, verified: AtomicBool::new(false) };
                parts.entry(name.clone()).or_default().push(place);
            }
        }
        let files = manifest.files.iter().map(|_| OnceLock::new()).collect();
        let (location, folder) = (location.clone(), folder.into());
        Ok(Self { location, folder, manifest, parts, files, warnings: vec![] })
    }

    /// Warnings for the user about how this checkpoint was found.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Path or URL of its folder.
    pub fn path(&self) -> PathBuf {
        self.location.show(&self.folder)
    }

    /// The name of its folder.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Progress and configuration.
    pub fn state(&self) -> &State {
        &self.manifest.state
    }

    /// Its manifest: tensors, files and state.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every tensor's shape.
    pub fn tensors(&self) -> &BTreeMap<String, Vec<usize>> {
        &self.manifest.tensors
    }

    /// Checks that all files exist with the length that the manifest states, so that no memory is allocated for values
    /// that do not exist.
    ///
    /// # Errors
    /// A file is missing or has another length.
    pub(crate) fn present(&self) -> Result<()> {
        for file in &self.manifest.files {
            let first = file.parts.first().map_or("(none)", |part| part.name.as_str());
            let problem = match self.location.size(&format!("{}/{}", self.folder, file.file)) {
                Ok(Some(bytes)) if bytes == file.bytes => continue,
                Ok(Some(bytes)) => {
                    format!("cannot be read: the file has {bytes} bytes instead of {}", file.bytes)
                }
                Ok(None) => "cannot be read: the file is missing".into(),
                Err(error) => format!("cannot be read: {error}"),
            };
            return Err(self.damaged(file, first, &problem));
        }
        Ok(())
    }

    /// Reads `piece` of the tensor `name` into `target`, from whichever files hold parts of it, and verifies the
    /// checksum of each part on its first use. The piece's dimensions may factor the stored shape.
    ///
    /// # Errors
    /// The tensor does not exist or has another shape, a file is missing, truncated or changed, or the parts do not
    /// cover the piece. The content of `target` is then undefined; [`check`](Self::check) finds such errors before
    /// anything is overwritten.
    pub fn read(&self, name: &str, piece: &Piece, target: &mut [f32]) -> Result<()> {
        if target.len() != piece.len() {
            return Err(Error::Usage(format!(
                "cannot read {name}: {} values do not fit in a target of {}",
                piece.len(),
                target.len()
            )));
        }
        for place in self.needed(name, piece)? {
            self.scan(place, Some((piece, target)))?;
        }
        Ok(())
    }

    /// Verifies all parts that are needed to read these pieces, so that damaged files cannot make the reading fail
    /// halfway.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn check<'a>(&self, wanted: impl IntoIterator<Item = (&'a str, &'a Piece)>) -> Result<()> {
        for (name, piece) in wanted {
            for place in self.needed(name, piece)? {
                if !place.verified.load(Ordering::Relaxed) {
                    self.scan(place, None)?;
                }
            }
        }
        Ok(())
    }

    /// The parts of `name` that overlap `piece`.
    fn needed(&self, name: &str, piece: &Piece) -> Result<Vec<&Place>> {
        let other = |problem: String| {
            let problem = format!("{problem}: use the [model] and [optimizer] it was trained with");
            Err(Error::checkpoint(self.location.show(&format!("{}/{MANIFEST}", self.folder)), problem))
        };
        let Some(shape) = self.manifest.tensors.get(name) else {
            return other(format!("has no {name}, which this configuration has"));
        };
        if !piece.is_valid() || !same_tensor(shape, &piece.dims) {
            return other(format!(
                "has {name} as {shape:?}, but this configuration requires {:?}",
                piece.dims
            ));
        }
        let (mut needed, mut covered) = (vec![], 0);
        for place in self.parts.get(name).into_iter().flatten() {
            let shared = self.entry(place).1.piece.shared(piece);
            covered += shared;
            if shared > 0 {
                needed.push(place);
            }
        }
        if covered != piece.len() {
            let problem = format!(
                "holds {covered} of the {} values of {name} that are needed here: it is incomplete; use another \
                 checkpoint",
                piece.len()
            );
            return Err(Error::checkpoint(self.path(), problem));
        }
        Ok(needed)
    }

    fn entry(&self, place: &Place) -> (&FileEntry, &PartEntry) {
        let file = &self.manifest.files[place.file];
        (file, &file.parts[place.part])
    }

    /// Reads a part chunk by chunk: verifies its checksum if that was not done yet, and copies the elements that
    /// `wanted` shares with it.
    fn scan(&self, place: &Place, mut wanted: Option<(&Piece, &mut [f32])>) -> Result<()> {
        let (file, part) = self.entry(place);
        let source = self.source(place.file, &part.name)?;
        let verify = !place.verified.load(Ordering::Relaxed);
        let mut checksum = crc32fast::Hasher::new();
        let most = source.chunk() / 4;
        let mut values = vec![0f32; most.min(part.piece.len())];
        let mut start = 0;
        while start < part.piece.len() {
            let end = part.piece.len().min(start + most);
            let chunk = part.piece.narrow(start..end);
            // A chunk that is verified and shares no elements need not be read.
            if verify || wanted.as_ref().is_some_and(|(piece, _)| piece.shared(&chunk) > 0) {
                let values = &mut values[..end - start];
                let bytes = bytemuck::cast_slice_mut(values);
                let offset = part.offset + 4 * start as u64;
                source.read_at(offset, bytes).map_err(|error| self.unreadable(file, &part.name, &error))?;
                checksum.update(bytes);
                if let Some((piece, target)) = &mut wanted {
                    copy_pieces(&chunk, values, piece, target);
                }
            }
            start = end;
        }
        if verify && checksum.finalize() != part.checksum {
            return Err(self.damaged(file, &part.name, "does not match its checksum: the file was changed"));
        }
        place.verified.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The open file, which must have the length that the manifest states. `name` is the tensor for which it is read.
    fn source(&self, index: usize, name: &str) -> Result<&Source> {
        let (slot, entry) = (&self.files[index], &self.manifest.files[index]);
        if let Some(source) = slot.get() {
            return Ok(source);
        }
        let opened = self.location.open(&format!("{}/{}", self.folder, entry.file));
        let source = opened.map_err(|error| self.unreadable(entry, name, &error))?;
        if source.len() != entry.bytes {
            let problem =
                format!("cannot be read: the file has {} bytes instead of {}", source.len(), entry.bytes);
            return Err(self.damaged(entry, name, &problem));
        }
        Ok(slot.get_or_init(|| source))
    }

    fn unreadable(&self, file: &FileEntry, name: &str, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::NotFound => self.damaged(file, name, "cannot be read: the file is missing"),
            io::ErrorKind::UnexpectedEof => self.damaged(file, name, "cannot be read: the file is truncated"),
            _ => self.damaged(file, name, &format!("cannot be read: {error}")),
        }
    }

    fn damaged(&self, file: &FileEntry, name: &str, problem: &str) -> Error {
        let path = self.location.show(&format!("{}/{}", self.folder, file.file));
        Error::checkpoint(path, format!("tensor {name} {problem}; use another checkpoint"))
    }

    /// Verifies every file and part. Returns the problems.
    pub(super) fn verify(&self) -> Vec<String> {
        let mut problems: Vec<String> = vec![];
        // This takes time in proportion to the elements, so the files must be long enough. The loop below reports
        // files of other lengths.
        let uncovered = if self.present().is_ok() { self.manifest.uncovered() } else { vec![] };
        for problem in uncovered {
            problems.push(format!("checkpoint {}: {problem}", self.path().display()));
        }
        for (index, file) in self.manifest.files.iter().enumerate() {
            let first = file.parts.first().map_or("(none)", |part| part.name.as_str());
            let whole = self.source(index, first).and_then(|source| {
                let end = file.parts.iter().map(|part| part.offset).min().unwrap_or(file.bytes);
                let mut header = vec![0; usize::try_from(end).unwrap_or(0).min(LONGEST_HEADER)];
                source.read_at(0, &mut header).map_err(|error| self.unreadable(file, first, &error))?;
                if crc32fast::hash(&header) != file.header {
                    let problem = "is in a file whose header does not match its checksum";
                    return Err(self.damaged(file, first, problem));
                }
                Ok(())
            });
            if let Err(error) = whole {
                problems.push(error.to_string());
                // If the file cannot be opened, one message is enough.
                if self.files[index].get().is_none() {
                    continue;
                }
            }
            for place in self.parts.values().flatten().filter(|place| place.file == index) {
                problems.extend(self.scan(place, None).err().map(|error| error.to_string()));
            }
        }
        problems
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Checkpoint").field(&self.path()).finish()
    }
}

/// A checkpoint that may be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The name of its folder.
    pub folder: String,
    /// The small file that names it: `last` or `best`.
    pub named: Option<&'static str>,
}

/// Checkpoints in the order in which they are tried.
#[derive(Debug)]
pub(crate) struct Candidates {
    /// The wanted one, then those that may replace it, the newest first. Empty if there is no checkpoint.
    pub folders: Vec<Candidate>,
    /// Problems of the files `last` and `best` themselves.
    pub warnings: Vec<String>,
}

/// The checkpoints at `location` that may be used for `which`.
///
/// # Errors
/// The location cannot be listed, or there is no checkpoint of the wanted step.
pub(crate) fn candidates(location: &Location, which: Which) -> Result<Candidates> {
    let complete = complete_folders(location)?;
    let names: &[&str] = match which {
        Which::Last => &[LAST],
        Which::Best => &[BEST, LAST],
        Which::Step(step) => {
            let of_step = |folder: &String| parse(folder).is_some_and(|(of, _)| of == step);
            let Some(folder) = complete.iter().find(|folder| of_step(folder)).cloned() else {
                return Err(no_step(location, step, &complete));
            };
            return Ok(Candidates { folders: vec![Candidate { folder, named: None }], warnings: vec![] });
        }
    };
    let (mut folders, mut warnings): (Vec<Candidate>, _) = (vec![], vec![]);
    for &name in names {
        match location.text(name) {
            Ok(None) => {}
            Ok(Some(text)) if parse(text.trim()).is_some() => {
                folders.push(Candidate { folder: text.trim().into(), named: Some(name) });
            }
            Ok(Some(text)) => {
                let text: String = text.chars().take(40).collect();
                warnings.push(format!(
                    "{}: names {text:?}, which is not a checkpoint's folder",
                    location.show(name).display()
                ));
            }
            Err(error) => warnings.push(Error::io("read", location.show(name))(error).to_string()),
        }
    }
    folders.extend(complete.into_iter().map(|folder| Candidate { folder, named: None }));
    let mut seen = HashSet::new();
    folders.retain(|candidate| seen.insert(candidate.folder.clone()));
    Ok(Candidates { folders, warnings })
}

/// The error that there is no checkpoint at `location`.
pub(crate) fn none_at(location: &Location) -> Error {
    let problem = "there is no complete checkpoint: give the folder of a run that has saved one";
    Error::checkpoint(location.show(""), problem)
}

fn no_step(location: &Location, step: usize, complete: &[String]) -> Error {
    let there: Vec<String> =
        complete.iter().rev().filter_map(|name| Some(format!("step-{}", parse(name)?.0))).collect();
    let there = if there.is_empty() { "none".into() } else { there.join(", ") };
    Error::checkpoint(location.show(""), format!("there is no checkpoint of step {step}; there are: {there}"))
}

/// Folders with a manifest, the newest first.
pub(super) fn complete_folders(location: &Location) -> Result<Vec<String>> {
    let listed = location.folders().map_err(Error::io("list the checkpoints in", location.show("")))?;
    let mut folders: Vec<_> = listed.into_iter().filter_map(|name| Some((parse(&name)?, name))).collect();
    folders.sort();
    let complete = |name: &String| matches!(location.size(&format!("{name}/{MANIFEST}")), Ok(Some(_)));
    Ok(folders.into_iter().rev().map(|(_, name)| name).filter(complete).collect())
}

/// The location that `target` names, and the checkpoint's folder if it names one.
pub(super) fn resolve(target: &Path) -> Result<(Location, Option<String>)> {
    // A path need not be text; a URL is.
    let url = target.to_str().filter(|text| text.contains("://"));
    let here = match url {
        Some(url) => Location::parse(url)?,
        // An absolute path, because `.` has no name.
        None => Location::folder(std::fs::canonicalize(target).unwrap_or_else(|_| target.into())),
    };
    match here.split() {
        Some((parent, name)) if parse(&name).is_some() => Ok((parent, Some(name))),
        _ if url.is_some() => Ok((here, None)),
        // A run's folder, or its `checkpoints`.
        _ if here.folders().is_ok_and(|names| names.iter().any(|name| parse(name).is_some())) => {
            Ok((here, None))
        }
        _ => Ok((Location::of_run(target), None)),
    }
}
