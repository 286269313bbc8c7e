//! Updates parameters from their gradients.

mod flat;
mod learning_rate;
mod loss_scale;

pub use flat::FlatOptimizer;
pub use learning_rate::learning_rate;
pub use loss_scale::LossScale;
