//! What can go wrong between ranks, said so that the user can act on it.

use std::fmt;
use std::time::Duration;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of communication. After any of these but [`Error::Usage`] a group is unusable: every later call
/// on it returns the same error.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The job has ended because a rank died or gave up; this is the first such failure of the job.
    #[error("{reason}")]
    Aborted {
        /// The rank that died or gave up first, where one is known.
        rank: Option<usize>,
        /// What happened, with rank and host.
        reason: String,
    },
    /// A rank's connection closed in the middle of an operation.
    #[error("rank {rank} closed its connection during {call}: it died or was ended")]
    PeerDied {
        /// The rank that is gone.
        rank: usize,
        /// The operation that needed it.
        call: String,
    },
    /// No progress for the whole deadline.
    #[error(
        "no progress for {:.1} s in {call}: still waiting for rank {rank}; it is stopped, overloaded or in another \
         operation (the deadline can be set by REGATTA_DEADLINE_S)", waited.as_secs_f64()
    )]
    Deadline {
        /// The rank that had not arrived.
        rank: usize,
        /// The operation that needed them.
        call: String,
        /// How long.
        waited: Duration,
    },
    /// A rank ended normally while others still needed it.
    #[error(
        "rank {rank} has left the job, but {call} needs it: all ranks of a group must make the same calls"
    )]
    Left {
        /// The rank that left.
        rank: usize,
        /// The operation that needed it.
        call: String,
    },
    /// Two ranks called different operations at the same place of their programs.
    #[error(
        "rank {rank} called {call}, rank {other} called {other_call}: all ranks of a group must make the same calls"
    )]
    Mismatch {
        /// This rank.
        rank: usize,
        /// What this rank called.
        call: String,
        /// The other rank.
        other: usize,
        /// What the other rank called.
        other_call: String,
    },
    /// An argument that no rank could satisfy; nothing was sent.
    #[error("{0}")]
    Usage(String),
    /// What should never happen did: a fault in this library or in a library beneath it, and not in the call.
    #[error("{0}: this is a fault of regatta or of a library beneath it, please report it")]
    Internal(String),
    /// The environment variables of the launcher are missing, malformed or contradictory.
    #[error("environment variable {variable}: {problem}")]
    Env {
        /// Which variable.
        variable: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The ranks of a job did not find each other.
    #[error("{0}")]
    Rendezvous(String),
    /// A system call failed.
    #[error("cannot {action}: {reason}")]
    System {
        /// What was attempted.
        action: String,
        /// The operating system's reason.
        reason: String,
    },
}

/// The sentence, as [`Display`](fmt::Display) prints it: Rust prints an error that `main` returns this way.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// A failed system call; use as `.map_err(Error::system("open a socket"))`.
    pub(crate) fn system<E: std::fmt::Display>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        let reason = |error: E| explain(&error.to_string());
        move |error| Self::System { action, reason: reason(error) }
    }
}

/// Adds what helps to an error's text, where the limit on open files is the reason.
pub(crate) fn explain(text: &str) -> String {
    // EMFILE and ENFILE, as the standard library shows them.
    match ["(os error 24)", "(os error 23)"].iter().any(|code| text.contains(code)) {
        true => format!("{text}: raise the limit of open files (`ulimit -n 4096`)"),
        false => text.into(),
    }
}
