//! Copies gradients that no hook has seen from Burn to the buckets, and averages from the buckets to Burn.

use super::sync::GradientSync;
use crate::autograd::{Fetchable, detached, fetch};
use crate::error::{Error, Result};
use crate::params::{ParamVisitor, visit_params};
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

/// Copies the gradients of one backward pass that no hook has seen to the buckets. Returns the index of one such
/// parameter, if there is any.
///
/// # Errors
/// A parameter would be updated with a gradient that is not averaged, `model` lacks a parameter, or a device fails.
pub(super) fn supply<M: Module>(
    sync: &GradientSync,
    model: &M,
    grads: &GradientsParams,
) -> Result<Option<usize>> {
    let unseen = Unseen { sync, grads, present: 0, not_averaged: None, wanted: vec![] };
    let unseen = visit_params(model, unseen);
    if let Some(path) = unseen.not_averaged {
        return Err(Error::Usage(format!(
            "parameter {path} has a gradient that is not averaged: it was frozen, or had another shape or path, when \
             DistributedOptimizer was created; create a new one after such a change"
        )));
    }
    let layout = sync.layout();
    if unseen.present != layout.specs.len() {
        let Names(names) = visit_params(model, Names::default());
        let lost = layout.specs.iter().find(|spec| !names.contains(&spec.path));
        return Err(Error::Usage(format!(
            "the model has no parameter {}, which the one given to DistributedOptimizer has; step() takes the model that \
             DistributedOptimizer returned",
            lost.map_or("of the same name and shape", |spec| spec.path.as_str())
        )));
    }
    let mut wanted = unseen.wanted;
    // The first bucket has the last parameters: it is sent while the others are filled.
    wanted.reverse();
    let first = wanted.first().map(|(index, _)| *index);
    fetch(wanted, |index, values| {
        sync.supply(index, values);
        Ok(())
    })?;
    Ok(first)
}

struct Unseen<'a> {
    sync: &'a GradientSync,
    grads: &'a GradientsParams,
    /// Number of the layout's parameters that were found in the model.
    present: usize,
    not_averaged: Option<String>,
    wanted: Vec<(usize, Fetchable)>,
}

impl ParamVisitor for Unseen<'_> {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let layout = self.sync.layout();
        let index = layout.find(&path).filter(|&index| layout.specs[index].shape == param.base().dims());
        let gradient = self.grads.get::<D>(param.id);
        match (index, gradient) {
            (None, Some(_)) => drop(self.not_averaged.get_or_insert(path)),
            (None, None) => {}
            (Some(index), gradient) => {
                self.present += 1;
                if let Some(gradient) = gradient.filter(|_| !self.sync.is_hooked(index)) {
                    self.wanted.push((index, Fetchable::of(gradient)));
                }
            }
        }
    }
}

#[derive(Default)]
struct Names(Vec<String>);

impl ParamVisitor for Names {
    fn float<const D: usize>(&mut self, path: String, _: &Param<Tensor<D>>) {
        self.0.push(path);
    }
}

/// Replaces the values of `grads` by the averages times `scale`. Returns them, and the paths of the parameters that
/// had no gradient on any rank.
pub(super) fn replace<M: Module>(
    sync: &GradientSync,
    model: &M,
    grads: GradientsParams,
    scale: f32,
) -> (GradientsParams, Vec<String>) {
    let replace = visit_params(model, Replace { sync, grads, scale, missing: vec![] });
    (replace.grads, replace.missing)
}

struct Replace<'a> {
    sync: &'a GradientSync,
    grads: GradientsParams,
    scale: f32,
    missing: Vec<String>,
}

impl ParamVisitor for Replace<'_> {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
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
