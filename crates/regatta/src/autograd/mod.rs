//! Everything that depends on Burn's backends and on its extension interface, which changes between releases.
//!
//! The rest of the engine uses only `Tensor<D>`, `Device` and plain `&[f32]`.

mod attention;
mod axis;
mod batch_norm;
mod conv;
mod custom;
mod device;
mod embedding;
mod fetch;
mod graph;
mod hook;
mod linear;
mod loss;
mod memory;
mod norm;
mod pool;
mod residual;
mod split;
#[cfg(test)]
mod tests;
mod work;

pub(crate) use attention::{AttentionInput, AttentionOptions, attention, split_heads};
pub use axis::AxisGroup;

pub(crate) use batch_norm::{BatchNormParams, batch_norm, batch_norm_by_running};
pub(crate) use conv::{convolution, convolution_pooled};
pub(crate) use custom::{fused, node_of, numbers};
pub(crate) use device::cast;
pub use device::{Backend, Compute, DeviceChoice, Precision, device, train_device};
pub(crate) use embedding::{add_positions, rows_of};
pub(crate) use fetch::{Fetchable, fetch};
pub(crate) use graph::{backward, detached, leaf, seed};
pub(crate) use hook::{AnchorChain, Gradient, GradientHook, can_hook, hook_at};
pub(crate) use linear::{Deferred, deferring, linear, linear_by_rows};
pub use loss::IGNORED;
pub(crate) use loss::cross_entropy;
pub use memory::{Memory, keep_freed_memory, to_vec, view};
pub(crate) use norm::normalise;
pub(crate) use pool::global_average_pool;
pub(crate) use residual::{DropoutPart, drop_elements, residual};
pub use split::Split;
pub use work::{Cost, Measured, Phase, recording};
pub(crate) use work::{measured, waiting};
