//! Text is prepared once: encoded, cut and kept in the cache, in a folder that is named after all that the result depends on.
//!
//! What it depends on is the content of the text and of the tokenizer's files, and the settings. Sizes and times of
//! files do not stand for their content: copies, archives and layers of images keep both while the content changes.

use super::config::{DataConfig, DataKind, TokenizerKind};
use crate::checkpoint::write_atomically;
use crate::data::digests::Digests;
use crate::data::notice::{Listener, Notice};
use crate::data::prepared::{self, FILES, META, Meta, PREPARED};
use crate::data::rust_corpus;
use crate::data::source::Source;
use crate::data::text::{self, Texts, hash};
use crate::data::tokenizer::Tokenizer;
use crate::data::tokens::TokenWriter;
use crate::error::{Error, Result};
use crate::files::{self, Locked};
use rayon::prelude::*;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Bytes of text that one task encodes.
const PIECE: usize = 1 << 18;
/// Pieces that are encoded at once, so that not all tokens are in memory before they are written.
const AT_ONCE: usize = 32;
/// Bytes of text that a tokenizer is trained on: enough to learn the frequent words from.
const LEARNED_FROM: usize = 4 << 20;

/// Where text comes from.
enum Origin {
    Files(Source, u128),
    Crates(PathBuf),
}

/// The folder with `train.tok`, `val.tok` and `tokenizer.json` for `config`, made where it is not there yet.
pub(super) fn prepare(config: &DataConfig, listener: &mut Listener<'_>) -> Result<PathBuf> {
    let name = match (config.kind, &config.path) {
        (DataKind::Rust, _) => "rust".to_string(),
        (_, Some(path)) => path.file_stem().map_or("text".into(), |stem| stem.to_string_lossy().into_owned()),
        (_, None) => "text".into(),
    };
    let (origin, content, shown) = origin(config)?;
    let settings = format!("{PREPARED} {content} {} {}", tokenizer_settings(config)?, config.val_fraction);
    let folder = config.cache.join(format!("{name}-{:012x}", hash(settings.as_bytes()) >> 16));
    if let Some(meta) = prepared::find(&folder, &settings) {
        meta.warnings.iter().for_each(|warning| listener(Notice::Warning(warning)));
        prepared::used(&folder);
        return Ok(folder);
    }
    let others = prepared::named(&config.cache, &name);
    let lock = lock(&folder, listener)?;
    // Another process may have been faster.
    if let Some(meta) = prepared::find(&folder, &settings) {
        meta.warnings.iter().for_each(|warning| listener(Notice::Warning(warning)));
        return Ok(folder);
    }
    if lock.is_some() {
        // What one left behind that was ended in the middle.
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
    make(config, &origin, &folder, meta, listener)?;
    Ok(folder)
}

/// Where the text comes from, what stands for its content, and how to name it to people.
fn origin(config: &DataConfig) -> Result<(Origin, String, String)> {
    if let (DataKind::Text, Some(path)) = (config.kind, &config.path) {
        let source = Source::find(path)?;
        let digest = Digests::of(&config.cache).digest(path, &source)?;
        let shown = fs::canonicalize(path).map_err(Error::io("find", path))?.display().to_string();
        return Ok((Origin::Files(source, digest), format!("text {digest:032x}"), shown));
    }
    let registry = rust_corpus::registry().ok_or_else(|| {
        Error::data("CARGO_HOME", "is not set and there is no home folder: the crates' sources are unknown")
    })?;
    // A published version of a crate never changes, so names and versions stand for the content.
    let content = format!("crates {:x} {}", rust_corpus::fingerprint(&registry), config.max_mib);
    let shown = registry.display().to_string();
    Ok((Origin::Crates(registry), content, shown))
}

/// What of the settings and files of the tokenizer has a part in the tokens.
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

/// The lock of the folder; none where the file system has no locks. Then several processes may prepare the same at once,
/// which takes their time and does no harm: each writes files of its own, renames them when they are whole, and all have the
/// same content.
fn lock(folder: &Path, listener: &mut Listener<'_>) -> Result<Option<File>> {
    let path = folder.join("lock");
    let mut told = false;
    let reason = loop {
        // Somebody may have cleaned the cache while we waited.
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        match files::try_lock(&path).map_err(Error::io("create", &path))? {
            Locked::Ours(lock) => return Ok(Some(lock)),
            Locked::Unavailable(reason) => break reason,
            Locked::Taken => {}
        }
        if !told {
            listener(Notice::Waiting { folder });
            told = true;
        }
        // Until the other one is done or has ended.
        if let Err(reason) = File::open(&path).and_then(|file| file.lock())
            && reason.kind() != ErrorKind::NotFound
        {
            break reason;
        }
    };
    let warning = format!(
        "{} cannot be locked ({reason}): processes that start together may each prepare the same data, which does no \
         harm; set data.cache to a folder on a local disk to avoid it",
        path.display()
    );
    listener(Notice::Warning(&warning));
    Ok(None)
}

fn make(
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
                let problem = "was changed while it was read; start again when nothing writes to it";
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
            let some: Vec<&str> = sample(&texts.train, LEARNED_FROM);
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
            // Documents are told apart where the tokenizer has a token for it.
            if let Some(end) = tokenizer.end_of_text().filter(|_| index > 0) {
                writer.push(&[end])?;
            }
            let mut pieces = tokenizer.pieces(text, PIECE);
            loop {
                let some: Vec<&str> = pieces.by_ref().take(AT_ONCE).collect();
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
    // Last, because it says that the rest is there.
    let json = serde_json::to_vec(&meta).map_err(|error| Error::data(folder, error.to_string()))?;
    write_atomically(&folder.join(META), &json)
}

/// What the user should know of a source of text.
fn warnings(source: &Source, skipped: &[(PathBuf, String)]) -> Vec<String> {
    let mut warnings = vec![];
    if !skipped.is_empty() {
        let first = skipped.iter().take(5).map(|(path, problem)| format!("\n  {} {problem}", path.display()));
        let first: String = first.collect();
        let more = match skipped.len() {
            0..=5 => String::new(),
            len => format!("\n  and {} more", len - 5),
        };
        let (count, files) = (skipped.len(), source.files().len());
        warnings.push(format!("{count} of {files} files are left out:{first}{more}"));
    }
    // Tables and records are text with much in it that nobody wants to learn.
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
            "{}{more}: taken as plain text, so the model learns {what} too; write the text itself into a .txt file if \
             that is not wanted",
            path.display()
        ));
    }
    warnings
}

/// Texts spread evenly over `texts`, of about `bytes` bytes.
fn sample(texts: &[String], bytes: usize) -> Vec<&str> {
    let total: usize = texts.iter().map(String::len).sum();
    let every = (total / bytes.max(1)).max(1);
    if texts.len() < 2 * every {
        let each = bytes / texts.len().max(1);
        return texts.iter().filter_map(|text| text::prefix(text, each)).collect();
    }
    texts.iter().step_by(every).map(String::as_str).collect()
}
