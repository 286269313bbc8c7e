//! Between Burn's gradients and the buckets: those that no hook has seen go in, averages come out.

use crate::autograd::{Wanted, detached, fetch};
use crate::error::{Error, Result};
use crate::parallel::GradientSync;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

/// Hands over the gradients of one backward pass that no hook has seen. Returns a parameter that had one.
///
/// # Errors
/// A parameter that would be updated without having been averaged, or one that `model` lacks; a device that fails.
pub(super) fn supply<M: Module>(
    sync: &GradientSync,
    model: &M,
    grads: &GradientsParams,
) -> Result<Option<usize>> {
    let mut unseen = Unseen { sync, grads, path: vec![], present: 0, foreign: None, wanted: vec![] };
    model.visit(&mut unseen);
    if let Some(path) = unseen.foreign {
        return Err(Error::Usage(format!(
            "parameter {path} has a gradient that is not averaged: it was frozen, or of another shape or place, when \
             DistributedOptimizer was made; make it anew after such a change"
        )));
    }
    let layout = sync.layout();
    if unseen.present != layout.specs.len() {
        let mut names = Names::default();
        model.visit(&mut names);
        let lost = layout.specs.iter().find(|spec| !names.found.contains(&spec.path));
        return Err(Error::Usage(format!(
            "the model has no parameter {}, which the one given to DistributedOptimizer has; step() takes the model that \
             DistributedOptimizer returned",
            lost.map_or("of the same name and shape", |spec| spec.path.as_str())
        )));
    }
    let mut wanted = unseen.wanted;
    // The first bucket is that of the last parameters: it can leave while the others are filled.
    wanted.reverse();
    let one = wanted.first().map(|(index, _)| *index);
    fetch(wanted, |index, values| {
        sync.supply(index, values);
        Ok(())
    })?;
    Ok(one)
}

struct Unseen<'a> {
    sync: &'a GradientSync,
    grads: &'a GradientsParams,
    path: Vec<String>,
    /// Parameters of the layout that were met.
    present: usize,
    foreign: Option<String>,
    wanted: Vec<(usize, Wanted)>,
}

impl ModuleVisitor for Unseen<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let layout = self.sync.layout();
        let index = layout.find(&path).filter(|&index| layout.specs[index].shape == param.base().dims());
        let gradient = self.grads.get::<D>(param.id);
        match (index, gradient) {
            (None, Some(_)) => drop(self.foreign.get_or_insert(path)),
            (None, None) => {}
            (Some(index), gradient) => {
                self.present += 1;
                if let Some(gradient) = gradient.filter(|_| !self.sync.is_hooked(index)) {
                    self.wanted.push((index, Wanted::of(gradient)));
                }
            }
        }
    }
}

#[derive(Default)]
struct Names {
    path: Vec<String>,
    found: Vec<String>,
}

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        self.found.push(self.path.join("."));
    }
}

/// Replaces the numbers of `grads` by the averages times `scale`. Returns with them the names of parameters that had no
/// gradient on any rank.
pub(super) fn replace<M: Module>(
    sync: &GradientSync,
    model: &M,
    grads: GradientsParams,
    scale: f32,
) -> (GradientsParams, Vec<String>) {
    let mut replace = Replace { sync, grads, path: vec![], scale, missing: vec![] };
    model.visit(&mut replace);
    (replace.grads, replace.missing)
}

struct Replace<'a> {
    sync: &'a GradientSync,
    grads: GradientsParams,
    path: Vec<String>,
    scale: f32,
    missing: Vec<String>,
}

impl ModuleVisitor for Replace<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let Some(index) = self.sync.layout().find(&path) else { return };
        let Some(mut values) = self.sync.gradient(index) else { return self.missing.push(path) };
        if self.scale != 1.0 {
            values.iter_mut().for_each(|x| *x *= self.scale);
        }
        let base = detached(param.base());
        let data = TensorData::new(values, base.dims()).convert_dtype(base.dtype());
        self.grads.register(param.id, Tensor::<D>::from_data(data, (&base.device(), base.dtype())));
    }
}
