//! The sections of a configuration and their defaults.

use super::path_as_text;
use crate::autograd::{DeviceChoice, Precision};
use crate::data::sampler::LastBatch;
use crate::models::ModelConfig;
use regatta_plan::{Compress, CompressKind, Local, Outer, Recompute, ScheduleKind, SyncMode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The configuration of a run. It is kept in every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The model.
    pub model: ModelConfig,
    /// The data.
    pub data: DataConfig,
    /// Steps, batch, and how often to log, evaluate and save.
    pub train: TrainConfig,
    /// How parameters are updated.
    pub optimizer: OptimizerConfig,
    /// How the work is distributed over ranks.
    pub parallel: ParallelConfig,
    /// How workers encode the gradients that they send each other.
    #[serde(default)]
    pub compress: CompressConfig,
    /// When islands come together.
    #[serde(default)]
    pub local: LocalConfig,
    /// Whom workers wait for, and the parameter servers.
    #[serde(default)]
    pub sync: SyncConfig,
    /// Text generated at the end of a language model's run.
    pub sample: SampleConfig,
}

/// Values of `[data] kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DataKind {
    /// The text of a file or folder (`path`).
    Text,
    /// The Rust sources of the crates that cargo has downloaded.
    Rust,
    /// MNIST digits in IDX files (`path`).
    Mnist,
    /// CIFAR-10 in its binary files (`path`).
    Cifar10,
    /// Generated images of the size that the model takes (`classes`, `samples`).
    Synthetic,
    /// The program's own data ([`register`](crate::datasets::register)).
    Own,
}

impl DataKind {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Rust => "rust",
            Self::Mnist => "mnist",
            Self::Cifar10 => "cifar10",
            Self::Synthetic => "synthetic",
            Self::Own => "own",
        }
    }

    /// Whether samples are cut from text.
    pub fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Rust)
    }
}

/// Values of `[data] tokenizer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// One token per character that occurs in the text.
    Chars,
    /// One token per byte.
    Bytes,
    /// Byte-level byte-pair encoding, trained on the text or loaded from `tokenizer_path`.
    Bpe,
}

impl TokenizerKind {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chars => "chars",
            Self::Bytes => "bytes",
            Self::Bpe => "bpe",
        }
    }
}

/// The section `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The kind of data.
    pub kind: DataKind,
    /// The file or folder, for `text`, `mnist` and `cifar10`.
    #[serde(serialize_with = "path_as_text::option")]
    pub path: Option<PathBuf>,
    /// Where prepared data is kept between runs.
    #[serde(serialize_with = "path_as_text::path")]
    pub cache: PathBuf,
    /// How text is split into tokens.
    pub tokenizer: TokenizerKind,
    /// Number of tokens of a `bpe` vocabulary that is trained.
    pub vocab_size: usize,
    /// A `tokenizer.json` to load, or a folder with it or with GPT-2's `vocab.json` and `merges.txt`.
    #[serde(serialize_with = "path_as_text::option")]
    pub tokenizer_path: Option<PathBuf>,
    /// Fraction of the text that is held out for validation.
    pub val_fraction: f64,
    /// Most MiB of text that are used, for `rust`.
    pub max_mib: usize,
    /// Shift images by up to this many pixels at random, for `mnist` and `cifar10`; the latter are then mirrored too.
    pub shift: usize,
    /// Number of classes, for `synthetic`.
    pub classes: usize,
    /// Number of training images, for `synthetic`; a tenth as many are held out.
    pub samples: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            kind: DataKind::Text,
            path: None,
            cache: "data".into(),
            tokenizer: TokenizerKind::Chars,
            vocab_size: 2048,
            tokenizer_path: None,
            val_fraction: 0.1,
            max_mib: 16,
            shift: 0,
            classes: 10,
            samples: 10_000,
        }
    }
}

/// Values of `[train] on_user_signal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUserSignal {
    /// Write a checkpoint and continue.
    Save,
    /// Write a checkpoint and stop.
    Stop,
}

