//! **Regatta** trains deep-learning models on many workers, on [Burn](https://burn.dev) tensors.
//!
//! Two ways in:
//! - a loop of your own on any Burn module: [`init`], [`broadcast_parameters`], [`DistributedOptimizer`];
//! - Regatta's models and loop: [`train::train`], as the `regatta` program does.
//!
//! Below both lie [`parallel`] (how a model is spread over ranks) and the crate `regatta-comm` (how ranks talk).

// A library does not write to its user's terminal, and a closed pipe must not end a run.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod autograd;
pub mod checkpoint;
pub mod data;
mod error;
mod face;
mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod json;
pub mod layers;
pub mod models;
pub mod parallel;
pub mod train;

pub use error::{Error, Result};
pub use face::{DistributedOptimizer, all_reduce, broadcast_parameters, init, local_rank, rank, size};
pub use generate::Generator;
pub use regatta_comm as comm;
pub use regatta_kernel::random;
pub use regatta_plan as plan;
