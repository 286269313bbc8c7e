//! Binds a model to the memory of its parameters: collects the leaves of its graphs, and attaches copies for a device.

use super::device_copies::DeviceCopies;
use super::leaves::Leaves;
use super::placed::PlacedParam;
use super::store::ParamStore;
use super::walk::{ParamVisitor, visit_params};
use crate::autograd::{Compute, to_vec};
use crate::error::{Error, Result};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use regatta_plan::{AxisSet, Dim, TensorSpec};

/// A model whose parameters are in a store.
pub(crate) struct Bound<M> {
    /// The model with autodiff.
    pub model: M,
    /// The same model without autodiff.
    pub evaluator: M,
    /// The parameters as leaves of the model's graphs.
    pub leaves: Leaves,
}

/// Binds `model` to `store`, to run on the device of `compute`. Parameters that the model did not declare move into the
/// store.
pub(crate) fn bind<M: Module>(model: M, store: &mut ParamStore, compute: &Compute) -> Bound<M> {
    let mut model = model.map(&mut MoveIntoStore { store, path: vec![] });
    let units = store.units().clone();
    let mut takes = None;
    if !compute.is_host() {
        let (copied, copies) = DeviceCopies::attach(model, &units, compute);
        model = copied;
        takes = Some(copies.takes().collect());
        store.set_copies(copies);
    }
    let leaves = Leaves::of(&model, &units, takes);
    Bound { evaluator: model.valid(), model, leaves }
}

/// The parameters of `model` that are not in `declared`, such as those of Burn's own layers.
///
/// # Errors
/// There is such a parameter and the model has several blocks, so that the block that uses it is unknown. Such a parameter is
/// not trained: nothing would keep it equal on all ranks, and no checkpoint would have it.
pub(crate) fn undeclared<M: Module>(
    model: &M,
    declared: &[PlacedParam],
    blocks: usize,
) -> Result<Vec<PlacedParam>> {
    let visitor = visit_params(model, UndeclaredVisitor { declared, found: vec![], untrained: None });
    if let Some(path) = visitor.untrained {
        return Err(Error::Usage(format!(
            "{path} was not created by the ParamBuilder and is not trained: a frozen parameter, or a running statistic such \
             as that of Burn's BatchNorm, would differ between ranks and be lost in checkpoints. Use params.statistic(), \
             regatta::layers::BatchNorm, or a constant tensor"
        )));
    }
    match visitor.found.first() {
        Some(param) if blocks > 1 => Err(Error::Usage(format!(
            "the parameter {} was not created by the ParamBuilder, and the model has {blocks} blocks: create it with \
             params.param(), or give the model one block",
            param.spec.path
        ))),
        _ => Ok(visitor.found),
    }
}

/// Collects trainable parameters that are not declared.
struct UndeclaredVisitor<'a> {
    declared: &'a [PlacedParam],
    found: Vec<PlacedParam>,
    untrained: Option<String>,
}

impl ParamVisitor for UndeclaredVisitor<'_> {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        if self.declared.iter().any(|declared| declared.spec.path == path) {
            return;
        }
        // Burn's layers may have been made on a device without gradients.
        let tensor = param.clone().train().val();
        if !tensor.is_require_grad() {
            self.untrained.get_or_insert(path);
            return;
        }
        let shape = tensor.dims().to_vec();
        let dim = |(index, &size): (usize, &usize)| Dim { name: format!("dim{index}"), size };
        self.found.push(PlacedParam {
            ranges: shape.iter().map(|&size| 0..size).collect(),
            spec: TensorSpec { path, dims: shape.iter().enumerate().map(dim).collect(), shape },
            blocks: vec![0],
            split_over: AxisSet::NONE,
            partial_over: AxisSet::NONE,
            statistic: false,
        });
    }
}

/// Moves parameters that are not yet views of the store into it.
struct MoveIntoStore<'a> {
    store: &'a mut ParamStore,
    path: Vec<String>,
}

impl ModuleMapper for MoveIntoStore<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let Some(index) = self.store.find(&path).filter(|&index| !self.store.is_filled(index)) else {
            return param;
        };
        let (id, tensor, mapper) = param.consume();
        let shape = tensor.dims();
        let values = to_vec(tensor).unwrap_or_default();
        let placed = self.store.units().params[index].clone();
        let tensor = self.store.fill(&placed, shape, |piece, out| {
            for run in piece.runs() {
                out[run.local..][..run.len].copy_from_slice(&values[run.global..run.end()]);
            }
        });
        Param::from_mapped_value(id, tensor.require_grad(), mapper)
    }
}
