//! Requests from outside to a run while it trains: to save, or to save and stop.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Requests to one rank. At the end of each step the ranks combine their requests, so that all act on a request to one
/// of them at the same step.
///
/// ```
/// let requests = regatta::train::Requests::default();
/// requests.stop(15); // SIGTERM
/// assert_eq!(requests.stopped_by(), Some(15));
/// ```
#[derive(Debug, Default)]
pub struct Requests {
    /// The number of the signal that requested to stop; 0: none.
    stop: AtomicU32,
    save: AtomicBool,
}

impl Requests {
    /// Requests to save and stop. `signal` is the number of the signal that caused it; the first one is kept.
    pub fn stop(&self, signal: u32) {
        // Fails if another signal came first, which is kept.
        let _ = self.stop.compare_exchange(0, signal.max(1), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The number of the signal that requested to stop, if any.
    pub fn stopped_by(&self) -> Option<u32> {
        Some(self.stop.load(Ordering::Relaxed)).filter(|&signal| signal != 0)
    }

    /// Requests to save and continue.
    pub fn save(&self) {
        self.save.store(true, Ordering::Relaxed);
    }

    /// Whether a save was requested.
    pub(super) fn wants_save(&self) -> bool {
        self.save.load(Ordering::Relaxed)
    }
}

/// Ensures that one request that reaches the ranks at different steps causes only one checkpoint.
#[derive(Debug, Default)]
pub(super) struct RequestedSaves {
    last: Option<Instant>,
}

impl RequestedSaves {
    /// A request within this time after a requested save is the same one, which reached this rank later than others.
    const SAME_WITHIN: Duration = Duration::from_secs(1);

    /// Whether this rank requests to save now.
    pub(super) fn wanted(&self, requests: &Requests) -> bool {
        let fresh = self.last.is_none_or(|last| last.elapsed() >= Self::SAME_WITHIN);
        if !fresh {
            requests.save.store(false, Ordering::Relaxed);
        }
        fresh && requests.wants_save()
    }

    /// Called when all ranks save because a save was requested on one of them.
    pub(super) fn granted(&mut self, requests: &Requests) {
        requests.save.store(false, Ordering::Relaxed);
        self.last = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_is_kept() {
        let requests = Requests::default();
        assert_eq!(requests.stopped_by(), None);
        requests.stop(2);
        requests.stop(15);
        assert_eq!(requests.stopped_by(), Some(2));
    }

    #[test]
    fn a_request_that_comes_late_is_the_same_one() {
        let (requests, mut saves) = (Requests::default(), RequestedSaves::default());
        assert!(!saves.wanted(&requests));
        requests.save();
        assert!(saves.wanted(&requests));
        saves.granted(&requests);
        requests.save();
        assert!(!saves.wanted(&requests));
        saves.last = Instant::now().checked_sub(RequestedSaves::SAME_WITHIN);
        // The late one has been dropped; a new one counts.
        assert!(!saves.wanted(&requests));
        requests.save();
        assert!(saves.wanted(&requests));
    }
}
