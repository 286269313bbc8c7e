//! How often parameters that come and go are fetched in a step.

use crate::parallel::Share;
use regatta_plan::Recompute;
use std::collections::VecDeque;

#[derive(Clone, Copy, PartialEq)]
enum State {
    Away,
    Coming,
    Here,
}

/// Fetches of each unit in one step under ZeRO 3: before a block's forward and before its backward, unless the unit is
/// still there from the block before, or stays for one of the `prefetch` blocks that come next.
pub(super) fn gathers(share: &Share, prefetch: usize, recompute: Recompute) -> Vec<usize> {
    let mut uses: VecDeque<(usize, bool)> = share.uses(recompute).into();
    let units = &share.units;
    let mut state = vec![State::Away; units.units.len()];
    let mut count = vec![0; units.units.len()];
    while let Some((block, forward)) = uses.pop_front() {
        let mut fetch = |block: usize, until: State, state: &mut Vec<State>| {
            for unit in units.of_block(block) {
                count[unit] += usize::from(state[unit] == State::Away);
                if state[unit] != State::Here {
                    state[unit] = until;
                }
            }
        };
        fetch(block, State::Here, &mut state);
        let next: Vec<(usize, bool)> = uses.iter().take(prefetch).copied().collect();
        next.iter().for_each(|&(block, _)| fetch(block, State::Coming, &mut state));
        for unit in units.of_block(block) {
            let stays =
                |&(next, way): &(usize, bool)| way == forward && units.units[unit].blocks.contains(&next);
            if state[unit] == State::Here && !next.iter().any(stays) {
                state[unit] = State::Away;
            }
        }
        next.iter().for_each(|&(block, _)| fetch(block, State::Coming, &mut state));
    }
    count
}
