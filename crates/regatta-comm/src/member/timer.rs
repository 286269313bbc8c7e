//! Time limits that count only while this process runs.
//!
//! Ctrl-Z, `scontrol suspend` and a busy host stop processes for a while. When they go on, what they waited for may
//! need its time, too: others were stopped later or go on later. So a gap between two looks at the clock that only a
//! stop explains makes the limit begin anew. (A host that sleeps stops the clock itself.)

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Waits look at their timer more often than this. Whoever has not done so was stopped.
const STOPPED: Duration = Duration::from_secs(1);

/// How much of a limit is used up. Its owner asks again and again while it waits.
#[derive(Debug)]
pub(crate) struct Timer {
    limit: Duration,
    /// A longer gap between two looks means that this process was stopped.
    gap: Duration,
    used: Cell<Duration>,
    last: Cell<Instant>,
}

impl Timer {
    /// For a wait that looks at it several times a second.
    pub(crate) fn new(limit: Duration) -> Self {
        Self::with_pauses(limit, Duration::ZERO)
    }

    /// For a wait that may do something else for as long as `pause` between two looks.
    pub(crate) fn with_pauses(limit: Duration, pause: Duration) -> Self {
        let gap = pause.saturating_add(STOPPED);
        Self { limit, gap, used: Cell::new(Duration::ZERO), last: Cell::new(Instant::now()) }
    }

    /// How long this has lasted, without the time in which this process was stopped and what was before that.
    pub(crate) fn used(&self) -> Duration {
        self.used_within(self.gap)
    }

    /// As [`used`](Self::used), after something that may have taken as long as `pause`.
    pub(crate) fn used_after(&self, pause: Duration) -> Duration {
        self.used_within(pause.saturating_add(STOPPED))
    }

    fn used_within(&self, gap: Duration) -> Duration {
        let now = Instant::now();
        let passed = now - self.last.replace(now);
        let used = if passed > gap { Duration::ZERO } else { self.used.get().saturating_add(passed) };
        self.used.set(used);
        used
    }

    /// What is left of the limit.
    pub(crate) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.used())
    }

    /// Whether nothing is left.
    pub(crate) fn is_over(&self) -> bool {
        self.used() >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(timer: &Timer, time: Duration) {
        timer.last.set(timer.last.get() - time);
    }

    #[test]
    fn time_counts_and_a_stop_begins_it_anew() {
        let timer = Timer::new(Duration::from_secs(2));
        for _ in 0..4 {
            passed(&timer, Duration::from_millis(400));
            assert!(!timer.is_over());
        }
        passed(&timer, Duration::from_millis(400));
        assert!(timer.is_over() && timer.left().is_zero());
        passed(&timer, Duration::from_secs(100));
        assert!(!timer.is_over() && timer.left() > Duration::from_secs(1));
    }

    #[test]
    fn what_was_done_in_between_counts() {
        let timer = Timer::new(Duration::from_secs(8));
        passed(&timer, Duration::from_secs(5));
        assert!(timer.used_after(Duration::from_secs(5)) >= Duration::from_secs(5));
        let slow = Timer::with_pauses(Duration::from_secs(8), Duration::from_secs(10));
        passed(&slow, Duration::from_secs(9));
        assert!(slow.is_over());
    }

    #[test]
    fn limits_have_no_limit() {
        assert!(!Timer::with_pauses(Duration::MAX, Duration::MAX).is_over());
        assert!(Timer::new(Duration::ZERO).is_over());
    }
}
