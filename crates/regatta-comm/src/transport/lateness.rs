//! Whether peers are kept from their processors: where other programs want them, too, each time that ranks need one
//! another costs a turn of the scheduler. Then transports let ranks get further before they do.

use super::patience::processors;
use std::cell::Cell;
use std::time::Duration;

/// A wait for so long within an operation shows that a peer was kept from its processor: it takes much longer than
/// the work between two waits, and less than a turn of the scheduler.
const LATE: Duration = Duration::from_millis(1);
/// Such waits of so long together, beyond what [`allowance`] forgives, are too long.
const TOO_LATE: Duration = Duration::from_millis(4);
/// Operations that get further after that, before it is tried again without.
pub(super) const DEEP_OPERATIONS: u32 = 16;

/// Long waits that are forgiven in an operation with so many bytes: about what it costs that data goes through main
/// memory and not through the cache.
fn allowance(bytes: usize) -> Duration {
    Duration::from_nanos(bytes as u64 / 8)
}

/// What one rank has waited for peers that were late.
#[derive(Debug)]
pub(super) struct Lateness {
    /// Not yet forgiven.
    waited: Cell<Duration>,
    /// How long a wait is long.
    long: Duration,
}

impl Lateness {
    /// For one of `ranks` ranks, as far as known on this host.
    pub(super) fn new(ranks: usize) -> Self {
        // Where ranks take turns on the processors, all the others may come before a peer.
        let turns = u32::try_from(ranks.div_ceil(processors())).unwrap_or(1).max(1);
        Self { waited: Cell::default(), long: LATE * turns }
    }

    /// An operation with so many bytes begins.
    pub(super) fn forgive(&self, bytes: usize) {
        self.waited.set(self.waited.get().saturating_sub(allowance(bytes)));
    }

    /// This rank has waited for a peer that was in the same operation.
    pub(super) fn add(&self, waited: Duration) {
        if waited > self.long {
            self.waited.set(self.waited.get().saturating_add(waited));
        }
    }

    pub(super) fn is_too_late(&self) -> bool {
        self.waited.get() > TOO_LATE
    }

    /// It has been acted on.
    pub(super) fn clear(&self) {
        self.waited.set(Duration::ZERO);
    }

    /// As if this rank had waited long for a peer.
    #[cfg(test)]
    pub(super) fn pretend(&self) {
        self.waited.set(Duration::from_secs(1));
    }

    /// No wait is long.
    #[cfg(test)]
    pub(super) fn never(&mut self) {
        self.long = Duration::MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_waits_and_rare_ones_are_forgiven() {
        let lateness = Lateness::new(1);
        for _ in 0..1000 {
            lateness.add(Duration::from_micros(900));
        }
        assert!(!lateness.is_too_late());
        for _ in 0..100 {
            lateness.forgive(64 << 20);
            lateness.add(Duration::from_millis(4));
        }
        assert!(!lateness.is_too_late());
        lateness.add(Duration::from_millis(4));
        assert!(lateness.is_too_late());
        lateness.clear();
        assert!(!lateness.is_too_late());
    }
}
