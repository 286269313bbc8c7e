//! The training loop: one for every plan.

mod config;
mod dataset;
mod evaluate;
mod optimizer;
mod run;
mod schedule;
mod summary;

pub use config::{
    Config, DataConfig, DataKind, LastBatch, ModelConfig, OptimizerConfig, OptimizerKind, ParallelConfig,
    SampleConfig, TokenizerKind, TrainConfig,
};
pub use dataset::{Dataset, Datasets, HostBatch};
pub use evaluate::Score;
pub use optimizer::FlatOptimizer;
pub use run::{Job, Observer, Silent, StepReport, train};
pub use schedule::learning_rate;
pub use summary::{Memory, Summary, peak_rss_bytes};
