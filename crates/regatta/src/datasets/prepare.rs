//! Prepares text once: encodes it and keeps the tokens in the cache, in a folder named after everything on which the
//! result depends.
//!
//! The result depends on the content of the text and of the tokenizer's files, and on the settings. Sizes and times of
//! files do not identify their content: copies, archives and container layers may keep both while the content changes.

use crate::config::{DataConfig, DataKind, TokenizerKind};
use crate::data::digests::Digests;
use crate::data::hash::hash;
use crate::data::notice::{Listener, Notice};
use crate::data::prepared::{self, FILES, META, Meta, PREPARED};
use crate::data::rust_corpus;
use crate::data::source::Source;
use crate::data::text::{self, Texts};
use crate::data::tokenizer::Tokenizer;
use crate::data::tokens::TokenWriter;
use crate::error::{Error, Result};
use crate::files::{self, Locked, write_atomically};
use rayon::prelude::*;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Bytes of text that one task encodes.
const PIECE: usize = 1 << 18;
/// Number of pieces that are encoded before their tokens are written, which limits the memory.
const PIECES_AT_ONCE: usize = 32;
/// Bytes of text on which a tokenizer is trained: enough to learn the frequent words.
const TRAINED_ON: usize = 4 << 20;
/// Skipped files that a warning lists; the others are counted.
const LISTED_FILES: usize = 5;
/// Hexadecimal digits of the hash in a folder's name are those of its upper 48 bits.
const DROPPED_HASH_BITS: u32 = 16;

/// The source of text.
enum Origin {
    Files(Source, u128),
    Crates(PathBuf),
}

/// The folder with `train.tok`, `val.tok` and `tokenizer.json` for `config`. Prepares it if it does not exist.
pub(super) fn prepare(config: &DataConfig, listener: &mut Listener<'_>) -> Result<PathBuf> {
    let name = match (config.kind, &config.path) {
        (DataKind::Rust, _) => "rust".to_string(),
        (_, Some(path)) => path.file_stem().map_or("text".into(), |stem| stem.to_string_lossy().into_owned()),
        (_, None) => "text".into(),
    };
    let (origin, content, shown) = origin(config)?;
    let settings = format!("{PREPARED} {content} {} {}", tokenizer_settings(config)?, config.val_fraction);
    let folder = config.cache.join(format!("{name}-{:012x}", hash(settings.as_bytes()) >> DROPPED_HASH_BITS));
    if let Some(meta) = prepared::find(&folder, &settings) {
        meta.warnings.iter().for_each(|warning| listener(Notice::Warning(warning)));
        prepared::used(&folder);
        return Ok(folder);
    }
    let others = prepared::named(&config.cache, &name);
    let lock = lock(&folder, listener)?;
    // Another process may have prepared it while this one waited for the lock.
    if let Some(meta) = prepared::find(&folder, &settings) {
        meta.warnings.iter().for_each(|warning| listener(Notice::Warning(warning)));
        return Ok(folder);
    }
    if lock.is_some() {
        // A process that was killed may have left temporary files.
        prepared::remove_temporary(&folder);
    }
    listener(Notice::Preparing {
        folder: &folder,
        others: others.iter().filter(|other| **other != folder).count(),
    });
    let (tokenizer, file) = (config.tokenizer, config.tokenizer_path.as_deref().unwrap_or(Path::new("")));
    let variant =
        format!("{tokenizer:?} {} {file:?} {} {}", config.vocab_size, config.val_fraction, config.max_mib);
    let meta = Meta { settings, source: shown, variant, ..Meta::default() };
    write(config, &origin, &folder, meta, listener)?;
    Ok(folder)
}

