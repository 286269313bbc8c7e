//! Errors. Each says what is wrong, where, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. It displays as one or two sentences: what is wrong, where, and what to do.
///
/// ```
/// use regatta::{Error, config::Config};
/// let error = Config::parse("[model]\nkind = 'gtp'\n", "run.toml", &[]).unwrap_err();
/// assert!(matches!(error, Error::Config { .. }));
/// assert_eq!(error.to_string(), "run.toml: `model.kind`: unknown kind `gtp`; did you mean `gpt`?");
/// ```
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of the configuration is unknown, missing or out of range.
    #[error("{origin}: `{key}`: {problem}")]
    Config {
        /// The configuration file, or the flag or variable that set the value.
        origin: String,
        /// Dotted path of the key, as in `train.batch`.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Data is missing, unreadable, malformed or too small.
    #[error("data {path}: {problem}")]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A checkpoint is missing, damaged, not Regatta's, or of another model.
    #[error("checkpoint {path}: {problem}")]
    Checkpoint {
        /// The checkpoint's folder, file or URL.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file-system operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted, as in "read" or "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The ranks could not communicate: a peer died, stalled or disagreed.
    #[error(transparent)]
    Comm(#[from] regatta_comm::Error),
    /// A plan is invalid, or the model does not support it.
    #[error(transparent)]
    Plan(#[from] regatta_plan::PlanError),
    /// A call is out of order, arguments are invalid, or ranks differ.
    #[error("{0}")]
    Usage(String),
    /// A numeric problem: a loss or a gradient is not finite, or the ranks' parameters differ.
    #[error("{0}")]
    Numeric(String),
}

/// The same text as [`Display`](fmt::Display), because Rust prints an error that `main` returns by its `Debug`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// An error about the data at `path`.
    pub fn data(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Data { path: path.as_ref().into(), problem: problem.into() }
    }

    /// An error about the checkpoint at `path`.
    pub fn checkpoint(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().into(), problem: problem.into() }
    }

    /// Converts the error of a file operation, as in `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
