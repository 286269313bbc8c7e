//! Copies the parameters of one rank to all others, bit for bit.

use super::agreement::{first_difference, shape_of};
use crate::error::{Error, Result};
use crate::params::{ParamVisitor, visit_params};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Bool, Int, Tensor, TensorData};
use regatta_comm::Group;

/// As [`broadcast_parameters`](super::broadcast_parameters), over the ranks of `group`.
pub(super) fn broadcast_over<M: Module>(group: &Group, model: M, root: usize) -> Result<M> {
    let Shapes(lines) = visit_params(&model, Shapes::default());
    if let Some(difference) = first_difference(group, &lines)? {
        return Err(Error::Usage(format!(
            "the models differ: {difference}; every rank must create the same model before rank {root}'s parameters are copied"
        )));
    }
    let mut mapper = Broadcast { group, root, error: None };
    let model = model.map(&mut mapper);
    mapper.error.map_or(Ok(model), Err)
}

/// Collects every parameter with its shape and type.
#[derive(Default)]
struct Shapes(Vec<String>);

impl ParamVisitor for Shapes {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let base = param.base();
        self.0.push(format!("{path} {}", shape_of(&base.dims(), base.dtype())));
    }

    fn int<const D: usize>(&mut self, path: String, param: &Param<Tensor<D, Int>>) {
        let base = param.val();
        self.0.push(format!("{path} {}", shape_of(&base.dims(), base.dtype())));
    }

    fn bool<const D: usize>(&mut self, path: String, param: &Param<Tensor<D, Bool>>) {
        let base = param.val();
        self.0.push(format!("{path} {}", shape_of(&base.dims(), base.dtype())));
    }
}

struct Broadcast<'a> {
    group: &'a Group,
    root: usize,
    error: Option<Error>,
}

impl Broadcast<'_> {
    /// The data of rank `root`; data of every rank must have the same type and shape. None after an error.
    fn copied(&mut self, data: Result<TensorData>) -> Option<TensorData> {
        if self.error.is_some() {
            return None;
        }
        let copied = data.and_then(|data| {
            let mut bytes = data.as_bytes().to_vec();
            self.group.broadcast(&mut bytes, self.root)?;
            Ok(TensorData::from_bytes_vec(bytes, data.shape().clone(), data.dtype()))
        });
        copied.map_err(|error| self.error = Some(error)).ok()
    }
}

impl ModuleMapper for Broadcast<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let (device, dtype, tracked) = (tensor.device(), tensor.dtype(), tensor.is_require_grad());
        let data = crate::autograd::detached(tensor.clone()).try_into_data();
        let tensor = match self.copied(data.map_err(unreadable)) {
            // A new leaf on the same device that requires gradients if the old one did.
            Some(data) => {
                let fresh = Tensor::from_data(data, (&device, dtype));
                if tracked { fresh.require_grad() } else { fresh }
            }
            None => tensor,
        };
        Param::from_mapped_value(id, tensor, mapper)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (id, tensor, mapper) = param.consume();
        let (device, dtype) = (tensor.device(), tensor.dtype());
        let tensor = match self.copied(tensor.clone().try_into_data().map_err(unreadable)) {
            Some(data) => Tensor::from_data(data, (&device, dtype)),
            None => tensor,
        };
        Param::from_mapped_value(id, tensor, mapper)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let (id, tensor, mapper) = param.consume();
        let device = tensor.device();
        let tensor = match self.copied(tensor.clone().try_into_data().map_err(unreadable)) {
            Some(data) => Tensor::from_data(data, &device),
            None => tensor,
        };
        Param::from_mapped_value(id, tensor, mapper)
    }
}

fn unreadable(error: impl std::fmt::Debug) -> Error {
    Error::Numeric(format!("a parameter cannot be read from its device: {error:?}"))
}
