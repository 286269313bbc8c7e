//! Token files: a header, then every token in two or four bytes, read through a memory map.

use crate::error::{Error, Result};
use crate::random::Stream;
use memmap2::Mmap;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"rgttatok";
const VERSION: u32 = 1;
/// Bytes of the header: magic, version, bytes per token, vocabulary, count.
const HEADER: usize = 8 + 4 + 4 + 8 + 8;

/// A memory-mapped token file.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    wide: bool,
    vocab: usize,
    len: usize,
}

impl TokenFile {
    /// Writes `tokens` (all below `vocab`) to `path`, as [`TokenWriter`] does.
    ///
    /// # Errors
    /// A token is not in the vocabulary, or the file cannot be written. Then no file is left.
    #[cfg(test)]
    pub fn write(path: &Path, tokens: &[u32], vocab: usize) -> Result<()> {
        let mut writer = TokenWriter::create(path, vocab)?;
        writer.push(tokens)?;
        writer.finish().map(drop)
    }

    /// Maps the token file at `path`.
    ///
    /// # Errors
    /// The file is missing or truncated, or is not a token file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: token files are written under another name and renamed, never changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))?;
        let (wide, vocab, len) = parse_header(&map).map_err(|problem| Error::data(path, problem))?;
        Ok(Self { path: path.into(), map, wide, vocab, len })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A checksum of the content. Of a large file, it covers only pieces that are spread over it, so that it is fast.
    pub fn digest(&self) -> u32 {
        const PIECE: usize = 64 << 10;
        const PIECES: usize = 1024;
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.map[..HEADER]);
        let content = &self.map[HEADER..];
        if content.len() <= PIECE * PIECES {
            sum.update(content);
        } else {
            let distance = (content.len() - PIECE) / (PIECES - 1);
            (0..PIECES).for_each(|piece| sum.update(&content[piece * distance..][..PIECE]));
        }
        sum.finalize()
    }

    /// Appends the `len` tokens from `at` on to `out`. Panics if there are fewer.
    pub fn copy(&self, at: usize, len: usize, out: &mut Vec<i64>) {
        assert!(at <= self.len && len <= self.len - at, "{len} tokens from {at} on, of {}", self.len);
        let tokens = &self.map[HEADER..];
        if self.wide {
            let (words, _) = tokens[4 * at..4 * (at + len)].as_chunks();
            out.extend(words.iter().map(|word| i64::from(u32::from_le_bytes(*word))));
        } else {
            let (words, _) = tokens[2 * at..2 * (at + len)].as_chunks();
            out.extend(words.iter().map(|word| i64::from(u16::from_le_bytes(*word))));
        }
    }
}

/// Whether tokens have four bytes, the size of the vocabulary, the number of tokens.
pub(crate) fn parse_header(bytes: &[u8]) -> Result<(bool, usize, usize), String> {
    let foreign =
        || "is not a token file of this version; remove its folder to prepare the data again".to_string();
    let field = |at: usize, len: usize| bytes.get(at..at + len).ok_or_else(foreign);
    if bytes.get(..8) != Some(MAGIC) || field(8, 4)? != VERSION.to_le_bytes() {
        return Err(foreign());
    }
    let word =
        |at: usize| field(at, 8).map(|bytes| bytes.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b)));
    let wide = match field(12, 4)? {
        [2, 0, 0, 0] => false,
        [4, 0, 0, 0] => true,
        _ => return Err(foreign()),
    };
    let (vocab, len) = (word(16)? as usize, word(24)?);
    let wanted =
        len.checked_mul(if wide { 4 } else { 2 }).and_then(|wanted| wanted.checked_add(HEADER as u64));
    if wanted != Some(bytes.len() as u64) {
        let problem = format!(
            "is truncated: {} bytes for {len} tokens; remove its folder to prepare the data again",
            bytes.len()
        );
        return Err(problem);
    }
    Ok((wide, vocab, len as usize))
}

/// Writes a token file piece by piece, to a temporary file that is renamed at the end. If several write the same file
/// at once, the last one replaces the others. A writer that is dropped early removes its temporary file.
pub struct TokenWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    vocab: usize,
    count: u64,
}