/// The section `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Samples per step over all workers. Give this or `batch_per_worker`.
    pub batch: Option<usize>,
    /// Samples per step on each worker.
    pub batch_per_worker: Option<usize>,
    /// Micro-batches into which a worker's samples are split.
    pub accumulate: usize,
    /// Seed of initial weights, order of samples and dropout.
    pub seed: u64,
    /// Steps between lines in metrics.jsonl.
    pub log_every: usize,
    /// Steps between evaluations; 0: only at the end.
    pub eval_every: usize,
    /// Batches per evaluation, each as large as a step's; 0: all of the held-out data.
    pub eval_batches: usize,
    /// Steps between checkpoints; 0: only by time and at the end.
    pub checkpoint_every: usize,
    /// Minutes between checkpoints; 0: only by steps and at the end.
    pub checkpoint_minutes: f64,
    /// How many of the newest checkpoints are kept, besides the best one.
    pub keep: usize,
    /// One checkpoint of every this many steps is kept for good; 0: none.
    pub keep_every: usize,
    /// Where checkpoints are written: a folder, or a URL as `s3://bucket/prefix`; absent: `checkpoints` in the run's
    /// folder.
    pub checkpoint_url: Option<String>,
    /// A file for a trace of all ranks, in the format of Chrome's and Perfetto's trace viewers; absent: none.
    #[serde(serialize_with = "path_as_text::option")]
    pub trace: Option<PathBuf>,
    /// Time every operation of every step, for the summary.
    pub profile: bool,
    /// How to handle samples that do not fill an epoch's last batch.
    pub last_batch: LastBatch,
    /// `cpu`, `vulkan`, `cuda` or `wgpu`: what ranks compute on. With `:N`, all ranks of a host use its N-th such
    /// device; without, each rank uses the next one.
    pub device: DeviceChoice,
    /// `f32`, `bf16` or `f16`: type of activations and their gradients. Parameters and their sums stay f32.
    pub precision: Precision,
    /// Initial factor by which the loss is multiplied before backward. It is halved when gradients overflow, and
    /// doubled after 2000 steps without overflow. Absent: 65536 under `f16`, no scaling otherwise.
    pub loss_scale: Option<f64>,
    /// Steps between checks that all ranks hold the same parameters; 0: only at the end.
    pub check_every: usize,
    /// What SIGUSR1 and SIGUSR2 cause. `save`: write a checkpoint and continue. `stop`: write a checkpoint and stop.
    pub on_user_signal: OnUserSignal,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: None,
            batch_per_worker: None,
            accumulate: 1,
            seed: 1337,
            log_every: 10,
            eval_every: 0,
            eval_batches: 20,
            checkpoint_every: 0,
            checkpoint_minutes: 15.0,
            keep: 1,
            keep_every: 0,
            checkpoint_url: None,
            trace: None,
            profile: false,
            last_batch: LastBatch::Drop,
            device: DeviceChoice::default(),
            precision: Precision::default(),
            loss_scale: None,
            check_every: 0,
            on_user_signal: OnUserSignal::Save,
        }
    }
}

/// Values of `[optimizer] kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    AdamW,
    /// Stochastic gradient descent, with momentum where `momentum` is above 0.
    Sgd,
}

/// The section `[optimizer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end of the cosine decay; absent: a tenth of `lr`.
    pub min_lr: Option<f64>,
    /// Steps of linear warm-up from 0 to `lr`.
    pub warmup: usize,
    /// Steps until the cosine decay reaches `min_lr`; absent: `train.steps`.
    pub decay_steps: Option<usize>,
    /// Keep `lr` after the warm-up, without decay.
    pub constant: bool,
    /// Weight decay of parameters with two or more dimensions; norms and biases have none.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's term against division by zero.
    pub eps: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// Largest global norm of the gradient; 0: no clipping.
    pub clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-3,
            min_lr: None,
            warmup: 0,
            decay_steps: None,
            constant: false,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            momentum: 0.0,
            clip: 1.0,
        }
    }
}

impl OptimizerConfig {
    /// Numbers that it keeps for each parameter.
    pub(crate) fn moments(&self) -> usize {
        match self.kind {
            OptimizerKind::AdamW => 2,
            OptimizerKind::Sgd => usize::from(self.momentum > 0.0),
        }
    }
}

