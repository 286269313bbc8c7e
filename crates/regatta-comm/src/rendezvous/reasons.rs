//! Why the job's store is not reached: the attempts go on for a while, and the last one need not be the telling one.

use crate::error::{Error, Result};
use crate::member::timer::Timer;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// How long a store that holds another secret is asked again: one of an earlier job may still have the port.
const OTHER_SECRET: Duration = Duration::from_secs(5);

/// Why one attempt has failed.
pub(super) enum Unreached {
    /// A connection cannot be made, or broke.
    Io(io::Error),
    /// The store has said why.
    Refused(String),
    /// No further attempt can succeed.
    Never(Error),
}

impl From<io::Error> for Unreached {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What came of all attempts so far.
#[derive(Default)]
pub(super) struct Reasons {
    last: Option<String>,
    /// The last answer of a store, which says more than a port that nobody listens at.
    answer: Option<String>,
    /// Since when the store holds another secret.
    other_secret: Option<Timer>,
}

impl Reasons {
    /// Takes note of a failed attempt.
    ///
    /// # Errors
    /// The failure itself where no further attempt can succeed.
    pub(super) fn add(&mut self, address: &str, why: Unreached) -> Result<()> {
        let other_secret =
            matches!(&why, Unreached::Io(error) if error.kind() == ErrorKind::PermissionDenied);
        match why {
            Unreached::Never(error) => return Err(error),
            Unreached::Refused(why) => self.answer = Some(format!("{address}: {why}")),
            Unreached::Io(error) if other_secret => self.answer = Some(format!("{address}: {error}")),
            Unreached::Io(error) => {
                self.last = Some(crate::error::explain(&format!("{address}: {error}")));
            }
        }
        if !other_secret {
            self.other_secret = None;
        } else if self.other_secret.is_none() {
            // The attempts may pause for as long as a connection takes.
            self.other_secret = Some(Timer::with_pauses(OTHER_SECRET, OTHER_SECRET));
        }
        Ok(())
    }

    /// Whether asking again is of no use.
    pub(super) fn is_hopeless(&self) -> bool {
        self.other_secret.as_ref().is_some_and(Timer::is_over)
    }

    /// The failure to reach the store in all of this time.
    pub(super) fn into_error(self, rank: usize, waited: Duration) -> Error {
        let secret = self.other_secret.is_some();
        let reason = self.answer.or(self.last).unwrap_or_else(|| "no address".into());
        let cure = match secret {
            true => "REGATTA_SECRET must be the same on all ranks",
            false => {
                "is rank 0 running, and are MASTER_ADDR and MASTER_PORT right? (the time can be set by REGATTA_JOIN_S)"
            }
        };
        let waited = waited.as_secs_f64();
        Error::Rendezvous(format!(
            "rank {rank} cannot reach the job's store within {waited:.1} s ({reason}): {cure}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_telling_answer_stays() {
        let mut reasons = Reasons::default();
        reasons.add("a:1", ErrorKind::PermissionDenied.into_io("another secret")).unwrap();
        reasons.add("a:1", io::Error::from(ErrorKind::ConnectionRefused).into()).unwrap();
        let error = reasons.into_error(3, Duration::from_millis(1500)).to_string();
        assert!(
            error.contains("rank 3") && error.contains("another secret") && error.contains("1.5 s"),
            "{error}"
        );
        assert!(error.contains("REGATTA_JOIN_S"), "{error}");
    }

    #[test]
    fn what_never_succeeds_is_said_at_once() {
        let never = Unreached::Never(Error::Rendezvous("no".into()));
        assert!(Reasons::default().add("a:1", never).is_err());
    }

    trait IntoIo {
        fn into_io(self, text: &str) -> Unreached;
    }

    impl IntoIo for ErrorKind {
        fn into_io(self, text: &str) -> Unreached {
            Unreached::Io(io::Error::new(self, text))
        }
    }
}
