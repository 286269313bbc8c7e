//! Text files and folders, cut into a part to learn from and a part held out.

use super::source::{Read, Source};
use crate::error::Result;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Texts by purpose.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Texts {
    /// To learn from.
    pub train: Vec<String>,
    /// Held out.
    pub val: Vec<String>,
    /// Files that were left out because they are no text or cannot be read, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Texts {
    /// Reads `path`, a file (cut at `1 - val_fraction`) or a folder (files are held out whole, at least one where
    /// there are several and `val_fraction` is above 0). Files are taken in the order of
    /// their paths; links to files are followed, links to folders are not. Hidden files and copies are left out; so
    /// is what is no text, and listed. Text is UTF-8, or UTF-16 with a byte-order mark; the mark is no part of it.
    ///
    /// # Errors
    /// A path that is missing or unreadable, or no text there.
    pub fn read(path: &Path, val_fraction: f64) -> Result<Self> {
        Ok(Self::of(Source::find(path)?.read()?, val_fraction))
    }

    /// The texts that were read from a source.
    pub(crate) fn of(read: Read, val_fraction: f64) -> Self {
        let Read { mut texts, skipped, .. } = read;
        if texts.len() == 1 {
            let mut train = texts.remove(0);
            let cut = boundary(&train, (train.len() as f64 * (1.0 - val_fraction)) as usize);
            // The larger part stays where it is.
            let val = train.split_off(cut);
            return Self { train: vec![train], val: vec![val], skipped };
        }
        Self { skipped, ..Self::split(texts, val_fraction) }
    }

    /// Holds whole `files` out until they make up `val_fraction` of the text, chosen by a hash of their content. One
    /// at least is left to learn from.
    pub fn split(files: Vec<String>, val_fraction: f64) -> Self {
        let total: usize = files.iter().map(String::len).sum();
        let mut order: Vec<usize> = (0..files.len()).collect();
        order.sort_by_key(|&i| (hash(files[i].as_bytes()), i));
        let wanted = (total as f64 * val_fraction) as usize;
        let (mut held, mut bytes) = (HashSet::new(), 0);
        for &i in order.iter().take(files.len().saturating_sub(1)) {
            if bytes >= wanted {
                break;
            }
            bytes += files[i].len();
            held.insert(i);
        }
        let mut texts = Self::default();
        for (i, file) in files.into_iter().enumerate() {
            if held.contains(&i) { texts.val.push(file) } else { texts.train.push(file) }
        }
        texts
    }
}

/// The first `len` bytes of `text`, less where a character would be cut; nothing where that is empty.
pub fn prefix(text: &str, len: usize) -> Option<&str> {
    Some(&text[..boundary(text, len)]).filter(|text| !text.is_empty())
}

/// The last character boundary at or before `at`.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// 64-bit FNV-1a.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_is_cut_and_a_folder_is_split_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "0123456789ä".repeat(10)).unwrap();
        let texts = Texts::read(&path, 0.1).unwrap();
        assert_eq!(texts.train[0].len() + texts.val[0].len(), 120);
        assert!((texts.val[0].len() as i64 - 12).abs() < 2);
        for n in 0..20 {
            fs::write(folder.path().join(format!("{n}.txt")), format!("text number {n}")).unwrap();
        }
        fs::write(folder.path().join("copy.txt"), "text number 3").unwrap();
        fs::write(folder.path().join("binary"), [255, 255, 0]).unwrap();
        let texts = Texts::read(folder.path(), 0.1).unwrap();
        assert_eq!(texts.train.len() + texts.val.len(), 21);
        assert!(!texts.val.is_empty());
        let skipped: Vec<_> = texts.skipped.iter().map(|(path, _)| path.file_name().unwrap()).collect();
        assert_eq!(skipped, ["binary"]);
        assert_eq!(texts, Texts::read(folder.path(), 0.1).unwrap());
        assert_eq!(Texts::split(vec![], 0.5), Texts::default());
        assert_eq!(Texts::split(vec!["a".into(), "b".into()], 1.0).train.len(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_to_files_are_followed_and_circles_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        fs::create_dir(&texts).unwrap();
        fs::write(folder.path().join("real.txt"), "linked text").unwrap();
        std::os::unix::fs::symlink(folder.path().join("real.txt"), texts.join("a.txt")).unwrap();
        std::os::unix::fs::symlink(&texts, texts.join("circle")).unwrap();
        std::os::unix::fs::symlink("nowhere", texts.join("dangling")).unwrap();
        assert_eq!(Texts::read(&texts, 0.0).unwrap().train, ["linked text"]);
    }

    #[test]
    fn what_is_no_text_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let problem = |path: &Path| Texts::read(path, 0.1).unwrap_err().to_string();
        assert!(problem(folder.path()).contains("holds no text"));
        assert!(problem(&folder.path().join("none")).contains("data.path"));
        fs::write(folder.path().join("b"), [0xff, 0xfe, 0xff]).unwrap();
        assert!(problem(&folder.path().join("b")).contains("odd number"));
        assert!(
            problem(folder.path()).contains("holds no text: ") && problem(folder.path()).contains("/b is")
        );
    }
}
