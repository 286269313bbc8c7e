//! `manifest.json`: what a checkpoint contains. A checkpoint with a manifest is complete.

use super::State;
use super::coverage::{exactly_once, same_tensor};
use super::names::MANIFEST;
use super::storage::Location;
use crate::error::{Error, Result};
use regatta_plan::Piece;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io;

/// Version of the format; increases with every change.
const VERSION: u32 = 2;
/// Identifies a manifest of Regatta.
const FORMAT: &str = "regatta checkpoint";

/// What a checkpoint holds and where.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Progress and configuration.
    pub state: State,
    /// Every tensor's name and shape.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// The files, one a rank.
    pub files: Vec<FileEntry>,
}

/// A file of a checkpoint. Each rank sends its entry to rank 0, as JSON, after it has written its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the checkpoint's folder.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// CRC-32 of everything before the first part.
    pub header: u32,
    /// Shapes of the tensors of which it has parts. Empty in a manifest, which has them in one map.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// The parts in it, in the order of their offsets.
    pub parts: Vec<PartEntry>,
}

/// A part of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartEntry {
    /// The tensor's name.
    pub name: String,
    /// Which part of it.
    pub piece: Piece,
    /// CRC-32 of its bytes.
    pub checksum: u32,
    /// Byte offset of its f32 values in the file.
    pub offset: u64,
}

impl PartEntry {
    /// Size in the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.piece.len() as u64 * 4
    }
}

/// The file's outer layer: the manifest with its checksum.
#[derive(Serialize, Deserialize)]
struct Envelope {
    format: String,
    version: u32,
    checksum: u32,
    manifest: Box<RawValue>,
}

/// The fields that are read first, to tell files of other versions from damaged ones.
#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    format: String,
    #[serde(default)]
    version: u32,
}

impl Manifest {
    /// A manifest of `files`.
    ///
    /// # Errors
    /// The message says which tensors the files do not hold exactly once, or hold with several shapes.
    pub(super) fn new(state: State, mut files: Vec<FileEntry>) -> Result<Self, String> {
        let mut tensors = BTreeMap::new();
        let mut problems = vec![];
        files.sort_by(|a, b| a.file.cmp(&b.file));
        for file in &mut files {
            for (name, shape) in std::mem::take(&mut file.tensors) {
                let first = tensors.entry(name).or_insert_with(|| shape.clone());
                if *first != shape {
                    problems.push(format!("{} has shapes {first:?} and {shape:?}", file.file));
                }
            }
        }
        if let Some(pair) = files.windows(2).find(|pair| pair[0].file == pair[1].file) {
            problems.push(format!("two ranks wrote {}", pair[0].file));
        }
        let manifest = Self { state, tensors, files };
        problems.extend(manifest.check().err());
        if problems.is_empty() {
            problems = manifest.uncovered();
        }
        if problems.is_empty() { Ok(manifest) } else { Err(problems.join("; ")) }
    }

    /// The tensors that the parts do not hold exactly once, each with a description of the problem. Takes time in
    /// proportion to the number of runs of elements.
    pub fn uncovered(&self) -> Vec<String> {
        let mut pieces: BTreeMap<&str, Vec<&Piece>> =
            self.tensors.keys().map(|name| (name.as_str(), vec![])).collect();
        for part in self.files.iter().flat_map(|file| &file.parts) {
            pieces.entry(&part.name).or_default().push(&part.piece);
        }
        let wrong = pieces.into_iter().filter_map(|(name, pieces)| {
            let total = self.tensors.get(name)?.iter().product();
            exactly_once(total, &pieces).err().map(|problem| format!("{name}: {problem}"))
        });
        wrong.collect()
    }

    /// Checks that every part belongs to a listed tensor and lies within its file.
    fn check(&self) -> Result<(), String> {
        for (name, shape) in &self.tensors {
            let count = shape.iter().try_fold(4u64, |count, &dim| count.checked_mul(dim.max(1) as u64));
            count.ok_or_else(|| format!("tensor {name} cannot have shape {shape:?}"))?;
        }
        for file in &self.files {
            if file.file.contains(['/', '\\']) || !file.file.ends_with(".safetensors") {
                return Err(format!("{:?} is not the name of a checkpoint's file", file.file));
            }
            for part in &file.parts {
                let (name, piece) = (&part.name, &part.piece);
                let shape = self.tensors.get(name).ok_or_else(|| format!("tensor {name} has no shape"))?;
                if !piece.is_valid() || !same_tensor(shape, &piece.dims) {
                    return Err(format!(
                        "a part of {name} in {} does not fit its shape {shape:?}",
                        file.file
                    ));
                }
                if part.offset.checked_add(part.bytes()).is_none_or(|end| end > file.bytes) {
                    return Err(format!("a part of {name} lies outside {}", file.file));
                }
            }
        }
        Ok(())
    }

    /// The bytes of `manifest.json`.
    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let manifest = serde_json::value::to_raw_value(self)?;
        let checksum = crc32fast::hash(manifest.get().as_bytes());
        serde_json::to_vec(&Envelope { format: FORMAT.into(), version: VERSION, checksum, manifest })
    }

    /// Reads the manifest of the checkpoint in `folder`.
    ///
    /// # Errors
    /// There is no manifest (the save was not completed), or it is damaged, not Regatta's, or of another version.
    pub(super) fn read(location: &Location, folder: &str) -> Result<Self> {
        let name = format!("{folder}/{MANIFEST}");
        let path = location.show(&name);
        let wrong = |problem: String| Error::checkpoint(&path, problem);
        let bytes = location.get(&name).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if is_version_1(location, folder) => wrong(
                "does not exist, because this checkpoint has format version 1: train again, or resume it with \
                       the Regatta that wrote it"
                    .into(),
            ),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => wrong(
                "does not exist: the checkpoint is missing or was not completed; use another one".into(),
            ),
            _ => Error::io("read", &path)(error),
        })?;
        Self::parse(&bytes).map_err(wrong)
    }

    /// Parses `bytes` and checks the manifest as far as is possible without its files.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let malformed = |error: serde_json::Error| {
            format!("is truncated or not a manifest of Regatta ({error}); use another checkpoint")
        };
        let kind: Kind = serde_json::from_slice(bytes).map_err(malformed)?;
        if kind.format != FORMAT {
            return Err("was not written by Regatta; use another checkpoint".into());
        }
        if kind.version != VERSION {
            return Err(format!("has format version {}, but this Regatta reads {VERSION}", kind.version));
        }
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(malformed)?;
        let text = envelope.manifest.get();
        if crc32fast::hash(text.as_bytes()) != envelope.checksum {
            return Err("does not match its checksum: it is damaged; use another checkpoint".into());
        }
        // The checksum matches, so the manifest is as it was written.
        let unknown =
            |error: serde_json::Error| format!("is intact, but this program cannot use it: {error}");
        let manifest: Self = serde_json::from_str(text).map_err(unknown)?;
        let checked = manifest.check().and_then(|()| manifest.plausible());
        checked.map_err(|problem| format!("{problem}; use another checkpoint"))?;
        Ok(manifest)
    }
}

/// Whether `folder` is a checkpoint of format version 1.
fn is_version_1(location: &Location, folder: &str) -> bool {
    matches!(location.size(&format!("{folder}/state.json")), Ok(Some(_)))
}
