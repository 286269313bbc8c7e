//! What the launcher waits for: signals, and the ends of its ranks.

use crate::signals::{self, Received};
use std::fmt;

/// An event that the launcher waits for.
pub enum Event {
    Signal(Received),
    Ended(usize, End),
}

/// How a rank has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit code.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl End {
    /// The launcher's exit code if this end makes the job fail.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Code(code) => u8::try_from(code).unwrap_or(1),
            Self::Signal(signal) => signals::exit_code(signal),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(9) => f.write_str("was killed (signal 9)"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Self::Code(code) => write!(f, "failed with exit code {code}"),
        }
    }
}
