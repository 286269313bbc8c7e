//! Every contact with Burn's backends and its extension interface, which moves between releases.
//!
//! The rest of the engine sees `Tensor<D>`, `Device` and plain `&[f32]`.

mod axis;
mod batch_norm;
mod conv;
mod custom;
mod embedding;
mod graph;
mod hook;
mod linear;
mod loss;
mod memory;
mod norm;
mod residual;
mod work;

pub use axis::Axis;
pub(crate) use axis::{copy_to_split, gather_time, scatter_time, sum_of_split};
mod pool;

pub(crate) use batch_norm::{Norm, batch_norm, batch_norm_by_running};
pub(crate) use conv::{convolution, convolution_pooled};
pub(crate) use custom::{numbers, plain, tensor_of};
pub(crate) use embedding::{add_positions, rows_of};
pub(crate) use graph::{backward, detached, leaf, seed};
pub(crate) use hook::{Gradient, GradientHook, Ladder, hook_at};
pub(crate) use linear::{Deferred, deferring, linear, linear_by_rows};
pub use loss::IGNORED;
pub(crate) use loss::cross_entropy;
pub use memory::{Memory, keep_freed_memory, to_vec, view};
pub(crate) use norm::normalise;
pub(crate) use pool::mean_of_places;
pub(crate) use residual::{Drops, drop_elements, residual};
pub use work::{Cost, Measured, Phase, recording};
pub(crate) use work::{measured, waiting};

use burn::tensor::Device;

/// The device that plain (not differentiated) tensors of the engine live on.
pub fn device() -> Device {
    Device::flex()
}

/// The same device, recording operations for the backward pass.
pub fn train_device() -> Device {
    device().autodiff()
}
