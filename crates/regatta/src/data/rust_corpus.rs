//! Text that every machine with a build of Regatta has: the Rust sources of the crates that cargo has downloaded.

use super::hash::hash;
use super::text::Texts;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the longest file that is used; longer ones are mostly generated.
const LONGEST_FILE: u64 = 64 << 10;
/// Bytes of the longest line in a file that is used; files with longer ones are mostly generated.
const LONGEST_LINE: usize = 300;

/// Where cargo keeps the sources of downloaded crates.
pub fn registry() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .filter(|home| !home.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    Some(home?.join("registry").join("src"))
}

/// Reads up to `max_bytes` of Rust files below `registry` (see [`registry`]), without duplicates, and splits them by
/// file. Files are chosen by a hash of their path within the registry, so the choice depends only on the crates.
///
/// # Errors
/// There is no such folder, or it has fewer than two Rust files within `max_bytes`.
pub fn read(registry: &Path, max_bytes: usize, val_fraction: f64) -> Result<Texts> {
    let mut paths = vec![];
    for index in folders(registry) {
        // Bindings (`-sys` crates) are generated.
        let handwritten =
            |path: &PathBuf| !path.file_name().is_some_and(|name| name.to_string_lossy().contains("-sys-"));
        for package in folders(&index).into_iter().filter(handwritten) {
            walk(&package, &index, &mut paths);
        }
    }
    paths.sort();
    paths.dedup_by(|a, b| a.0 == b.0);
    paths.sort_by_cached_key(|(name, _)| hash(name.as_bytes()));
    let (mut chosen, mut seen, mut bytes) = (vec![], HashSet::new(), 0);
    let mut full = false;
    for (name, path) in paths {
        // A file that has vanished or is not UTF-8 is skipped.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if text.is_empty()
            || text.lines().any(|line| line.len() > LONGEST_LINE)
            || !seen.insert(hash(text.as_bytes()))
        {
            continue;
        }
        // The first file that does not fit ends the search: to go on would favour small files.
        full = bytes + text.len() > max_bytes;
        if full {
            break;
        }
        bytes += text.len();
        chosen.push((name, text));
    }
    if full && chosen.len() < 2 {
        let problem = format!("gives fewer than two Rust files within {max_bytes} bytes: raise data.max_mib");
        return Err(Error::data(registry, problem));
    }
    if chosen.len() < 2 {
        return Err(Error::data(
            registry,
            "has no Rust sources of downloaded crates; run `cargo fetch` first",
        ));
    }
    chosen.sort();
    Ok(Texts::split(chosen.into_iter().map(|(_, text)| text).collect(), val_fraction))
}

/// A hash of the names and versions of the crates in `registry`.
pub fn fingerprint(registry: &Path) -> u64 {
    let packages = folders(registry).into_iter().flat_map(|index| folders(&index));
    let names = packages.filter_map(|package| Some(package.file_name()?.to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect();
    names.sort();
    names.dedup();
    hash(names.join("/").as_bytes())
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

/// Collects Rust files below `folder` with their path relative to `base`.
fn walk(folder: &Path, base: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&path, base, found),
            Ok(kind) if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") => {
                let short = entry.metadata().is_ok_and(|meta| meta.len() <= LONGEST_FILE);
                if let (true, Ok(name)) = (short, path.strip_prefix(base)) {
                    // The same separator everywhere, because files are chosen by the hash of this name.
                    let parts: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
                    found.push((parts.join("/"), path.clone()));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_by_content_of_the_registry_alone() {
        let folder = tempfile::tempdir().unwrap();
        for index in ["index-a", "index-b"] {
            for package in 0..10 {
                let src = folder.path().join(index).join(format!("crate-{package}")).join("src");
                fs::create_dir_all(&src).unwrap();
                fs::write(src.join("lib.rs"), format!("fn f{package}() {{}}\n").repeat(20)).unwrap();
                fs::write(src.join("long.rs"), "x".repeat(5000)).unwrap();
                fs::write(src.join("note.txt"), "no rust").unwrap();
            }
        }
        let texts = read(folder.path(), 1 << 20, 0.2).unwrap();
        assert_eq!(texts.train.len() + texts.val.len(), 10);
        assert!(!texts.val.is_empty());
        assert_eq!(texts, read(&folder.path().join(".").clone(), 1 << 20, 0.2).unwrap());
        let few = read(folder.path(), 600, 0.2).unwrap();
        assert!(few.train.len() + few.val.len() < 5);
        assert!(few.train.iter().chain(&few.val).map(String::len).sum::<usize>() <= 600);
        assert!(read(folder.path(), 10, 0.2).unwrap_err().to_string().contains("data.max_mib"));
        assert!(read(&folder.path().join("none"), 1, 0.1).unwrap_err().to_string().contains("cargo fetch"));
    }
}
