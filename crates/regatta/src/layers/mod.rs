//! Layers for models. The dimensions of their parameters have names. The names and the plan's layout determine the part
//! of a parameter that a rank holds, and the collectives of the forward and backward pass. Initial weights depend only on
//! the seed and the parameter's path.
//!
//! A layer panics if a tensor does not have the documented shape, or is not on the device of the layer's parameters.

mod attention;
mod context;
mod convolution;
mod dropout;
mod feed_forward;
mod linear;
mod loss;
mod norm;
mod transformer_layer;
mod vocabulary;

pub use crate::autograd::Split;
pub use crate::params::{Initializer, ParamBuilder};
pub use attention::{Attention, CrossAttention, Deviations};
pub use context::Context;
pub use convolution::{BatchNorm, Convolution};
pub use dropout::{dropout, dropout_part, residual_part};
pub use feed_forward::ActivationFunction;
pub use linear::{Dims, Linear};
pub use loss::cross_entropy;
pub use norm::{Norm, NormKind};
pub use regatta_kernel::activation::Activation as Nonlinearity;
pub use regatta_kernel::dropout::{Noise, SampleRows};
pub use transformer_layer::{LayerPass, TransformerConfig, TransformerLayer};
pub use vocabulary::Vocabulary;
