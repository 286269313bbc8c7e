//! Normalisation over the last dimension.

use super::{Initializer, ParamBuilder};
use crate::autograd::normalise;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Added to the variance, so that the division is defined.
const EPS: f32 = 1e-5;

/// A kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Layer norm (Ba et al. 2016, "Layer Normalization").
    #[default]
    Layer,
    /// RMS norm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"), which has no bias.
    Rms,
}

/// Normalises its input over the last dimension, multiplies it by `gamma` and adds `beta`.
#[derive(Module, Debug)]
pub struct Norm {
    gamma: Param<Tensor<1>>,
    beta: Option<Param<Tensor<1>>>,
    #[module(skip)]
    norm: regatta_kernel::norm::Norm,
}

impl Norm {
    /// A norm over `width` elements. With `bias`, a layer norm has `beta`.
    pub fn new(params: &ParamBuilder, width: usize, kind: NormKind, bias: bool) -> Self {
        let (dims, centred) = ([&[("embed", width)][..]], kind == NormKind::Layer);
        Self {
            gamma: params.param_of_region("gamma", dims, Initializer::Constant(1.0)),
            beta: (bias && centred).then(|| params.param_of_region("beta", dims, Initializer::Constant(0.0))),
            norm: regatta_kernel::norm::Norm { centred, eps: EPS },
        }
    }

    /// Maps `[.., width]` to `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        normalise(x, self.gamma.val(), self.beta.as_ref().map(Param::val), self.norm)
    }
}
