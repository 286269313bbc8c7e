//! Counts how often parameters are gathered in a step under ZeRO 3.

use crate::parallel::{BlockUse, RankPlan};
use regatta_plan::Recompute;
use std::collections::VecDeque;

/// Whether a unit's parameters are on the rank.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Released,
    Prefetching,
    Gathered,
}

/// The number of gathers of each unit in one step under ZeRO 3. A unit is gathered before a block's forward and before
/// its backward, unless it is still gathered for the block before or kept for one of the next `prefetch` blocks.
pub(super) fn gathers(rank: &RankPlan, prefetch: usize, recompute: Recompute) -> Vec<usize> {
    let mut uses: VecDeque<BlockUse> = rank.uses(recompute).into();
    let units = &rank.units;
    let mut state = vec![State::Released; units.units.len()];
    let mut count = vec![0; units.units.len()];
    while let Some(BlockUse { block, pass }) = uses.pop_front() {
        let mut gather = |block: usize, until: State, state: &mut Vec<State>| {
            for unit in units.of_block(block) {
                count[unit] += usize::from(state[unit] == State::Released);
                if state[unit] != State::Gathered {
                    state[unit] = until;
                }
            }
        };
        gather(block, State::Gathered, &mut state);
        let next: Vec<BlockUse> = uses.iter().take(prefetch).copied().collect();
        next.iter().for_each(|next| gather(next.block, State::Prefetching, &mut state));
        for unit in units.of_block(block) {
            let kept = |next: &BlockUse| next.pass == pass && units.units[unit].blocks.contains(&next.block);
            if state[unit] == State::Gathered && !next.iter().any(kept) {
                state[unit] = State::Released;
            }
        }
        next.iter().for_each(|next| gather(next.block, State::Prefetching, &mut state));
    }
    count
}
