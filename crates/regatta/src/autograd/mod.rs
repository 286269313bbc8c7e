//! Every contact with Burn's backends and its extension interface, which moves between releases.
//!
//! The rest of the engine sees `Tensor<D>`, `Device` and plain `&[f32]`.

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
#[cfg(test)]
mod tests;
mod work;

pub(crate) use attention::{Rule, Seen, apart, attention};
pub use axis::Axis;
pub(crate) use axis::{copy_to_split, gather_time, scatter_time, sum_of_split};
pub(crate) use batch_norm::{Norm, batch_norm, batch_norm_by_running};
pub(crate) use conv::{convolution, convolution_pooled};
pub(crate) use custom::{fused, node_of, numbers};
pub(crate) use device::cast;
pub use device::{Backend, Compute, DeviceChoice, Precision, device, train_device};
pub(crate) use embedding::{add_positions, rows_of};
pub(crate) use fetch::{Wanted, fetch};
pub(crate) use graph::{backward, detached, leaf, seed};
pub(crate) use hook::{Gradient, GradientHook, Ladder, can_hook, hook_at};
pub(crate) use linear::{Deferred, deferring, linear, linear_by_rows};
pub use loss::IGNORED;
pub(crate) use loss::cross_entropy;
pub use memory::{Memory, keep_freed_memory, to_vec, view};
pub(crate) use norm::normalise;
pub(crate) use pool::mean_of_places;
pub(crate) use residual::{Drops, drop_elements, residual};
pub use work::{Cost, Measured, Phase, recording};
pub(crate) use work::{measured, waiting};