/// The source of the text, a string that identifies its content, and its name for users.
fn origin(config: &DataConfig) -> Result<(Origin, String, String)> {
    if let (DataKind::Text, Some(path)) = (config.kind, &config.path) {
        let source = Source::find(path)?;
        let digest = Digests::of(&config.cache).digest(path, &source)?;
        let shown = fs::canonicalize(path).map_err(Error::io("find", path))?.display().to_string();
        return Ok((Origin::Files(source, digest), format!("text {digest:032x}"), shown));
    }
    let registry = rust_corpus::registry().ok_or_else(|| {
        Error::data("CARGO_HOME", "is not set and there is no home folder: cannot find the crates' sources")
    })?;
    // A published version of a crate never changes, so names and versions identify the content.
    let content = format!("crates {:x} {}", rust_corpus::fingerprint(&registry), config.max_mib);
    let shown = registry.display().to_string();
    Ok((Origin::Crates(registry), content, shown))
}

/// The tokenizer's settings, and the digests of its files, on which the tokens depend.
fn tokenizer_settings(config: &DataConfig) -> Result<String> {
    match (config.tokenizer, &config.tokenizer_path) {
        (TokenizerKind::Chars, _) => Ok("chars".into()),
        (TokenizerKind::Bytes, _) => Ok("bytes".into()),
        (TokenizerKind::Bpe, None) => Ok(format!("bpe {}", config.vocab_size)),
        (TokenizerKind::Bpe, Some(path)) => {
            let mut digests = vec![];
            for file in Tokenizer::files(path)? {
                let bytes = fs::read(&file).map_err(Error::io("read the tokenizer", &file))?;
                digests.push(format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes)));
            }
            Ok(format!("bpe of {}", digests.join(" ")))
        }
    }
}

/// Locks the folder; returns none if the file system has no locks. Then several processes may prepare the same data at
/// once, which wastes time but is harmless: each writes temporary files and renames them when they are complete, and
/// all have the same content.
fn lock(folder: &Path, listener: &mut Listener<'_>) -> Result<Option<File>> {
    let path = folder.join("lock");
    let mut reported = false;
    let reason = loop {
        // The folder may have been removed while this process waited.
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        match files::try_lock(&path).map_err(Error::io("create", &path))? {
            Locked::Ours(lock) => return Ok(Some(lock)),
            Locked::Unavailable(reason) => break reason,
            Locked::Taken => {}
        }
        if !reported {
            listener(Notice::Waiting { folder });
            reported = true;
        }
        // Waits until the other process has finished or was ended.
        if let Err(reason) = File::open(&path).and_then(|file| file.lock())
            && reason.kind() != ErrorKind::NotFound
        {
            break reason;
        }
    };
    let warning = format!(
        "{} cannot be locked ({reason}): processes that start together may each prepare the same data, which is \
         harmless; set data.cache to a folder on a local disk to avoid it",
        path.display()
    );
    listener(Notice::Warning(&warning));
    Ok(None)
}

