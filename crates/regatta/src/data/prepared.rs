//! The cache of prepared text: its folders, what is in them, and how to remove them.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Grows when the same settings would be prepared differently; the settings begin with it.
pub(crate) const PREPARED: u32 = 3;
/// What is in a folder that is whole.
pub(crate) const FILES: [&str; 3] = ["train.tok", "val.tok", "tokenizer.json"];
/// What says that a folder is whole.
pub(crate) const META: &str = "meta.json";

/// `meta.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Meta {
    /// All that the result depends on.
    pub settings: String,
    /// Where the text came from.
    pub source: String,
    /// How it was prepared, whatever the content of files.
    pub variant: String,
    pub train_tokens: usize,
    pub val_tokens: usize,
    pub vocab: usize,
    /// What the user should know of this data, whenever it is used.
    pub warnings: Vec<String>,
}

/// A folder of the cache.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The folder.
    pub folder: PathBuf,
    /// Where its text came from; empty where that is not known.
    pub source: String,
    /// Tokens to learn from and held out; none where the folder is not whole.
    pub tokens: Option<[usize; 2]>,
    /// Bytes of its files.
    pub bytes: u64,
    /// When it was last used, or made.
    pub used: SystemTime,
    /// Whether a process is preparing it now.
    pub busy: bool,
    /// Whether its source was prepared again in the same way since, or this version of Regatta cannot use it.
    pub stale: bool,
}

fn meta(folder: &Path) -> Option<Meta> {
    let meta: Meta = serde_json::from_slice(&fs::read(folder.join(META)).ok()?).ok()?;
    FILES.iter().all(|name| folder.join(name).is_file()).then_some(meta)
}

/// What `folder` holds, if it is whole and was made with these `settings`.
pub(crate) fn find(folder: &Path, settings: &str) -> Option<Meta> {
    meta(folder).filter(|meta| meta.settings == settings)
}

/// Notes that `folder` is used now.
pub(crate) fn used(folder: &Path) {
    // A cache that cannot be written can be used all the same.
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

/// Removes temporary files that nobody writes any more.
pub(crate) fn remove_temporary(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "tmp") {
            // Best effort: they only take space.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// All folders of `cache`, the one that was used last at the end.
///
/// # Errors
/// A cache that is there and cannot be read.
pub fn list(cache: &Path) -> Result<Vec<Prepared>> {
    if cache.exists() {
        fs::read_dir(cache).map_err(Error::io("read the folder", cache))?;
    }
    let mut all: Vec<(Prepared, String)> = folders(cache).iter().map(|folder| describe(folder)).collect();
    all.sort_by_key(|(prepared, _)| prepared.used);
    // Of those that were made of the same source in the same way, the last one is of its present content.
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
    let whole = meta.is_some();
    let meta = meta.unwrap_or_default();
    let prepared = Prepared {
        folder: folder.into(),
        busy: !whole && locked(),
        stale: whole && !meta.settings.starts_with(&format!("{PREPARED} ")),
        tokens: whole.then_some([meta.train_tokens, meta.val_tokens]),
        source: meta.source,
        bytes: metas.iter().map(fs::Metadata::len).sum(),
        used,
    };
    (prepared, meta.variant)
}

/// Removes a folder of the cache. Runs that use it go on, since they have its files open.
///
/// # Errors
/// A folder that a process is preparing, or that cannot be removed.
pub fn remove(prepared: &Prepared) -> Result<()> {
    let folder = &prepared.folder;
    if describe(folder).0.busy {
        return Err(Error::data(folder, "is being prepared now, and is not removed"));
    }
    // First what says that it is whole, so that nobody takes what is left for it.
    let _ = fs::remove_file(folder.join(META));
    fs::remove_dir_all(folder).map_err(Error::io("remove", folder))
}
