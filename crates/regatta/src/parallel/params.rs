//! The parameters of a model in memory of our own, unit by unit.

use super::copies::Copies;
use super::units::Units;
use crate::autograd::{Compute, Memory, to_vec, view};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

/// Owns the numbers that a model's parameters view. The optimizer updates them in place.
pub struct ParamStore {
    memory: Vec<Arc<Memory>>,
    /// A second handle to every view, so that no kernel of Burn takes the memory for its own.
    _views: Vec<Box<dyn Any + Send>>,
    /// What layers see instead, where they compute elsewhere or with other numbers.
    copies: Option<Copies>,
}

impl ParamStore {
    /// Moves the parameters of `model` into a new store and returns the model over it, computing as `compute` says.
    pub fn adopt<M: Module>(model: M, units: &Units, compute: &Compute) -> (M, Self) {
        let memory: Vec<_> = units.units.iter().map(|unit| Memory::zeroed(unit.len)).collect();
        let named = units.params.iter().enumerate();
        let index: HashMap<&str, usize> = named.map(|(i, made)| (made.spec.path.as_str(), i)).collect();
        let mut adopt = Adopt { units, index, memory: &memory, path: vec![], views: vec![] };
        let model = model.map(&mut adopt);
        let views = adopt.views;
        if compute.is_host() {
            return (model, Self { memory, _views: views, copies: None });
        }
        let (model, copies) = Copies::attach(model, units, compute);
        (model, Self { memory, _views: views, copies: Some(copies) })
    }

    /// The numbers of a unit.
    pub fn unit(&self, unit: usize) -> &[f32] {
        // SAFETY: the only writers are `unit_mut` and `release`, which take `&mut self`.
        unsafe { self.memory[unit].slice() }
    }

    /// The numbers of a unit, to write. The model sees them at once, so no forward or backward pass of it may be
    /// running: the caller is the thread that trains the model.
    pub fn unit_mut(&mut self, unit: usize) -> &mut [f32] {
        let memory = &self.memory[unit];
        // SAFETY: `&mut self` excludes other slices; the engine trains on the thread that holds the store.
        unsafe { memory.slice_mut(0..memory.len()) }
    }

    /// Lets layers see the numbers of a unit where they do not see its memory.
    pub(crate) fn show(&self, units: &Units, unit: usize) {
        if let Some(copies) = &self.copies {
            copies.fill(units, unit, self.unit(unit));
        }
    }

    /// What layers see instead of the memory, if so.
    pub(crate) fn copies(&self) -> Option<&Copies> {
        self.copies.as_ref()
    }

    /// Gives a unit's memory back to the system; its numbers are zeros from now on.
    pub fn release(&mut self, unit: usize) {
        // SAFETY: as for `unit_mut`.
        unsafe { self.memory[unit].release() }
    }
}

struct Adopt<'a> {
    units: &'a Units,
    index: HashMap<&'a str, usize>,
    memory: &'a [Arc<Memory>],
    path: Vec<String>,
    views: Vec<Box<dyn Any + Send>>,
}

impl ModuleMapper for Adopt<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let index = self.index.get(path.as_str());
        // Every parameter is made by `Init`, which makes its path known.
        let index =
            *index.unwrap_or_else(|| panic!("the model has a parameter {path} that it did not make known"));
        let (unit, range) = self.units.place(index);
        let memory = &self.memory[unit];
        let (id, tensor, mapper) = param.consume();
        let shape = tensor.dims();
        if let Some(values) = to_vec(tensor) {
            // SAFETY: this part of the block is not yet viewed by any tensor.
            unsafe { memory.slice_mut(range.clone()) }.copy_from_slice(&values);
        }
        let tensor: Tensor<D> = view(memory, range.start, shape);
        self.views.push(Box::new(tensor.clone()));
        Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper)
    }
}
