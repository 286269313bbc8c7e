//! The training loop: one for every plan.

mod agreement;
mod config;
mod dataset;
mod effects;
mod evaluate;
mod fit;
mod folder;
mod limits;
mod losses;
mod metrics;
mod optimizer;
mod path_as_text;
mod pictures;
mod prepare;
mod profile;
mod rank;
mod requests;
mod resume;
mod run;
mod saving;
mod scaling;
mod schedule;
mod sources;
mod summary;
mod trace;
mod volume;

pub use crate::autograd::{Backend, DeviceChoice, Precision};
pub use agreement::agree;
pub use config::{
    Config, DataConfig, DataKind, LastBatch, ModelConfig, OnUserSignal, OptimizerConfig, OptimizerKind,
    ParallelConfig, SampleConfig, TokenizerKind, TrainConfig,
};
pub use dataset::{Dataset, Datasets, HostBatch};
pub use evaluate::Score;
pub use fit::{Change, Misfit};
pub use folder::{claim_folder, holds_run};
pub use losses::read_losses;
pub use optimizer::FlatOptimizer;
pub use profile::{Profile, Row};
pub(crate) use rank::Rank;
pub use requests::Requests;
pub use resume::Resume;
pub(crate) use resume::open_to_read;
pub use run::{Job, Observer, Silent, StepReport, train};
pub(crate) use saving::{check_model, load};
pub use scaling::LossScale;
pub use schedule::learning_rate;
pub use sources::{Loaded, Origin, Override, Sources, VARIABLES};
pub use summary::{Communication, Memory, Pipeline, Summary, peak_rss_bytes};
pub use volume::{Collective, Outline, total};
