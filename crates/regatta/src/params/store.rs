//! The memory of a model's parameters, one block for each unit.

use super::device_copies::DeviceCopies;
use super::placed::PlacedParam;
use super::units::Units;
use crate::autograd::{Memory, view};
use burn::tensor::Tensor;
use regatta_plan::Piece;
use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Owns the numbers of a model's parameters, which are views of it. The optimizer updates them in place.
pub struct ParamStore {
    units: Arc<Units>,
    /// The index of the parameter at each path.
    index: HashMap<String, usize>,
    /// By unit: all shards, which the model's parameters view.
    memory: Vec<Arc<Memory>>,
    /// The index of the shard that this rank owns in every unit.
    shard: usize,
    /// By unit: this rank's shard, if the other shards are only gathered for a while.
    shards: Option<Vec<Vec<f32>>>,
    /// By parameter: whether its numbers have been written.
    filled: Vec<bool>,
    /// A second handle to every view, so that Burn's kernels do not reuse the memory in place.
    views: Vec<Box<dyn Any + Send>>,
    /// The copies that layers use instead, if they run on a device or with 16-bit numbers.
    copies: Option<DeviceCopies>,
    /// By unit: whether it has changed since the copies were last updated.
    changed: Vec<bool>,
}

impl ParamStore {
    /// Memory for `units`. This rank owns the shard `shard` of each unit. With `keep_shard_only`, that shard has separate
    /// memory, and the other shards are only gathered for a while. The system provides memory only when it is first written.
    pub(crate) fn new(units: Arc<Units>, shard: usize, keep_shard_only: bool) -> Self {
        let named = units.params.iter().enumerate();
        let own = |unit: usize| vec![0.0; units.shard(unit, shard).len()];
        Self {
            index: named.map(|(index, param)| (param.spec.path.clone(), index)).collect(),
            memory: units.units.iter().map(|unit| Memory::zeroed(unit.len)).collect(),
            shards: keep_shard_only.then(|| (0..units.units.len()).map(own).collect()),
            changed: vec![true; units.units.len()],
            filled: vec![false; units.params.len()],
            shard,
            units,
            views: vec![],
            copies: None,
        }
    }

    /// The parameters and their units.
    pub fn units(&self) -> &Arc<Units> {
        &self.units
    }

    /// The index of the shard that this rank owns in every unit.
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// The index of the parameter at `path`.
    pub(crate) fn find(&self, path: &str) -> Option<usize> {
        self.index.get(path).copied()
    }

    /// Whether the numbers of a parameter have been written.
    pub(crate) fn is_filled(&self, param: usize) -> bool {
        self.filled[param]
    }

    /// Calls `draw` to write the numbers of a parameter that this rank keeps, and returns a view of the parameter.
    ///
    /// # Panics
    /// The model did not declare the same parameter when its parameters were described, which is a bug of the model.
    pub(crate) fn fill<const D: usize>(
        &mut self,
        param: &PlacedParam,
        shape: [usize; D],
        mut draw: impl FnMut(&Piece, &mut [f32]),
    ) -> Tensor<D> {
        let path = &param.spec.path;
        let index = self.find(path).filter(|index| self.units.params[*index] == *param);
        let index = index.unwrap_or_else(|| {
            panic!("the model did not declare the parameter {path}, or declared it differently, when it was described")
        });
        self.filled[index] = true;
        let (unit, range) = self.units.place(index);
        match &mut self.shards {
            Some(shards) => {
                let own = self.units.segments(unit, self.units.shard(unit, self.shard));
                for segment in own.filter(|segment| segment.param == index) {
                    draw(&param.piece().narrow(segment.of), &mut shards[unit][segment.within]);
                }
            }
            // SAFETY: no tensor views this part of the unit yet.
            None => draw(&param.piece(), unsafe { self.memory[unit].slice_mut(range.clone()) }),
        }
        self.view(unit, range.start, shape)
    }

    fn view<const D: usize>(&mut self, unit: usize, start: usize, shape: [usize; D]) -> Tensor<D> {
        let tensor: Tensor<D> = view(&self.memory[unit], start, shape);
        self.views.push(Box::new(tensor.clone()));
        Tensor::from_inner(tensor)
    }

    /// The numbers of a unit, all shards together. Shards that are not gathered are zeros.
    pub fn unit(&self, unit: usize) -> &[f32] {
        // SAFETY: the only writers are `unit_mut`, `own_mut` and `release`, which take `&mut self`.
        unsafe { self.memory[unit].slice() }
    }

    /// The numbers of a unit, to write. The model's parameters change at once, so the caller must be the thread that trains
    /// the model, outside of a forward or backward pass.
    pub fn unit_mut(&mut self, unit: usize) -> &mut [f32] {
        let memory = &self.memory[unit];
        // SAFETY: `&mut self` excludes other slices, and the engine trains on the thread that holds the store.
        unsafe { memory.slice_mut(0..memory.len()) }
    }

    fn own_range(&self, unit: usize) -> Range<usize> {
        self.units.shard(unit, self.shard)
    }

    /// The shard of `unit` that this rank owns and updates.
    pub fn own(&self, unit: usize) -> &[f32] {
        match &self.shards {
            Some(shards) => &shards[unit],
            None => &self.unit(unit)[self.own_range(unit)],
        }
    }

    /// The shard of `unit` that this rank owns and updates, to write.
    pub fn own_mut(&mut self, unit: usize) -> &mut [f32] {
        self.changed[unit] = true;
        let range = self.own_range(unit);
        match &mut self.shards {
            Some(shards) => &mut shards[unit],
            None => {
                let memory = &self.memory[unit];
                // SAFETY: as for `unit_mut`.
                unsafe { memory.slice_mut(range) }
            }
        }
    }

    /// Returns the memory of a unit's gathered shards to the system; they are zeros from now on. Only for a store that keeps
    /// this rank's shard separately.
    pub fn release(&mut self, unit: usize) {
        // SAFETY: as for `unit_mut`.
        unsafe { self.memory[unit].release() }
    }

    /// Makes the store keep `copies` up to date, which layers use instead of the memory.
    pub(crate) fn set_copies(&mut self, copies: DeviceCopies) {
        self.copies = Some(copies);
    }

    /// Updates the copies of a unit, if it has changed. A unit that is only gathered again keeps its copies, because they are
    /// leaves of graphs that have not gone backward yet.
    pub(crate) fn update_copies(&mut self, unit: usize) {
        if std::mem::replace(&mut self.changed[unit], false)
            && let Some(copies) = &self.copies
        {
            copies.fill(&self.units, unit, self.unit(unit));
        }
    }

    /// Bytes of the parameters that are kept from step to step.
    pub fn bytes(&self) -> usize {
        match &self.shards {
            Some(shards) => shards.iter().map(|shard| size_of_val(&shard[..])).sum(),
            None => self.units.units.iter().map(|unit| unit.len * size_of::<f32>()).sum(),
        }
    }
}