impl TokenWriter {
    /// Begins the token file `path` for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path, vocab: usize) -> Result<Self> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let number = WRITES.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}.{number}.tmp", std::process::id()));
        let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
        let mut writer = Self { path: path.into(), temporary, file: BufWriter::new(file), vocab, count: 0 };
        // The count is not known yet.
        writer.write(Self::write_header)?;
        Ok(writer)
    }

    fn write_header(&mut self) -> std::io::Result<()> {
        self.file.write_all(MAGIC)?;
        self.file.write_all(&VERSION.to_le_bytes())?;
        self.file.write_all(&(if self.wide() { 4u32 } else { 2 }).to_le_bytes())?;
        self.file.write_all(&(self.vocab as u64).to_le_bytes())?;
        self.file.write_all(&self.count.to_le_bytes())
    }

    fn wide(&self) -> bool {
        self.vocab > 1 << 16
    }

    fn write(&mut self, write: impl FnOnce(&mut Self) -> std::io::Result<()>) -> Result<()> {
        write(self).map_err(|error| Error::io("write", &self.path)(error))
    }

    /// Appends `tokens`.
    ///
    /// # Errors
    /// A token is not in the vocabulary, or the file cannot be written.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab) {
            let problem = format!("cannot hold token {token} of a vocabulary of {}", self.vocab);
            return Err(Error::data(&self.path, problem));
        }
        self.count += tokens.len() as u64;
        let wide = self.wide();
        self.write(|writer| {
            tokens.iter().try_for_each(|&token| {
                if wide {
                    writer.file.write_all(&token.to_le_bytes())
                } else {
                    writer.file.write_all(&(token as u16).to_le_bytes())
                }
            })
        })
    }

    /// Completes the file and gives it its name. Returns the number of its tokens.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<usize> {
        self.write(|writer| {
            writer.file.seek(SeekFrom::Start(0))?;
            writer.write_header()?;
            writer.file.flush()?;
            writer.file.get_ref().sync_all()?;
            fs::rename(&writer.temporary, &writer.path)
        })?;
        Ok(self.count as usize)
    }
}

