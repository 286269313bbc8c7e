//! How many steps each worker has done, and who may go on (Ho et al. 2013, "More Effective Distributed ML via a Stale
//! Synchronous Parallel Parameter Server", section 2).

/// The clocks of all workers.
#[derive(Debug, Clone)]
pub(crate) struct Clocks {
    /// By worker: steps done; none if it has left.
    steps: Vec<Option<u64>>,
    /// Steps that a worker may be ahead of the slowest; none: without a bound.
    bound: Option<u64>,
}

impl Clocks {
    pub(crate) fn new(workers: usize, bound: Option<u64>) -> Self {
        Self { steps: vec![Some(0); workers], bound }
    }

    /// `worker` has done a step.
    pub(crate) fn tick(&mut self, worker: usize) {
        if let Some(steps) = &mut self.steps[worker] {
            *steps += 1;
        }
    }

    /// `worker` does no further step. Nobody waits for it.
    pub(crate) fn leave(&mut self, worker: usize) {
        self.steps[worker] = None;
    }

    /// Whether `worker` may begin its next step.
    pub(crate) fn may_go_on(&self, worker: usize) -> bool {
        let slowest = self.steps.iter().flatten().min().copied().unwrap_or(0);
        match (self.bound, self.steps[worker]) {
            (Some(bound), Some(steps)) => steps <= slowest.saturating_add(bound),
            _ => true,
        }
    }

    /// The worker that has done the fewest steps.
    pub(crate) fn slowest(&self) -> Option<usize> {
        let present = self.steps.iter().enumerate().filter_map(|(worker, steps)| Some(((*steps)?, worker)));
        present.min().map(|(_, worker)| worker)
    }

    /// Whether all workers have left.
    pub(crate) fn is_over(&self) -> bool {
        self.steps.iter().all(Option::is_none)
    }

    /// Workers that have not left.
    pub(crate) fn present(&self) -> impl Iterator<Item = usize> {
        self.steps.iter().enumerate().filter(|(_, steps)| steps.is_some()).map(|(worker, _)| worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nobody_is_further_ahead_than_the_bound_and_somebody_may_go_on(
            workers in 1usize..6,
            bound in 0u64..4,
            turns in prop::collection::vec((0usize..6, 0u8..20), 0..300),
        ) {
            let mut clocks = Clocks::new(workers, Some(bound));
            let mut steps: Vec<Option<u64>> = vec![Some(0); workers];
            for (worker, chance) in turns {
                let worker = worker % workers;
                if chance == 0 {
                    clocks.leave(worker);
                    steps[worker] = None;
                }
                if clocks.may_go_on(worker) && let Some(done) = &mut steps[worker] {
                    clocks.tick(worker);
                    *done += 1;
                }
                let present: Vec<u64> = steps.iter().flatten().copied().collect();
                if let (Some(least), Some(most)) = (present.iter().min(), present.iter().max()) {
                    // Whoever has left may have been the slowest.
                    prop_assert!(most - least <= bound + 1);
                    prop_assert!(clocks.present().any(|worker| clocks.may_go_on(worker)));
                }
                prop_assert_eq!(clocks.is_over(), present.is_empty());
            }
        }
    }
}