/// The section `[parallel]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Number of local ranks; absent: as many as `mesh` has, or the best number for the machine.
    pub workers: Option<usize>,
    /// Named axes and their sizes, as in `data=2,tensor=2,pipe=2`; absent: all ranks along `data`.
    pub mesh: Option<String>,
    /// What is sharded over `data`: 1 optimizer state, 2 gradients too, 3 parameters too; 0: nothing.
    pub zero: u8,
    /// Blocks whose parameters are gathered ahead of their use, under `zero` 3.
    pub prefetch: usize,
    /// Keep the optimizer's state in a file of the run's folder instead of in memory.
    pub offload: bool,
    /// `gpipe`, `1f1b`, `interleaved` or `zero-bubble`: the order of the pipeline stages' tasks.
    pub schedule: ScheduleKind,
    /// Chunks of the model on each stage; absent: 2 for `interleaved`, 1 for the others.
    pub chunks: Option<usize>,
    /// Sequence parallelism: split the activations between split layers by time.
    pub sequence: bool,
    /// `none`, `block` or `all`: which activations backward computes again instead of keeping them.
    pub recompute: Recompute,
    /// Which dimension is split over which axis. By default `heads`, `mlp` and `vocab` are split over `tensor`; the
    /// value `none` leaves a dimension whole.
    pub layout: BTreeMap<String, String>,
    /// Memory of each rank in MiB that the plan must fit; absent: not checked.
    pub memory_mib: Option<f64>,
    /// Threads of each worker; absent: its share of the cores.
    pub threads: Option<usize>,
    /// `thread`, `shm`, `tcp` or `mpi`; absent: the fastest that every pair of ranks shares.
    pub transport: Option<String>,
    /// Algorithm for the operations that it supports, as `ring` or `tree`; absent: as the tuning table says.
    pub algorithm: Option<String>,
    /// Upper bound of a gradient bucket in MiB.
    pub bucket_mib: f64,
    /// Seconds without progress after which a wait becomes an error.
    pub deadline_s: f64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            workers: None,
            mesh: None,
            zero: 0,
            prefetch: 1,
            offload: false,
            schedule: ScheduleKind::default(),
            chunks: None,
            sequence: false,
            recompute: Recompute::None,
            layout: BTreeMap::new(),
            memory_mib: None,
            threads: None,
            transport: None,
            algorithm: None,
            bucket_mib: 25.0,
            deadline_s: 30.0,
        }
    }
}

/// The section `[compress]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressConfig {
    /// `none`, `bf16`, `f16`, `int8`, `int4`, `onebit`, `topk`, `randomk`, `dgc` or `powersgd`.
    pub kind: CompressKind,
    /// The part of the gradients that `topk`, `randomk` and `dgc` send.
    pub ratio: f64,
    /// The rank of the matrices that `powersgd` sends.
    pub rank: usize,
    /// The momentum with which `dgc` adds gradients up before it sends them.
    pub momentum: f64,
    /// Steps in which the part that `dgc` sends shrinks to `ratio`, or in which `onebit` sends gradients as they are.
    pub warmup: usize,
    /// How the stages of a pipeline encode activations and their gradients: `none`, `bf16` or `int8`.
    pub pipeline: CompressKind,
}

impl From<Compress> for CompressConfig {
    fn from(compress: Compress) -> Self {
        Self {
            kind: compress.kind,
            ratio: f64::from(compress.millionths) / 1e6,
            rank: compress.rank,
            momentum: f64::from(compress.momentum) / 1e6,
            warmup: compress.warm_up as usize,
            pipeline: compress.pipeline,
        }
    }
}

impl Default for CompressConfig {
    fn default() -> Self {
        Compress::default().into()
    }
}

/// The section `[local]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LocalConfig {
    /// Steps from one time that islands come together to the next; 0: they exchange gradients in every step.
    pub every: usize,
    /// How they combine: `average`, `diloco` or `gossip`.
    pub outer: Outer,
    /// Steps before, in which islands exchange gradients.
    pub start: usize,
    /// The learning rate of `diloco`'s outer optimizer.
    pub lr: f64,
    /// The momentum of `diloco`'s outer optimizer.
    pub momentum: f64,
    /// Parts of the model, of which one comes together at a time.
    pub fragments: usize,
    /// Steps that go on while a part is on its way.
    pub overlap: usize,
    /// How much of its own parameters an island keeps where steps went on meanwhile.
    pub mixing: f64,
}

impl From<Local> for LocalConfig {
    fn from(local: Local) -> Self {
        Self {
            every: local.every as usize,
            outer: local.outer,
            start: local.start as usize,
            lr: f64::from(local.lr) / 1e6,
            momentum: f64::from(local.momentum) / 1e6,
            fragments: local.fragments as usize,
            overlap: local.overlap as usize,
            mixing: f64::from(local.mixing) / 1e6,
        }
    }
}

impl Default for LocalConfig {
    fn default() -> Self {
        Local::default().into()
    }
}

/// The section `[sync]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SyncConfig {
    /// Parameter servers: ranks besides the workers that keep the parameters and the optimizer; 0: none.
    pub servers: usize,
    /// `sync`, `async` or `ssp`: whom a worker waits for.
    pub mode: SyncMode,
    /// Steps that a worker may be ahead of the slowest, with `ssp`; 0: as `sync`.
    pub staleness: usize,
}

/// The section `[sample]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Text to continue; absent: no text is generated.
    pub prompt: Option<String>,
    /// Tokens to generate.
    pub tokens: usize,
    /// Values below 1 prefer likely tokens, values above 1 make unlikely ones more frequent; 0: always the likeliest
    /// token.
    pub temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all.
    pub top_k: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompt: None, tokens: 200, temperature: 0.8, top_k: 50 }
    }
}
