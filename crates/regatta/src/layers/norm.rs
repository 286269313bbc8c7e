//! Norms over the last dimension.

use super::{Fill, Init};
use crate::autograd::normalise;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Layer norm (Ba et al. 2016).
    #[default]
    Layer,
    /// RMS norm (Zhang & Sennrich 2019), without a bias.
    Rms,
}

/// `gamma` times the normalised input, plus `beta`.
#[derive(Module, Debug)]
pub struct Norm {
    gamma: Param<Tensor<1>>,
    beta: Option<Param<Tensor<1>>>,
    #[module(skip)]
    norm: regatta_kernel::norm::Norm,
}

impl Norm {
    /// Over `width` elements.
    pub fn new(init: &Init, width: usize, kind: NormKind, bias: bool) -> Self {
        let (dims, centred) = ([&[("embed", width)][..]], kind == NormKind::Layer);
        Self {
            gamma: init.param_of_region("gamma", dims, Fill::Constant(1.0)),
            beta: (bias && centred).then(|| init.param_of_region("beta", dims, Fill::Constant(0.0))),
            norm: regatta_kernel::norm::Norm { centred, eps: 1e-5 },
        }
    }

    /// Of `[.., width]`, the same.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        normalise(x, self.gamma.val(), self.beta.as_ref().map(Param::val), self.norm)
    }
}
