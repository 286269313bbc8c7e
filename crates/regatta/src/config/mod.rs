//! The configuration of a training run: a TOML file and the changes by flags and environment variables.

mod check;
mod effects;
mod limits;
mod load;
mod path_as_text;
mod plan;
mod reader;
mod schema;
mod sources;

pub use crate::autograd::{Backend, DeviceChoice, Precision};
pub use crate::data::sampler::LastBatch;
pub use crate::models::ModelConfig;
pub use load::Loaded;
pub use schema::{
    CompressConfig, Config, DataConfig, DataKind, LocalConfig, OnUserSignal, OptimizerConfig, OptimizerKind,
    ParallelConfig, SampleConfig, SyncConfig, TokenizerKind, TrainConfig,
};
pub use sources::{Origin, Override, Sources, VARIABLES};
