//! What is done with the report about a late rank.

use crate::health::Late;
use std::fmt;
use std::sync::Arc;

/// What is done with the report about a late rank: a function or closure of the user's. It runs on the thread that
/// waits, so it should be short; if it panics, the job ends.
///
/// ```
/// # use regatta_comm::{OnLate, Options};
/// let (sender, reports) = std::sync::mpsc::channel();
/// let options = Options { on_late: OnLate::new(move |late| drop(sender.send(late.clone()))), ..Options::default() };
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
