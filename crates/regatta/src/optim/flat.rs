//! AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") and SGD for the shard of each unit that a rank
//! owns. They work in place, in one pass over parameters, gradients and moments.

use crate::config::OptimizerConfig;
use crate::error::{Error, Result};
use crate::params::Units;
use memmap2::MmapMut;
use regatta_kernel::optimizer::{AdamW, adamw, momentum, sgd};
use std::fs::OpenOptions;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;

/// The weight of a step's statistics in the running statistics, as in PyTorch's batch norm.
const STATISTIC_WEIGHT: f32 = 0.1;
/// Smallest size of a state file in bytes, because an empty file cannot be mapped.
const MIN_FILE_BYTES: usize = 4096;

/// An optimizer with its state for the parameters that this rank owns.
pub struct FlatOptimizer {
    config: OptimizerConfig,
    units: Arc<Units>,
    /// The index of the shard that this rank owns in every unit.
    shard: usize,
    /// By unit: first moments (AdamW) or velocities (SGD with momentum); empty for SGD without momentum.
    first: Vec<Moments>,
    /// By unit: second moments (AdamW); otherwise empty.
    second: Vec<Moments>,
    /// The number of updates so far, for the bias correction.
    updates: u64,
    /// Updates after which the second moments stay as they are.
    learns_scale_for: u64,
}

/// Moments in memory or in a file.
enum Moments {
    Heap(Vec<f32>),
    File(MmapMut),
}

impl Moments {
    fn new(len: usize, file: Option<&Path>) -> Result<Self> {
        let Some(path) = file else { return Ok(Self::Heap(vec![0.0; len])) };
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = options.map_err(Error::io("create", path))?;
        let bytes = (len * size_of::<f32>()).max(MIN_FILE_BYTES);
        file.set_len(bytes as u64).map_err(Error::io("grow", path))?;
        // SAFETY: this process has just created the file under a unique name, so no other process changes it.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(Error::io("map", path))?;
        // The system deletes an unlinked file when the process ends, also when it is killed.
        std::fs::remove_file(path).map_err(Error::io("unlink", path))?;
        Ok(Self::File(map))
    }

