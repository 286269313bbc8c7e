//! Splits text into a training part and a held-out part.

use super::hash::hash;
use super::source::Read;
use std::collections::HashSet;
use std::path::PathBuf;

/// Training texts and held-out texts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Texts {
    /// Training texts.
    pub train: Vec<String>,
    /// Held-out texts.
    pub val: Vec<String>,
    /// Files that were skipped because they are not text or cannot be read, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Texts {
    /// Splits the texts of a source: a single text is cut, several are split by file.
    pub(crate) fn of(read: Read, val_fraction: f64) -> Self {
        let Read { mut texts, skipped, .. } = read;
        if texts.len() == 1 {
            let mut train = texts.remove(0);
            let cut = boundary(&train, (train.len() as f64 * (1.0 - val_fraction)) as usize);
            // The larger part is not copied.
            let val = train.split_off(cut);
            return Self { train: vec![train], val: vec![val], skipped };
        }
        Self { skipped, ..Self::split(texts, val_fraction) }
    }

    /// Holds out whole `files`, chosen by a hash of their content, until they make up `val_fraction` of the text. At
    /// least one file is left for training.
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

/// The first `len` bytes of `text`, or fewer so that no character is cut; none if that is empty.
pub fn prefix(text: &str, len: usize) -> Option<&str> {
    Some(&text[..boundary(text, len)]).filter(|text| !text.is_empty())
}

/// The last character boundary at or before `at`.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::Source;
    use crate::error::Result;
    use std::fs;
    use std::path::Path;

    fn read(path: &Path, val_fraction: f64) -> Result<Texts> {
        Ok(Texts::of(Source::find(path)?.read()?, val_fraction))
    }

    #[test]
    fn a_file_is_cut_and_a_folder_is_split_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "0123456789ä".repeat(10)).unwrap();
        let texts = read(&path, 0.1).unwrap();
        assert_eq!(texts.train[0].len() + texts.val[0].len(), 120);
        assert!((texts.val[0].len() as i64 - 12).abs() < 2);
        for n in 0..20 {
            fs::write(folder.path().join(format!("{n}.txt")), format!("text number {n}")).unwrap();
        }
        fs::write(folder.path().join("copy.txt"), "text number 3").unwrap();
        fs::write(folder.path().join("binary"), [255, 255, 0]).unwrap();
        let texts = read(folder.path(), 0.1).unwrap();
        assert_eq!(texts.train.len() + texts.val.len(), 21);
        assert!(!texts.val.is_empty());
        let skipped: Vec<_> = texts.skipped.iter().map(|(path, _)| path.file_name().unwrap()).collect();
        assert_eq!(skipped, ["binary"]);
        assert_eq!(texts, read(folder.path(), 0.1).unwrap());
        assert_eq!(Texts::split(vec![], 0.5), Texts::default());
        assert_eq!(Texts::split(vec!["a".into(), "b".into()], 1.0).train.len(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_to_files_are_followed_and_links_to_folders_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        fs::create_dir(&texts).unwrap();
        fs::write(folder.path().join("real.txt"), "linked text").unwrap();
        std::os::unix::fs::symlink(folder.path().join("real.txt"), texts.join("a.txt")).unwrap();
        std::os::unix::fs::symlink(&texts, texts.join("circle")).unwrap();
        std::os::unix::fs::symlink("nowhere", texts.join("dangling")).unwrap();
        assert_eq!(read(&texts, 0.0).unwrap().train, ["linked text"]);
    }

    #[test]
    fn files_without_text_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let problem = |path: &Path| read(path, 0.1).unwrap_err().to_string();
        assert!(problem(folder.path()).contains("has no text"));
        assert!(problem(&folder.path().join("none")).contains("data.path"));
        fs::write(folder.path().join("b"), [0xff, 0xfe, 0xff]).unwrap();
        assert!(problem(&folder.path().join("b")).contains("odd number"));
        assert!(problem(folder.path()).contains("has no text: ") && problem(folder.path()).contains("/b is"));
    }
}
