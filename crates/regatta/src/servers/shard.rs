//! A server's shard of every unit: parameters, and the optimizer that updates them.

use super::message::Commit;
use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::optim::FlatOptimizer;
use crate::params::Units;
use std::path::Path;
use std::sync::Arc;

/// See the [module](self).
pub(crate) struct Shard {
    units: Arc<Units>,
    index: usize,
    parameters: Vec<Vec<f32>>,
    optimizer: FlatOptimizer,
}

impl Shard {
    /// The shard `index` of `units`, which are sharded over the servers.
    ///
    /// # Errors
    /// The files of `offload` cannot be created.
    pub(crate) fn new(
        units: Arc<Units>,
        index: usize,
        config: &OptimizerConfig,
        offload: Option<&Path>,
    ) -> Result<Self> {
        let len = |unit: usize| units.shard(unit, index).len();
        let parameters = (0..units.units.len()).map(|unit| vec![0.0; len(unit)]).collect();
        let optimizer = FlatOptimizer::new(config, units.clone(), index, offload)?;
        Ok(Self { units, index, parameters, optimizer })
    }

    /// Number of units.
    pub(crate) fn units(&self) -> usize {
        self.parameters.len()
    }

    /// The elements of a unit's shard that are parameters, or padding between them: workers have no padding at the end.
    pub(crate) fn part(&self, unit: usize) -> usize {
        self.units.within(unit, self.index).len()
    }

    /// The parameters of a unit.
    pub(crate) fn parameters(&self, unit: usize) -> &[f32] {
        &self.parameters[unit][..self.part(unit)]
    }

    /// The parameters of a unit, to write.
    pub(crate) fn parameters_mut(&mut self, unit: usize) -> &mut [f32] {
        let part = self.part(unit);
        &mut self.parameters[unit][..part]
    }

    /// Moments of a unit, as checkpoints call them.
    pub(crate) fn moments(&self, kind: &str, unit: usize) -> Option<&[f32]> {
        let part = self.part(unit);
        let (_, moments) = self.optimizer.state().find(|(name, _)| *name == kind)?;
        moments.get(unit).map(|moments| &moments[..part])
    }

    /// Moments of a unit, to write.
    pub(crate) fn moments_mut(&mut self, kind: &str, unit: usize) -> Option<&mut [f32]> {
        let part = self.part(unit);
        let (_, mut moments) = self.optimizer.state_mut().find(|(name, _)| *name == kind)?;
        (unit < moments.len()).then(|| &mut moments.swap_remove(unit)[..part])
    }

    /// Updates so far.
    pub(crate) fn updates(&self) -> u64 {
        self.optimizer.updates()
    }

    /// Sets the number of updates so far.
    pub(crate) fn set_updates(&mut self, updates: u64) {
        self.optimizer.set_updates(updates);
    }

    /// Begins an update of all units.
    pub(crate) fn begin(&mut self) {
        self.optimizer.begin();
    }

    /// Updates a unit.
    pub(crate) fn update(&mut self, unit: usize, gradients: &[f32], commit: Commit) {
        let parameters = &mut self.parameters[unit];
        self.optimizer.update(unit, parameters, gradients, commit.lr, commit.scale);
    }

    /// The sum of squares of a unit's gradients, without running statistics.
    pub(crate) fn squares(&self, unit: usize, gradients: &[f32]) -> f64 {
        self.units.squares(unit, self.units.shard(unit, self.index), gradients)
    }
}