    /// Lets the system reclaim the memory of moments in a file.
    fn page_out(&self) {
        #[cfg(target_os = "linux")]
        if let Self::File(map) = self {
            // SAFETY: the map is shared, so its numbers stay in the file.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl Deref for Moments {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Heap(values) => values,
            Self::File(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for Moments {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Heap(values) => values,
            Self::File(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

impl FlatOptimizer {
    /// An optimizer for the shard `shard` of every unit, whose state is zero. With `offload`, the state is in files in that
    /// folder.
    ///
    /// # Errors
    /// The files cannot be created.
    pub fn new(
        config: &OptimizerConfig,
        units: Arc<Units>,
        shard: usize,
        offload: Option<&Path>,
    ) -> Result<Self> {
        if let Some(folder) = offload {
            std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let zeros = |wanted: bool, kind: &str| -> Result<Vec<Moments>> {
            let count = if wanted { units.units.len() } else { 0 };
            let moments = |unit: usize| {
                let file = offload.map(|folder| folder.join(format!("{kind}-{unit}-{}", std::process::id())));
                Moments::new(units.shard(unit, shard).len(), file.as_deref())
            };
            (0..count).map(moments).collect()
        };
        let moments = config.moments();
        let (first, second) = (zeros(moments > 0, "first")?, zeros(moments > 1, "second")?);
        let learns_scale_for = u64::MAX;
        Ok(Self { config: config.clone(), first, second, updates: 0, learns_scale_for, units, shard })
    }

    /// An optimizer whose state other ranks have: it only counts updates.
    pub fn elsewhere(config: &OptimizerConfig, units: Arc<Units>) -> Self {
        let (first, second) = (vec![], vec![]);
        Self {
            config: config.clone(),
            first,
            second,
            updates: 0,
            learns_scale_for: u64::MAX,
            units,
            shard: 0,
        }
    }

    /// After so many updates the second moment of AdamW stays as it is: gradients of which only signs arrive say nothing of
    /// their size (Tang et al. 2021, "1-bit Adam", algorithm 1).
    pub fn learn_scale_for(&mut self, updates: u64) {
        self.learns_scale_for = updates;
    }

    /// Begins an update of all units.
    pub fn begin(&mut self) {
        self.updates += 1;
    }

    /// Updates this rank's shard of `unit`, `parameters`, with learning rate `lr`. Gradients are first multiplied by `scale`,
    /// for clipping. Running statistics become the moving average of `gradients`.
    pub fn update(&mut self, unit: usize, parameters: &mut [f32], gradients: &[f32], lr: f64, scale: f64) {
        let config = &self.config;
        let correction = |beta: f64, updates: u64| 1.0 - beta.powi(updates.min(i32::MAX as u64) as i32);
        let learned = self.updates.min(self.learns_scale_for);
        let beta2 = if learned < self.updates { 1.0 } else { config.beta2 };
        let correction1 = correction(config.beta1, self.updates);
        let correction2 = correction(config.beta2, learned);
        let mut first = self.first.get_mut(unit);
        let mut second = self.second.get_mut(unit);
        for segment in self.units.segments(unit, self.units.shard(unit, self.shard)) {
            let range = segment.within;
            if self.units.params[segment.param].statistic {
                let (running, batch) = (&mut parameters[range.clone()], &gradients[range]);
                running
                    .iter_mut()
                    .zip(batch)
                    .for_each(|(running, batch)| *running += STATISTIC_WEIGHT * (batch - *running));
                continue;
            }
            let decays = self.units.params[segment.param].spec.shape.len() >= 2;
            let decay = (1.0 - if decays { lr * config.weight_decay } else { 0.0 }) as f32;
            let (parameters, gradients) = (&mut parameters[range.clone()], &gradients[range.clone()]);
            let first = first.as_mut().map(|numbers| &mut numbers[range.clone()]);
            let second = second.as_mut().map(|numbers| &mut numbers[range]);
            match (first, second) {
                (Some(first), Some(second)) => {
                    let rule = AdamW {
                        scale: scale as f32,
                        decay,
                        beta1: config.beta1 as f32,
                        beta2: beta2 as f32,
                        step: (lr / correction1) as f32,
                        root: (1.0 / correction2.sqrt()) as f32,
                        eps: config.eps as f32,
                    };
                    adamw(parameters, gradients, first, second, rule);
                }
                (Some(velocity), None) => {
                    let mu = config.momentum as f32;
                    momentum(parameters, gradients, velocity, scale as f32, decay, mu, lr as f32);
                }
                _ => sgd(parameters, gradients, scale as f32, decay, lr as f32),
            }
        }
        for numbers in [self.first.get(unit), self.second.get(unit)].into_iter().flatten() {
            numbers.page_out();
        }
    }

    /// The state by name, `first` and `second`: for each, the moments of this rank's shard of every unit.
    pub fn state(&self) -> impl Iterator<Item = (&'static str, Vec<&[f32]>)> {
        let kinds = [("first", &self.first), ("second", &self.second)].into_iter();
        kinds
            .filter(|(_, numbers)| !numbers.is_empty())
            .map(|(kind, numbers)| (kind, numbers.iter().map(|part| &**part).collect()))
    }

    /// As [`state`](Self::state), to write.
    pub fn state_mut(&mut self) -> impl Iterator<Item = (&'static str, Vec<&mut [f32]>)> {
        let kinds = [("first", &mut self.first), ("second", &mut self.second)].into_iter();
        kinds
            .filter(|(_, numbers)| !numbers.is_empty())
            .map(|(kind, numbers)| (kind, numbers.iter_mut().map(|part| &mut **part).collect()))
    }

    /// Bytes of the state.
    pub fn bytes(&self) -> usize {
        self.state().flat_map(|(_, parts)| parts).map(size_of_val).sum()
    }

    /// The number of moments of each parameter: 0 to 2.
    pub fn moments(&self) -> usize {
        usize::from(!self.first.is_empty()) + usize::from(!self.second.is_empty())
    }

    /// The number of updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Sets the number of updates so far.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}
