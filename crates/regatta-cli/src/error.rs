//! Errors that end the program: any error that prints as a sentence.

use std::fmt;

/// The program's result.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// An error with an exit code of its own.
#[derive(Debug)]
pub struct Exit {
    /// The message; none if a signal stopped the job as requested.
    pub message: Option<String>,
    /// The exit code.
    pub code: u8,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => f.write_str(message),
            None => write!(f, "exit code {}", self.code),
        }
    }
}

impl std::error::Error for Exit {}
