//! Strategies that spread one model over ranks. Data parallelism is the first.

mod data;
mod layout;
mod params;

pub use data::{CommTime, GradientSync, Keep};
pub use layout::{Layout, ParamSpec, param_specs};
pub use params::ParamStore;
