//! The cache of prepared text: its folders, their content, and their removal.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Version of the preparation, with which the settings begin. Increases when the same settings give another result.
pub(crate) const PREPARED: u32 = 3;
/// The files in a complete folder: training tokens, held-out tokens, tokenizer.
pub(crate) const FILES: [&str; 3] = ["train.tok", "val.tok", "tokenizer.json"];
/// The file that is written last and makes a folder complete.
pub(crate) const META: &str = "meta.json";

/// The content of `meta.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Meta {
    /// Everything on which the result depends.
    pub settings: String,
    /// The source of the text.
    pub source: String,
    /// How it was prepared, without the content of files.
    pub variant: String,
    pub train_tokens: usize,
    pub val_tokens: usize,
    pub vocab: usize,
    /// Warnings for the user about this data, which are repeated whenever it is used.
    pub warnings: Vec<String>,
}

/// A folder of the cache.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The folder.
    pub folder: PathBuf,
    /// The source of its text; empty if unknown.
    pub source: String,
    /// Numbers of training tokens and of held-out tokens; none if the folder is incomplete.
    pub tokens: Option<[usize; 2]>,
    /// Size of its files in bytes.
    pub bytes: u64,
    /// When it was last used or created.
    pub used: SystemTime,
    /// Whether a process is preparing it now.
    pub busy: bool,
    /// Whether its source was prepared in the same way again later, or this version of Regatta cannot use it.
    pub stale: bool,
}

fn meta(folder: &Path) -> Option<Meta> {
    let meta: Meta = serde_json::from_slice(&fs::read(folder.join(META)).ok()?).ok()?;
    FILES.iter().all(|name| folder.join(name).is_file()).then_some(meta)
}

/// The metadata of `folder`, if it is complete and was prepared with these `settings`.
pub(crate) fn find(folder: &Path, settings: &str) -> Option<Meta> {
    meta(folder).filter(|meta| meta.settings == settings)
}

/// Records that `folder` is used now.
pub(crate) fn used(folder: &Path) {
    // A cache that cannot be written can still be used.
    let _ = File::options()
        .append(true)
        .open(folder.join(META))
        .and_then(|file| file.set_modified(SystemTime::now()));
}

/// Folders that were prepared from sources of this `name`.
pub(crate) fn named(cache: &Path, name: &str) -> Vec<PathBuf> {
    let of_name = |path: &PathBuf| path.file_name().and_then(|file| split(file.to_str()?)) == Some(name);
    folders(cache).into_iter().filter(of_name).collect()
}

/// The name in `NAME-HASH`.
fn split(folder: &str) -> Option<&str> {
    let (name, hash) = folder.rsplit_once('-')?;
    let hex = hash.len() == 12 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex.then_some(name)
}

/// The folders of `cache` that have the name and the lock of prepared text.
fn folders(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    let ours = |path: &PathBuf| {
        let named = path.file_name().and_then(|name| split(name.to_str()?)).is_some();
        named && path.join("lock").is_file() && !path.is_symlink()
    };
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(ours).collect();
    folders.sort();
    folders
}

/// Removes temporary files of processes that have ended.
pub(crate) fn remove_temporary(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "tmp") {
            // A file that stays costs only space.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// All folders of `cache`, the last used one at the end. Empty if the cache does not exist.
///
/// # Errors
/// The cache exists and cannot be read.
pub fn list(cache: &Path) -> Result<Vec<Prepared>> {
    if cache.exists() {
        fs::read_dir(cache).map_err(Error::io("read the folder", cache))?;
    }
    let mut all: Vec<(Prepared, String)> = folders(cache).iter().map(|folder| describe(folder)).collect();
    all.sort_by_key(|(prepared, _)| prepared.used);
    // Of the folders of the same source and the same preparation, only the last used one is current.
    let mut seen = HashSet::new();
    for (prepared, variant) in all.iter_mut().rev().filter(|(prepared, _)| prepared.tokens.is_some()) {
        let newest = seen.insert((prepared.source.clone(), variant.clone()));
        prepared.stale |= !newest;
    }
    Ok(all.into_iter().map(|(prepared, _)| prepared).collect())
}

/// A folder, and how it was prepared.
fn describe(folder: &Path) -> (Prepared, String) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let metas: Vec<_> = files.filter_map(|entry| entry.metadata().ok()).collect();
    let times = metas.iter().filter_map(|meta| meta.modified().ok());
    let used = times.max().unwrap_or(SystemTime::UNIX_EPOCH);
    let meta = meta(folder);
    let locked = || {
        let lock = File::open(folder.join("lock"));
        lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)))
    };
    let complete = meta.is_some();
    let meta = meta.unwrap_or_default();
    let prepared = Prepared {
        folder: folder.into(),
        busy: !complete && locked(),
        stale: complete && !meta.settings.starts_with(&format!("{PREPARED} ")),
        tokens: complete.then_some([meta.train_tokens, meta.val_tokens]),
        source: meta.source,
        bytes: metas.iter().map(fs::Metadata::len).sum(),
        used,
    };
    (prepared, meta.variant)
}

/// Removes a folder of the cache. Runs that use it continue, because they have its files open.
///
/// # Errors
/// A process is preparing the folder, or it cannot be removed.
pub fn remove(prepared: &Prepared) -> Result<()> {
    let folder = &prepared.folder;
    if describe(folder).0.busy {
        return Err(Error::data(folder, "is being prepared now, and is not removed"));
    }
    // This file first: without it no process uses the folder.
    let _ = fs::remove_file(folder.join(META));
    fs::remove_dir_all(folder).map_err(Error::io("remove", folder))
}