/// Reads the text, encodes it, and writes all files of `folder`.
fn write(
    config: &DataConfig,
    origin: &Origin,
    folder: &Path,
    mut meta: Meta,
    listener: &mut Listener<'_>,
) -> Result<()> {
    let texts = match origin {
        Origin::Files(source, digest) => {
            let read = source.read()?;
            if read.digest != *digest {
                let path = config.path.as_deref().unwrap_or(Path::new("data.path"));
                let problem = "was changed while it was read; start again when no program writes to it";
                return Err(Error::data(path, problem));
            }
            meta.warnings = warnings(source, &read.skipped);
            Texts::of(read, config.val_fraction)
        }
        Origin::Crates(registry) => {
            rust_corpus::read(registry, config.max_mib.saturating_mul(1 << 20), config.val_fraction)?
        }
    };
    meta.warnings.iter().for_each(|warning| listener(Notice::Warning(warning)));
    let all = || texts.train.iter().chain(&texts.val).map(String::as_str);
    let tokenizer = match (config.tokenizer, &config.tokenizer_path) {
        (TokenizerKind::Bpe, Some(path)) => Tokenizer::load(path)?,
        (TokenizerKind::Bpe, None) => {
            let some: Vec<&str> = sample(&texts.train, TRAINED_ON);
            let of = config.vocab_size as u64;
            Tokenizer::train_bpe_with(some.into_iter(), config.vocab_size, &mut |done| {
                listener(Notice::Progress { step: "training the tokenizer", done: done as u64, of });
            })?
        }
        (TokenizerKind::Chars, _) => Tokenizer::chars(all()),
        (TokenizerKind::Bytes, _) => Tokenizer::bytes(),
    };
    meta.vocab = tokenizer.vocab_size();
    tokenizer.save(&folder.join(FILES[2]))?;
    let of: usize = all().map(str::len).sum();
    let mut done = 0;
    let mut encode = |name: &str, texts: &[String]| -> Result<usize> {
        let mut writer = TokenWriter::create(&folder.join(name), tokenizer.vocab_size())?;
        for (index, text) in texts.iter().enumerate() {
            // Documents are separated by the end-of-text token, if the tokenizer has one.
            if let Some(end) = tokenizer.end_of_text().filter(|_| index > 0) {
                writer.push(&[end])?;
            }
            let mut pieces = tokenizer.pieces(text, PIECE);
            loop {
                let some: Vec<&str> = pieces.by_ref().take(PIECES_AT_ONCE).collect();
                if some.is_empty() {
                    break;
                }
                let encoded: Vec<Vec<u32>> =
                    some.par_iter().map(|piece| tokenizer.encode(piece)).collect::<Result<_>>()?;
                encoded.iter().try_for_each(|tokens| writer.push(tokens))?;
                done += some.iter().map(|piece| piece.len()).sum::<usize>();
                listener(Notice::Progress { step: "encoding", done: done as u64, of: of as u64 });
            }
        }
        writer.finish()
    };
    meta.train_tokens = encode(FILES[0], &texts.train)?;
    meta.val_tokens = encode(FILES[1], &texts.val)?;
    // Written last, because it makes the folder complete.
    let json = serde_json::to_vec(&meta).map_err(|error| Error::data(folder, error.to_string()))?;
    write_atomically(&folder.join(META), &json)
}

/// Warnings for the user about a source of text.
fn warnings(source: &Source, skipped: &[(PathBuf, String)]) -> Vec<String> {
    let mut warnings = vec![];
    if !skipped.is_empty() {
        let first = skipped
            .iter()
            .take(LISTED_FILES)
            .map(|(path, problem)| format!("\n  {} {problem}", path.display()));
        let first: String = first.collect();
        let more = match skipped.len().saturating_sub(LISTED_FILES) {
            0 => String::new(),
            more => format!("\n  and {more} more"),
        };
        let (count, files) = (skipped.len(), source.files().len());
        warnings.push(format!("{count} of {files} files are skipped:{first}{more}"));
    }
    // Files of tables and records have much syntax that a model should usually not learn.
    let marked = |path: &PathBuf| {
        let extension = path.extension()?.to_string_lossy().to_ascii_lowercase();
        ["jsonl", "ndjson", "json", "csv", "tsv"].contains(&extension.as_str()).then_some(extension)
    };
    let found: Vec<(&PathBuf, String)> =
        source.files().iter().filter_map(|path| Some((path, marked(path)?))).collect();
    if let Some((path, extension)) = found.first() {
        let what = if extension.ends_with("sv") {
            "its separators and quotes"
        } else {
            "its braces, quotes and field names"
        };
        let more =
            if found.len() > 1 { format!(" and {} more files", found.len() - 1) } else { String::new() };
        warnings.push(format!(
            "{}{more}: read as plain text, so the model learns {what} too; to avoid that, write only the text into a \
             .txt file",
            path.display()
        ));
    }
    warnings
}

/// A sample of about `bytes` bytes, spread evenly over `texts`.
fn sample(texts: &[String], bytes: usize) -> Vec<&str> {
    let total: usize = texts.iter().map(String::len).sum();
    let every = (total / bytes.max(1)).max(1);
    if texts.len() < 2 * every {
        let each = bytes / texts.len().max(1);
        return texts.iter().filter_map(|text| text::prefix(text, each)).collect();
    }
    texts.iter().step_by(every).map(String::as_str).collect()
}
