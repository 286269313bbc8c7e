//! The report about a late rank, and what is done with it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A rank that others wait for, before it is fatal.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Late {
    /// The rank that waits.
    pub rank: usize,
    /// The rank that it waits for, at the end of the chain of those who wait for one another.
    pub waits_for: usize,
    /// The call.
    pub call: String,
    /// When the wait began.
    pub since: SystemTime,
    /// How long it has lasted.
    pub waited: Duration,
    /// When it becomes an error.
    pub deadline: Duration,
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_day = self.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
        write!(
            f,
            "rank {} has waited {:.1} s for rank {} (since {:02}:{:02}:{:02} UTC) in {}; it gives up after {:.1} s",
            self.rank,
            self.waited.as_secs_f64(),
            self.waits_for,
            of_day / 3600,
            of_day / 60 % 60,
            of_day % 60,
            self.call,
            self.deadline.as_secs_f64()
        )
    }
}

/// What is done with the report about a late rank: a function or closure of the user's. It runs on the thread that
/// waits, so it should be short; if it panics, the job ends.
///
/// ```
/// # use regatta_comm::{OnLate, Options};
/// let (sender, reports) = std::sync::mpsc::channel();
/// let options = Options::default().on_late(OnLate::new(move |late| drop(sender.send(late.clone()))));
/// # drop((options, reports));
/// ```
#[derive(Clone)]
pub struct OnLate(Arc<dyn Fn(&Late) + Send + Sync>);

impl OnLate {
    /// Calls `report` for each late rank.
    pub fn new(report: impl Fn(&Late) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }

    pub(crate) fn report(&self, late: &Late) {
        (self.0)(late);
    }
}

impl Default for OnLate {
    /// Writes the report to standard error.
    fn default() -> Self {
        Self::new(|late| crate::say::say(format_args!("warning: {late}")))
    }
}

impl fmt::Debug for OnLate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnLate")
    }
}
