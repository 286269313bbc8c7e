//! Every contact with Burn's backends and its extension interface, which moves between releases.
//!
//! The rest of the engine sees `Tensor<D>`, `Device` and plain `&[f32]`.

mod hook;
mod memory;

pub(crate) use hook::{Gradient, GradientHook, Ladder, hook_at};
pub use memory::{Memory, keep_freed_memory, to_vec, view};

use burn::tensor::Device;

/// The device that plain (not differentiated) tensors of the engine live on.
pub fn device() -> Device {
    Device::flex()
}

/// The same device, recording operations for the backward pass.
pub fn train_device() -> Device {
    device().autodiff()
}
