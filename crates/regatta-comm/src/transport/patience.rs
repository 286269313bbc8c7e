//! Looking for a peer before sleeping.
//!
//! Sleeping costs a wake-up, tens of microseconds where the processor has gone idle meanwhile, so a rank that
//! expects its peer soon looks for it first. Two things make plain spinning bad. The peer may be waiting for
//! this very processor, hence the yields. And where other programs want the processor, a yield gives it away
//! for whole time slices; then sleeping is better, because the scheduler prefers those who wake up.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long to look without giving the processor away: about the time of a small exchange.
const ALONE: Duration = Duration::from_micros(3);
/// Looks without a pause: about the time in which what a peer has just written arrives.
const AT_ONCE: usize = 256;
/// Looks before the first one at the clock.
const FIRST: usize = 16;
/// A yield that takes longer than this shows that the processor is wanted by others than our peers.
const LONG: Duration = Duration::from_micros(400);
/// After a long yield there are none for so many times what it took: they cost a tenth of the time at most.
const WARY: u32 = 10;

/// How one rank waits. Remembers what came of the last waits.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    limit: Duration,
    /// How long of that without yields.
    alone: Duration,
    /// No yields until then.
    wary_until: Cell<Option<Instant>>,
}

impl Patience {
    /// For one of `ranks` ranks, as far as known on this host.
    pub(crate) fn new(ranks: usize) -> Self {
        // Where ranks take turns, a peer hardly ever runs at the same time.
        let alone = if ranks > processors() { Duration::ZERO } else { ALONE };
        Self { alone, ..Self::default() }
    }

    /// Sets how long to look before sleeping.
    pub(crate) fn set(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// How many times to look before anything else is done.
    pub(crate) fn at_once(&self) -> usize {
        if self.alone.is_zero() { 0 } else { AT_ONCE }
    }

    /// Looks for a while without sleeping; whether `ready` came true.
    pub(crate) fn look(&self, mut ready: impl FnMut() -> bool) -> bool {
        // A peer that is about to come is there before the clock has been read.
        for _ in 0..if self.alone.is_zero() { 0 } else { FIRST } {
            std::hint::spin_loop();
            if ready() {
                return true;
            }
        }
        let begun = Instant::now();
        let alone = begun + self.limit.min(self.alone);
        let mut now = begun;
        while now < alone {
            for _ in 0..16 {
                std::hint::spin_loop();
                if ready() {
                    return true;
                }
            }
            now = Instant::now();
        }
        if self.limit <= ALONE {
            return false;
        }
        if self.wary_until.get().is_some_and(|until| now < until) {
            return false;
        }
        while now < begun + self.limit {
            std::thread::yield_now();
            if ready() {
                return true;
            }
            let before = std::mem::replace(&mut now, Instant::now());
            if now - before > LONG {
                self.wary_until.set(now.checked_add((now - before) * WARY));
                return false;
            }
        }
        false
    }
}

/// The host's processors. Not those that this rank may use: a launcher may have bound each rank to its own.
pub(super) fn processors() -> usize {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    // As in "0-3,8".
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.trim().parse::<usize>().ok()?.checked_sub(first.trim().parse().ok()?)? + 1)
    };
    let count: Option<usize> = online.trim().split(',').map(range).sum();
    count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}
