//! **Regatta** trains deep-learning models on many workers, on [Burn](https://burn.dev) tensors.
//!
//! Three ways in:
//! - a loop of your own on any Burn module: [`init`], [`broadcast_parameters`], [`DistributedOptimizer`];
//! - a model under a plan: [`models::ModelSpec`] and [`models::Model`] say what a model is, [`train::Trainer`] trains it;
//! - a configuration file: [`config::Config`] and [`train::train`], as the `regatta` program does.
//!
//! Plans are data ([`plan`]); how ranks talk is the crate [`comm`].

// A library does not write to its user's terminal, and a closed pipe must not end a run.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod autograd;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod datasets;
mod error;
mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod horovod;
mod json;
pub mod layers;
pub mod models;
mod optim;
mod parallel;
mod params;
pub mod servers;
mod setup;
pub mod train;

pub use autograd::keep_freed_memory;
pub use error::{Error, Result};
pub use generate::Generator;
pub use horovod::{DistributedOptimizer, all_reduce, broadcast_parameters, init, local_rank, rank, size};
pub use parallel::CommTime;
pub use regatta_comm as comm;
pub use regatta_kernel::random;
pub use regatta_plan as plan;
pub use setup::agree;

/// The README's example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