impl Drop for TokenWriter {
    fn drop(&mut self) {
        // Fails if the file was renamed, or else leaves a file that costs only space.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// A token file as samples for a language model: windows of `context` tokens, and for each token the next one.
#[derive(Debug)]
pub struct Windows {
    tokens: TokenFile,
    context: usize,
    /// Chooses where an epoch begins its first window; none: at the first token.
    phase: Option<Stream>,
}

impl Windows {
    /// Windows of `tokens`. With a `seed`, each epoch begins its windows at another offset.
    ///
    /// # Errors
    /// `context` is 0, or there are fewer than `context + 1` tokens.
    pub fn new(tokens: TokenFile, context: usize, seed: Option<u64>) -> Result<Self> {
        if context == 0 {
            return Err(Error::data(
                tokens.path(),
                "cannot be cut into windows of 0 tokens: set model.context",
            ));
        }
        if tokens.len() <= context {
            let problem = format!(
                "has {} tokens, but a window of {context} takes {}: lower model.context, give more text, or change \
                 data.val_fraction",
                tokens.len(),
                context + 1
            );
            return Err(Error::data(tokens.path(), problem));
        }
        Ok(Self { tokens, context, phase: seed.map(|seed| Stream::new(seed).named("phase")) })
    }

    /// The token file.
    pub fn tokens(&self) -> &TokenFile {
        &self.tokens
    }

    /// Windows in an epoch.
    pub fn len(&self) -> usize {
        let all = (self.tokens.len() - 1) / self.context;
        // After the largest offset one window less fits.
        if self.phase.is_some() { (all - 1).max(1) } else { all }
    }

    /// Checks `tokens` that were read from the file.
    ///
    /// # Errors
    /// A token is not in the vocabulary, so the file is damaged.
    pub(crate) fn check(&self, tokens: &[i64]) -> Result<()> {
        let vocab = self.tokens.vocab();
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(token) => {
                let problem = format!(
                    "is damaged: it has a token {token}, but its vocabulary has {vocab}; remove its folder to prepare the data \
                     again"
                );
                Err(Error::data(self.tokens.path(), problem))
            }
            None => Ok(()),
        }
    }

    /// Appends window `index` of `epoch` to `inputs`, and the token after each of its tokens to `targets`.
    pub fn fill(&self, epoch: u64, index: usize, inputs: &mut Vec<i64>, targets: &mut Vec<i64>) {
        let spare = self.tokens.len() - 1 - self.len() * self.context;
        let phase =
            self.phase.map_or(0, |stream| stream.bits(epoch) as usize % (spare.min(self.context) + 1));
        let at = index * self.context + phase;
        self.tokens.copy(at, self.context, inputs);
        self.tokens.copy(at + 1, self.context, targets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(tokens: &[u32], vocab: usize) -> (tempfile::TempDir, TokenFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.tok");
        TokenFile::write(&path, tokens, vocab).unwrap();
        let file = TokenFile::open(&path).unwrap();
        (folder, file)
    }

    proptest! {
        #[test]
        fn tokens_come_back(tokens in prop::collection::vec(0u32..70_000, 0..50), wide in any::<bool>()) {
            let vocab = if wide { 70_000 } else { 50_000 };
            let tokens: Vec<u32> = tokens.into_iter().map(|token| token % vocab as u32).collect();
            let (_folder, file) = file(&tokens, vocab);
            let mut out = vec![];
            file.copy(0, tokens.len(), &mut out);
            prop_assert_eq!(out, tokens.iter().map(|&t| i64::from(t)).collect::<Vec<_>>());
            prop_assert_eq!((file.len(), file.vocab()), (tokens.len(), vocab));
        }

        #[test]
        fn windows_stay_within_the_text(len in 9usize..200, context in 1usize..8, epoch in 0u64..50) {
            let (_folder, file) = file(&(0..len as u32).collect::<Vec<_>>(), len);
            let windows = Windows::new(file, context, Some(7)).unwrap();
            for index in 0..windows.len() {
                let (mut inputs, mut targets) = (vec![], vec![]);
                windows.fill(epoch, index, &mut inputs, &mut targets);
                prop_assert!(inputs.iter().zip(&targets).all(|(a, b)| a + 1 == *b) && inputs.len() == context);
            }
        }
    }

    #[test]
    fn what_cannot_be_held_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.tok");
        let error = TokenFile::write(&path, &[3, 70_000], 100).unwrap_err().to_string();
        assert!(error.contains("token 70000 of a vocabulary of 100"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        TokenFile::write(&path, &[3; 9], 100).unwrap();
        assert!(Windows::new(TokenFile::open(&path).unwrap(), 0, None).is_err());
    }

    #[test]
    fn the_last_of_several_writers_replaces_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.tok");
        std::thread::scope(|scope| {
            for n in 0..8u32 {
                let path = &path;
                scope.spawn(move || TokenFile::write(path, &vec![n; 5000 + n as usize], 10).unwrap());
            }
        });
        let file = TokenFile::open(&path).unwrap();
        let mut out = vec![];
        file.copy(0, file.len(), &mut out);
        assert!(out.iter().all(|&token| token == out[0]) && out.len() == 5000 + out[0] as usize);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn epochs_begin_at_other_offsets_only_with_a_seed() {
        let first = |seed, epoch| {
            let (_folder, file) = file(&(0..1000).collect::<Vec<_>>(), 1000);
            let (mut inputs, mut targets) = (vec![], vec![]);
            Windows::new(file, 50, seed).unwrap().fill(epoch, 0, &mut inputs, &mut targets);
            inputs[0]
        };
        let phases: std::collections::BTreeSet<i64> = (0..40).map(|epoch| first(Some(1), epoch)).collect();
        assert!(phases.len() > 10 && phases.iter().all(|phase| (0..=50).contains(phase)), "{phases:?}");
        assert_eq!(first(Some(1), 3), first(Some(1), 3));
        assert!((0..40).all(|epoch| first(None, epoch) == 0));
    }

    #[test]
    fn short_truncated_and_foreign_files_are_refused() {
        let (folder, short) = file(&[1; 40], 50);
        let error = Windows::new(short, 64, None).unwrap_err().to_string();
        assert!(error.contains("40 tokens") && error.contains("takes 65"), "{error}");
        let path = folder.path().join("t.tok");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        assert!(TokenFile::open(&path).unwrap_err().to_string().contains("truncated"));
        fs::write(&path, b"something else entirely, long enough for a header").unwrap();
        assert!(TokenFile::open(&path).unwrap_err().to_string().contains("not a token file"));
        fs::write(&path, b"").unwrap();
        assert!(TokenFile::open(&path).is_err());
    }
}
