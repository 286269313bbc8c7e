//! What somebody outside asks of a run while it trains: to save, or to save and stop.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Requests to one rank. Ranks look at them at the end of each step and agree: what one rank is asked, all do at the same step.
#[derive(Debug, Default)]
pub struct Requests {
    /// The signal that asks to stop; 0: none.
    stop: AtomicU32,
    save: AtomicBool,
}

impl Requests {
    /// Asks to save and stop. `signal` is the number of the signal that says so; the first one stays.
    pub fn stop(&self, signal: u32) {
        // It fails where another signal came first.
        let _ = self.stop.compare_exchange(0, signal.max(1), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The signal that asks to stop, if any.
    pub fn stopped_by(&self) -> Option<u32> {
        Some(self.stop.load(Ordering::Relaxed)).filter(|&signal| signal != 0)
    }

    /// Asks to save and go on.
    pub fn save(&self) {
        self.save.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asks to save.
    pub(super) fn wants_save(&self) -> bool {
        self.save.load(Ordering::Relaxed)
    }
}

/// Keeps one request that reaches the ranks at different steps from becoming several checkpoints.
#[derive(Debug, Default)]
pub(super) struct RequestedSaves {
    last: Option<Instant>,
}

impl RequestedSaves {
    /// Requests so soon after a requested save are the same one, which reached this rank later than others.
    const SAME: Duration = Duration::from_secs(1);

    /// Whether this rank asks to save now.
    pub(super) fn wanted(&self, requests: &Requests) -> bool {
        let fresh = self.last.is_none_or(|last| last.elapsed() >= Self::SAME);
        if !fresh {
            requests.save.store(false, Ordering::Relaxed);
        }
        fresh && requests.wants_save()
    }

    /// All ranks save now, because one was asked to.
    pub(super) fn granted(&mut self, requests: &Requests) {
        requests.save.store(false, Ordering::Relaxed);
        self.last = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_stays() {
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
        saves.last = Instant::now().checked_sub(RequestedSaves::SAME);
        // The late one has been dropped; a new one counts.
        assert!(!saves.wanted(&requests));
        requests.save();
        assert!(saves.wanted(&requests));
    }
}
