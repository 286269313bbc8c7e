//! Gathers and releases the parameters of blocks in a step.

use super::Engine;
use crate::error::Result;
use crate::parallel::rank_plan::Pass;

impl Engine {
    /// Waits for the parameters of the next block, and starts to fetch those of the blocks after it.
    pub(super) fn acquire_block(&mut self, block: usize) -> Result<()> {
        let units = self.units.clone();
        for unit in units.of_block(block) {
            self.exchange.acquire(unit, &mut self.store)?;
            self.store.update_copies(unit);
        }
        self.uses.pop_front();
        self.prefetch_blocks()
    }

    /// Called after a pass has used the parameters of a block. Releases the units that the same pass does not need soon.
    pub(super) fn release_block(&mut self, block: usize, pass: Pass) -> Result<()> {
        let units = self.units.clone();
        let next = self.uses.iter().take(self.plan.prefetch).filter(|next| next.pass == pass);
        let soon: Vec<usize> = next.map(|next| next.block).collect();
        for unit in units.of_block(block) {
            if !soon.iter().any(|next| units.units[unit].blocks.contains(next)) {
                self.exchange.release(unit, &mut self.store);
            }
        }
        if let Some(tensor) = self.groups.tensor() {
            tensor.check()?;
        }
        self.prefetch_blocks()
    }

    fn prefetch_blocks(&mut self) -> Result<()> {
        let units = self.units.clone();
        for next in self.uses.iter().take(self.plan.prefetch) {
            for unit in units.of_block(next.block) {
                self.exchange.prefetch(unit, &self.store)?;
            }
        }
        Ok(())
    }
}
