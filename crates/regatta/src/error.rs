//! What can go wrong, said so that the user can act on it: what, where, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the engine. Each prints as one or two sentences: what is wrong, where, what to do.
#[derive(thiserror::Error)]
pub enum Error {
    /// A key of the configuration is unknown, missing or out of range.
    #[error("{origin}: `{key}`: {problem}")]
    Config {
        /// The configuration file, or the flag that carried the value.
        origin: String,
        /// Dotted path of the key, as in `train.batch`.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Training data that is missing, unreadable, malformed or too small.
    #[error("data {path}: {problem}")]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A checkpoint that is missing, truncated, foreign or of another model.
    #[error("checkpoint {path}: {problem}")]
    Checkpoint {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file-system operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted, as in "read" or "create".
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The ranks could not communicate: a peer died, stalled or disagreed.
    #[error(transparent)]
    Comm(#[from] regatta_comm::Error),
    /// A function of the Horovod-shaped face was called out of order.
    #[error("{0}")]
    Usage(String),
    /// The numbers went wrong: a loss or gradient that is not finite, ranks that differ.
    #[error("{0}")]
    Numeric(String),
}

/// The sentence, as [`Display`](fmt::Display) prints it: Rust prints an error that `main` returns this way.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// A problem with data at `path`.
    pub fn data(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Data { path: path.as_ref().into(), problem: problem.into() }
    }

    /// A problem with the checkpoint at `path`.
    pub fn checkpoint(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().into(), problem: problem.into() }
    }

    /// A failed file operation; use as `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
