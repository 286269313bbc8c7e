//! Serialises paths as text for manifests and summaries. A path that is not UTF-8 is converted with replacement
//! characters, so that a checkpoint can always be written.

use serde::Serializer;
use std::path::{Path, PathBuf};

pub(super) fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

pub(super) fn option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&path.to_string_lossy()),
        None => serializer.serialize_none(),
    }
}
