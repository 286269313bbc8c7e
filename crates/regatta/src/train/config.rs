//! The configuration of a training run: a TOML file, changed by `--set key.path=value`.

use super::dataset::Datasets;
use super::limits;
use super::path_as_text;
use super::sources::{Loaded, Origin, Override, Sources};
use crate::autograd::{Backend, DeviceChoice, Precision, device};
use crate::data::cifar10;
use crate::error::{Error, Result};
use crate::layers::{Init, Made, Placement};
use crate::models::{
    Batch, BlockCost, Border, Cnn, CnnConfig, EncoderDecoder, EncoderDecoderConfig, Gpt, GptConfig, Mlp,
    MlpConfig, Model, Resnet, ResnetConfig,
};
use burn::tensor::{Int, Tensor};
use regatta_plan::{Layout, Mesh, Plan, PlanError, Recompute, ScheduleKind};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Everything a run depends on. Kept in every checkpoint and summary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The architecture.
    pub model: ModelConfig,
    /// What it learns from.
    pub data: DataConfig,
    /// Steps, batch and how often things happen.
    pub train: TrainConfig,
    /// How parameters are updated.
    pub optimizer: OptimizerConfig,
    /// How the work is spread.
    pub parallel: ParallelConfig,
    /// Text generated at the end of a language model's run.
    pub sample: SampleConfig,
}

/// `[model]`; `kind` says which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum ModelConfig {
    /// A decoder-only transformer.
    Gpt(GptConfig),
    /// A multi-layer perceptron.
    Mlp(MlpConfig),
    /// A convolutional network.
    Cnn(CnnConfig),
    /// A residual network.
    Resnet(ResnetConfig),
    /// An encoder-decoder transformer.
    #[serde(rename = "encoder-decoder")]
    EncoderDecoder(EncoderDecoderConfig),
}

/// Pixels along a side of a digit, and in all of it.
const SIDE: usize = 28;

impl ModelConfig {
    /// What each block costs for one sample, over `vocab` tokens or classes.
    pub fn costs(&self, vocab: usize) -> Vec<BlockCost> {
        match self {
            Self::Gpt(config) => config.costs(vocab, config.block),
            Self::Mlp(config) => config.costs(SIDE * SIDE, vocab),
            Self::Cnn(config) => config.costs(SIDE, vocab),
            Self::Resnet(config) => config.costs(vocab),
            Self::EncoderDecoder(config) => config.costs(vocab),
        }
    }

    /// Numbers that come into each block from the one before, for one sample. The first reads the batch itself.
    pub(super) fn inputs(&self) -> Vec<f64> {
        let blocks = |widths: Vec<usize>| -> Vec<f64> {
            std::iter::once(0.0).chain(widths.into_iter().map(|width| width as f64)).collect()
        };
        match self {
            Self::Gpt(config) => blocks(vec![config.block * config.embed; config.layers + 1]),
            Self::Mlp(config) => blocks(config.hidden.clone()),
            Self::Cnn(config) => {
                let side = |i: usize| SIDE >> (i + 1);
                let convs = config.channels.iter().enumerate().map(|(i, channels)| channels * side(i).pow(2));
                blocks(convs.chain([config.hidden]).collect())
            }
            Self::Resnet(config) => {
                let outputs = config.outputs(0);
                blocks(outputs[..outputs.len() - 1].to_vec())
            }
            Self::EncoderDecoder(config) => {
                let one = config.block * config.embed;
                // Behind the target's embedding there are two: the decoder's and the encoder's.
                let encoder = vec![one; config.encoder_layers + 1];
                blocks([encoder, vec![2 * one; config.decoder_layers + 1]].concat())
            }
        }
    }

    /// The parameters as the rank of `placement` holds them, if it has all blocks.
    pub fn describe(&self, vocab: usize, placement: Placement) -> Vec<Made> {
        let init = Init::describing(placement);
        match self {
            Self::Gpt(config) => drop(Gpt::new(config, vocab, &init)),
            Self::Mlp(config) => drop(Mlp::new(config, SIDE * SIDE, vocab, &init)),
            Self::Cnn(config) => drop(Cnn::new(config, SIDE, vocab, &init)),
            Self::Resnet(config) => drop(Resnet::new(config, vocab, &init)),
            Self::EncoderDecoder(config) => drop(EncoderDecoder::new(config, vocab, &init)),
        }
        init.made()
    }

    /// By block, the shapes of what it hands on for a micro-batch of `rows` samples, as the rank of `placement` sees them.
    pub fn handed_on(&self, vocab: usize, placement: Placement, rows: usize) -> Vec<Vec<Vec<usize>>> {
        fn shapes<M: Model>(model: &M, batch: &Batch) -> Vec<Vec<Vec<usize>>> {
            (0..model.num_blocks()).map(|block| model.handed_on(block, batch)).collect()
        }
        let init = Init::describing(placement);
        // Only shapes matter: one number stands for all, so that a large batch takes no memory.
        let ids = || Tensor::<2, Int>::zeros([1, 1], &device()).expand([rows, self.time().unwrap_or(1)]);
        let images = || Batch::Images {
            pixels: Tensor::<4>::zeros([1; 4], &device()).expand([rows, 1, 1, 1]),
            labels: Tensor::<1, Int>::zeros([1], &device()).expand([rows]),
        };
        match self {
            Self::Gpt(config) => {
                shapes(&Gpt::new(config, vocab, &init), &Batch::Text { inputs: ids(), targets: ids() })
            }
            Self::Mlp(config) => shapes(&Mlp::new(config, SIDE * SIDE, vocab, &init), &images()),
            Self::Cnn(config) => shapes(&Cnn::new(config, SIDE, vocab, &init), &images()),
            Self::Resnet(config) => shapes(&Resnet::new(config, vocab, &init), &images()),
            Self::EncoderDecoder(config) => shapes(
                &EncoderDecoder::new(config, vocab, &init),
                &Batch::Pairs { sources: ids(), inputs: ids(), targets: ids() },
            ),
        }
    }

    /// The borders of split layers in `block`, in the order of its forward.
    pub fn borders(&self, block: usize) -> Vec<Border> {
        match self {
            Self::Gpt(config) => config.borders(block),
            Self::EncoderDecoder(config) => config.borders(block),
            Self::Mlp(_) | Self::Cnn(_) | Self::Resnet(_) => vec![],
        }
    }

    /// Whether its layers can be split over a tensor axis.
    pub fn splits(&self) -> bool {
        matches!(self, Self::Gpt(_) | Self::EncoderDecoder(_))
    }

    /// Tokens of a sample; none where samples are not text.
    pub fn time(&self) -> Option<usize> {
        match self {
            Self::Gpt(config) => Some(config.block),
            Self::EncoderDecoder(config) => Some(config.block),
            Self::Mlp(_) | Self::Cnn(_) | Self::Resnet(_) => None,
        }
    }

    /// Height, width and channels of the pictures that it learns from; none where samples are text.
    pub fn picture(&self) -> Option<[usize; 3]> {
        match self {
            Self::Gpt(_) | Self::EncoderDecoder(_) => None,
            Self::Mlp(_) | Self::Cnn(_) => Some([SIDE, SIDE, 1]),
            Self::Resnet(config) => Some([config.side, config.side, config.inputs]),
        }
    }
}

/// What `[data] kind` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Text of a file or folder (`path`).
    Text,
    /// The Rust sources of the crates that cargo has downloaded.
    Rust,
    /// MNIST digits in IDX files (`path`).
    Mnist,
    /// CIFAR-10 in its binary files (`path`).
    Cifar10,
    /// Made-up pictures of the size that the model takes (`classes`, `samples`).
    Synthetic,
}

/// What `[data] tokenizer` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// One token a character that occurs in the text.
    Chars,
    /// One token a byte.
    Bytes,
    /// Byte-level byte-pair encoding, trained on the text or loaded from `tokenizer_path`.
    Bpe,
}

/// `[data]`
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
    /// How text becomes tokens.
    pub tokenizer: TokenizerKind,
    /// Tokens of a `bpe` vocabulary that is trained.
    pub vocab_size: usize,
    /// A `tokenizer.json`, or a folder with it or with GPT-2's `vocab.json` and `merges.txt`.
    #[serde(serialize_with = "path_as_text::option")]
    pub tokenizer_path: Option<PathBuf>,
    /// Part of the text that is held out for validation.
    pub val_fraction: f64,
    /// At most this many MiB of text are used, for `rust`.
    pub max_mib: usize,
    /// Shift pictures by up to this many pixels at random, for `mnist` and `cifar10`; the latter are then mirrored too.
    pub shift: usize,
    /// Classes, for `synthetic`.
    pub classes: usize,
    /// Pictures to learn from, for `synthetic`; a tenth as many are held out.
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

/// What `[train] last_batch` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LastBatch {
    /// Leave out samples that do not fill the epoch's last batch.
    Drop,
    /// Fill the epoch's last batch with samples from its beginning.
    Pad,
}

/// What `[train] on_user_signal` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUserSignal {
    /// Write a checkpoint and go on.
    Save,
    /// Write a checkpoint and stop.
    Stop,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Samples per step over all workers. Give this or `batch_per_worker`.
    pub batch: Option<usize>,
    /// Samples per step on each worker.
    pub batch_per_worker: Option<usize>,
    /// Micro-steps that a worker's samples are cut into.
    pub accumulate: usize,
    /// Seed of weights, order and dropout.
    pub seed: u64,
    /// Steps between lines in metrics.jsonl.
    pub log_every: usize,
    /// Steps between evaluations; 0: only at the end.
    pub eval_every: usize,
    /// Batches per evaluation, each as large as a step's; 0: all of the held-out data.
    pub eval_batches: usize,
    /// Steps between checkpoints; 0: only by the clock and at the end.
    pub checkpoint_every: usize,
    /// Minutes between checkpoints by the clock; 0: only by steps and at the end.
    pub checkpoint_minutes: f64,
    /// How many of the newest checkpoints stay; the best one stays beside them.
    pub keep: usize,
    /// Of every so many steps, one checkpoint stays for good; 0: none.
    pub keep_every: usize,
    /// Where checkpoints go: a folder, or a URL as `s3://bucket/prefix`; absent: `checkpoints` in the run's folder.
    pub checkpoint_url: Option<String>,
    /// A file for what each rank did when, in the format of Chrome's and Perfetto's trace viewers; absent: none.
    #[serde(serialize_with = "path_as_text::option")]
    pub trace: Option<PathBuf>,
    /// Time every operation of every step, for the summary.
    pub profile: bool,
    /// What becomes of samples that do not fill an epoch's last batch.
    pub last_batch: LastBatch,
    /// `cpu`, `vulkan`, `cuda` or `wgpu`: what ranks compute on; with `:N`, the N-th such device for all of them instead of
    /// one after another for those of a host.
    pub device: DeviceChoice,
    /// `f32`, `bf16` or `f16`: numbers of activations and their gradients. Parameters and their sums stay f32.
    pub precision: Precision,
    /// What the loss is multiplied by before backward, at first: halved when gradients overflow, doubled when they have
    /// not for 2000 steps. Absent: 65536 under `f16`, no scaling under the others.
    pub loss_scale: Option<f64>,
    /// Steps between checks that all ranks hold the same parameters; 0: only at the end.
    pub check_every: usize,
    /// `save` or `stop`: what SIGUSR1 and SIGUSR2 ask for, a checkpoint after which training goes on, or one after which it
    /// stops.
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

/// What `[optimizer] kind` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    AdamW,
    /// Stochastic gradient descent, with momentum where `momentum` is above 0.
    Sgd,
}

/// `[optimizer]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end of the cosine; absent: a tenth of `lr`.
    pub min_lr: Option<f64>,
    /// Steps of linear warm-up from 0 to `lr`.
    pub warmup: usize,
    /// Steps until the cosine reaches `min_lr`; absent: `train.steps`.
    pub decay_steps: Option<usize>,
    /// Keep `lr` after the warm-up instead of the cosine.
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

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Local ranks; absent: as many as `mesh` has, or what the machine serves best.
    pub workers: Option<usize>,
    /// Named axes and their sizes, as in `data=2,tensor=2,pipe=2`; absent: all ranks along `data`.
    pub mesh: Option<String>,
    /// What is sharded over `data`: 1 optimizer state, 2 gradients too, 3 parameters too; 0: nothing.
    pub zero: u8,
    /// Blocks whose parameters are gathered ahead of their use, under `zero` 3.
    pub prefetch: usize,
    /// Keep the optimizer's state in a file of the run's folder instead of in memory.
    pub offload: bool,
    /// `gpipe`, `1f1b`, `interleaved` or `zero-bubble`: in which order pipeline stages work.
    pub schedule: ScheduleKind,
    /// Parts of the model that each stage holds; absent: 2 for `interleaved`, 1 for the others.
    pub chunks: Option<usize>,
    /// Split the regions between split layers by time.
    pub sequence: bool,
    /// `none` or `block`: whether blocks are computed again in backward instead of keeping what they computed.
    pub recompute: Recompute,
    /// Which dimension is split over which axis, over the default `heads`, `mlp` and `vocab` over `tensor`; `none` leaves
    /// one whole.
    pub layout: BTreeMap<String, String>,
    /// Memory of each rank in MiB that the plan must fit; absent: not checked.
    pub memory_mib: Option<f64>,
    /// Threads of each worker; absent: its share of the cores.
    pub threads: Option<usize>,
    /// `thread`, `shm` or `tcp`; absent: the fastest that every pair of ranks shares.
    pub transport: Option<String>,
    /// For the operations that it offers, as `ring` or `tree`; absent: what the tuning table says.
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

/// `[sample]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Text to go on from; absent: no sample.
    pub prompt: Option<String>,
    /// Tokens to generate.
    pub tokens: usize,
    /// Below 1 likelier tokens are preferred, above 1 unlikelier ones get a chance; 0: always the likeliest token.
    pub temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all.
    pub top_k: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompt: None, tokens: 200, temperature: 0.8, top_k: 50 }
    }
}

const KINDS: [&str; 5] = ["gpt", "encoder-decoder", "mlp", "cnn", "resnet"];
const SECTIONS: [&str; 6] = ["model", "data", "train", "optimizer", "parallel", "sample"];

impl Config {
    /// Reads `path` and applies `sets`, each `key.path=value` with a TOML value or a bare string.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, an unknown key (with the nearest known one), a value of the wrong
    /// type or out of range, a key that nothing reads.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let changes: Vec<Override> = sets.iter().map(|set| Override::flag("--set", set)).collect();
        Ok(Loaded::read(path, &changes)?.config)
    }

    /// Parses TOML text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Self> {
        let changes: Vec<Override> = sets.iter().map(|set| Override::flag("--set", set)).collect();
        Ok(Loaded::parse(text, origin, &changes)?.config)
    }

    /// Parses TOML text and applies `changes`; says who gave what.
    pub(super) fn read(text: &str, origin: &str, changes: &[Override]) -> Result<(Self, Sources)> {
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| Error::Config {
            origin: origin.into(),
            key: "TOML".into(),
            problem: error.to_string().trim_end().to_string(),
        })?;
        let mut sources = Sources::of_file(&table, origin);
        for change in changes {
            sources.apply(&mut table, change)?;
        }
        let reader = Reader { origin, sources: &sources };
        for key in table.keys() {
            if !SECTIONS.contains(&key.as_str()) {
                return Err(reader.error(key, unknown("section", key, &SECTIONS)));
            }
        }
        let config = Self {
            model: reader.model(&table)?,
            data: reader.section(&table, "data")?,
            train: reader.section(&table, "train")?,
            optimizer: reader.section(&table, "optimizer")?,
            parallel: reader.section(&table, "parallel")?,
            sample: reader.section(&table, "sample")?,
        };
        config.check(&reader)?;
        Ok((config, sources))
    }

    /// Checks a configuration that was made otherwise than by [`load`](Self::load); `origin` names it in errors.
    ///
    /// # Errors
    /// A value out of range, or keys that contradict one another.
    pub fn validate(&self, origin: &str) -> Result<()> {
        self.check(&Reader { origin, sources: &Sources::default() })
    }

    /// The samples of a step as the user gave them.
    pub fn batch(&self) -> regatta_plan::Batch {
        let accumulate = self.train.accumulate;
        match (self.train.batch, self.train.batch_per_worker) {
            (Some(samples), _) => regatta_plan::Batch::global(samples, accumulate),
            (None, samples) => regatta_plan::Batch::per_worker(samples.unwrap_or(1), accumulate),
        }
    }

    /// How a job of `world` ranks is spread.
    ///
    /// # Errors
    /// A mesh of another size, a batch that does not divide, a schedule or layout that does not exist.
    pub fn plan(&self, world: usize) -> Result<Plan, PlanError> {
        let parallel = &self.parallel;
        let mesh = match &parallel.mesh {
            Some(mesh) => mesh.parse()?,
            None => Mesh::data(world),
        };
        mesh.fits(world)?;
        let bytes = (parallel.bucket_mib * (1 << 20) as f64) as usize;
        let chunks = if parallel.schedule == ScheduleKind::Interleaved { 2 } else { 1 };
        let rules = parallel.layout.iter().map(|(dim, axis)| (dim.as_str(), axis.as_str()));
        let plan = Plan {
            layout: Layout::with(rules)?,
            zero: parallel.zero,
            prefetch: parallel.prefetch,
            offload: parallel.offload,
            schedule: parallel.schedule,
            chunks: parallel.chunks.unwrap_or(chunks),
            sequence: parallel.sequence && mesh.axis("tensor") > 1,
            recompute: parallel.recompute,
            ..Plan::new(mesh, self.batch(), bytes)?
        };
        plan.pipeline()?;
        Ok(plan)
    }

    /// Checks that the model can follow `plan`, before anything runs.
    ///
    /// # Errors
    /// More samples than can be counted, more stages than blocks, a layout that is illegal for a parameter (with its name), a model or a sequence that
    /// cannot be split.
    pub fn check_plan(&self, plan: &Plan, vocab: usize) -> Result<(), PlanError> {
        limits::check_step(self, plan, vocab)?;
        let tensor = plan.mesh.axis("tensor");
        if tensor > 1 && !self.model.splits() {
            return Err(PlanError::Layout(
                "this model has no layers that are split over the axis tensor; use data and pipe".into(),
            ));
        }
        let train = &self.train;
        if tensor > 1 && (train.device.backend != Backend::Cpu || train.precision != Precision::F32) {
            return Err(PlanError::Layout(format!(
                "layers can be split over the axis tensor only on the cpu in f32; use data and pipe with train.device = \
                 \"{}\" and train.precision = \"{}\"",
                train.device,
                train.precision.name()
            )));
        }
        if matches!(self.model, ModelConfig::Resnet(_)) && train.device.backend != Backend::Cpu {
            return Err(PlanError::Layout(format!(
                "batch normalisation hands its running statistics out on the cpu only: a resnet cannot have train.device = \"{}\"",
                train.device
            )));
        }
        let placement =
            Placement { mesh: plan.mesh.clone(), layout: plan.layout.clone(), ..Placement::whole() };
        for made in self.model.describe(vocab, placement) {
            plan.layout.check(&plan.mesh, &made.spec)?;
        }
        if plan.sequence {
            if let Some(time) = self.model.time().filter(|time| !time.is_multiple_of(tensor)) {
                return Err(PlanError::Layout(format!(
                    "parallel.sequence: {time} tokens do not divide over the {tensor} ranks of the axis tensor"
                )));
            }
            let whole =
                ["heads", "mlp", "vocab"].into_iter().find(|dim| plan.layout.axis(&plan.mesh, dim).is_none());
            if let Some(dim) = whole {
                return Err(PlanError::Layout(format!(
                    "parallel.sequence: the dimension {dim} must be split over tensor too"
                )));
            }
        }
        let costs: Vec<f64> = self.model.costs(vocab).iter().map(|cost| cost.flops).collect();
        plan.cut(&costs).map(drop)
    }

    /// Checks that the text to go on from at the end can be told in the data's tokens, before anything is trained.
    ///
    /// # Errors
    /// A prompt that the tokenizer cannot encode.
    pub fn check_sample(&self, data: &Datasets) -> Result<()> {
        let (Some(prompt), Some(tokenizer), ModelConfig::Gpt(_)) =
            (&self.sample.prompt, &data.tokenizer, &self.model)
        else {
            return Ok(());
        };
        tokenizer.encode(prompt).map(drop).map_err(|error| Error::Config {
            origin: "the configuration".into(),
            key: "sample.prompt".into(),
            problem: format!("{error}; the text is generated when training has ended"),
        })
    }

    /// Checks a configuration that was read from a checkpoint, which somebody else may have written, as one that a user
    /// gives. What only training needs may be missing.
    pub(crate) fn check_stored(&self) -> Result<(), String> {
        let mut config = self.clone();
        config.data.path.get_or_insert_with(PathBuf::new);
        if config.train.batch_per_worker.is_none() {
            config.train.batch.get_or_insert(1);
        }
        config.validate("its configuration").map_err(|error| error.to_string())
    }

    fn check(&self, reader: &Reader) -> Result<()> {
        let (data, train, optimizer, parallel) = (&self.data, &self.train, &self.optimizer, &self.parallel);
        limits::check(self, reader)?;
        let given = match data.kind {
            DataKind::Text | DataKind::Rust => None,
            DataKind::Mnist => Some([SIDE, SIDE, 1]),
            DataKind::Cifar10 => Some([cifar10::SIDE, cifar10::SIDE, cifar10::CHANNELS]),
            DataKind::Synthetic => self.model.picture().or(Some([0; 3])),
        };
        let problem = match (self.model.picture(), given) {
            (None, Some(_)) => "this model learns from text: use \"text\" or \"rust\"".to_string(),
            (Some(_), None) => {
                "this model learns from pictures: use \"mnist\", \"cifar10\" or \"synthetic\"".to_string()
            }
            (Some(takes), Some(given)) if takes != given => {
                let words = |[height, width, channels]: [usize; 3]| {
                    format!("{height} x {width} with {channels} channel(s)")
                };
                format!("the model takes pictures of {}, and these are {}", words(takes), words(given))
            }
            _ => String::new(),
        };
        if !problem.is_empty() {
            return Err(reader.error("data.kind", problem));
        }
        match (train.batch, train.batch_per_worker) {
            (None, None) => {
                return Err(reader.error("train.batch", "missing: give it or train.batch_per_worker"));
            }
            (Some(_), Some(_)) => {
                return Err(reader
                    .error("train.batch", "given together with train.batch_per_worker: keep one of them"));
            }
            _ => {}
        }
        match &self.model {
            ModelConfig::Gpt(gpt) => {
                reader.at_least_one(
                    "model",
                    &[("layers", gpt.layers), ("heads", gpt.heads), ("embed", gpt.embed)],
                )?;
                reader.at_least_one("model", &[("block", gpt.block)])?;
                if !gpt.embed.is_multiple_of(gpt.heads) {
                    let problem =
                        format!("{} does not divide into {} heads (model.heads)", gpt.embed, gpt.heads);
                    return Err(reader.error("model.embed", problem));
                }
                reader.within("model.dropout", gpt.dropout, 0.0, 1.0, false)?;
                reader.within("model.label_smoothing", gpt.label_smoothing, 0.0, 1.0, false)?;
            }
            ModelConfig::EncoderDecoder(model) => {
                let counts =
                    [("encoder_layers", model.encoder_layers), ("decoder_layers", model.decoder_layers)];
                reader.at_least_one("model", &counts)?;
                let counts = [("heads", model.heads), ("embed", model.embed), ("block", model.block)];
                reader.at_least_one("model", &counts)?;
                if !model.embed.is_multiple_of(model.heads) {
                    let problem =
                        format!("{} does not divide into {} heads (model.heads)", model.embed, model.heads);
                    return Err(reader.error("model.embed", problem));
                }
                reader.within("model.dropout", model.dropout, 0.0, 1.0, false)?;
                reader.within("model.label_smoothing", model.label_smoothing, 0.0, 1.0, false)?;
            }
            ModelConfig::Mlp(mlp) => {
                reader.within("model.dropout", mlp.dropout, 0.0, 1.0, false)?;
                if mlp.hidden.contains(&0) {
                    return Err(reader.error("model.hidden", "a width of 0"));
                }
            }
            ModelConfig::Cnn(cnn) => {
                reader.within("model.dropout", cnn.dropout, 0.0, 1.0, false)?;
                reader.at_least_one("model", &[("hidden", cnn.hidden)])?;
                if cnn.channels.is_empty() || cnn.channels.len() > 4 || cnn.channels.contains(&0) {
                    return Err(
                        reader.error("model.channels", "1 to 4 convolutions, each with at least 1 channel")
                    );
                }
            }
            ModelConfig::Resnet(resnet) => {
                let counts =
                    [("channels", resnet.channels), ("side", resnet.side), ("inputs", resnet.inputs)];
                reader.at_least_one("model", &counts)?;
                if resnet.stages.is_empty() || resnet.stages.len() > 6 || resnet.stages.contains(&0) {
                    return Err(reader.error("model.stages", "1 to 6 stages, each with at least 1 block"));
                }
            }
        }
        if data.kind == DataKind::Text && data.path.is_none() {
            return Err(
                reader.error("data.path", "missing: the text file or folder; try --set data.path=FILE")
            );
        }
        reader.within("data.val_fraction", data.val_fraction, 0.0, 1.0, false)?;
        reader.at_least_one("data", &[("max_mib", data.max_mib)])?;
        // A tokenizer that is there already has the size that it has.
        let learnt = data.tokenizer == TokenizerKind::Bpe && data.tokenizer_path.is_none();
        if learnt && data.vocab_size < 257 {
            return Err(reader.error("data.vocab_size", "a byte-level vocabulary has at least 257 tokens"));
        }
        reader.at_least_one("data", &[("classes", data.classes), ("samples", data.samples)])?;
        if data.shift > 8 {
            return Err(reader.error("data.shift", "at most 8 pixels"));
        }
        let counts =
            [("steps", train.steps), ("accumulate", train.accumulate), ("log_every", train.log_every)];
        reader.at_least_one("train", &counts)?;
        reader.at_least_one("train", &[("batch", train.batch.unwrap_or(1)), ("keep", train.keep)])?;
        reader.within("train.checkpoint_minutes", train.checkpoint_minutes, 0.0, 1e6, true)?;
        reader.at_least_one("train", &[("batch_per_worker", train.batch_per_worker.unwrap_or(1))])?;
        reader.within("train.loss_scale", train.loss_scale.unwrap_or(1.0), 1e-30, 1e30, true)?;
        reader.within("optimizer.lr", optimizer.lr, 0.0, 1e6, true)?;
        reader.within("optimizer.min_lr", optimizer.min_lr.unwrap_or(0.0), 0.0, 1e6, true)?;
        reader.within("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1e6, true)?;
        reader.within("optimizer.beta1", optimizer.beta1, 0.0, 1.0, false)?;
        reader.within("optimizer.beta2", optimizer.beta2, 0.0, 1.0, false)?;
        reader.within("optimizer.eps", optimizer.eps, 0.0, 1.0, true)?;
        reader.within("optimizer.momentum", optimizer.momentum, 0.0, 1.0, false)?;
        reader.within("optimizer.clip", optimizer.clip, 0.0, 1e30, true)?;
        reader.at_least_one("parallel", &[("workers", parallel.workers.unwrap_or(1))])?;
        reader.at_least_one("parallel", &[("threads", parallel.threads.unwrap_or(1))])?;
        reader.within("parallel.bucket_mib", parallel.bucket_mib, 0.001, 65536.0, true)?;
        reader.within("parallel.deadline_s", parallel.deadline_s, 0.1, 1e6, true)?;
        reader.within("parallel.zero", f64::from(parallel.zero), 0.0, 3.0, true)?;
        reader.within("parallel.memory_mib", parallel.memory_mib.unwrap_or(1.0), 1.0, 1e9, true)?;
        reader.at_least_one("parallel", &[("chunks", parallel.chunks.unwrap_or(1))])?;
        if let Some(Err(error)) = parallel.mesh.as_deref().map(str::parse::<Mesh>) {
            return Err(reader.error("parallel.mesh", error.to_string()));
        }
        let transports = ["thread", "shm", "tcp", "mpi"];
        reader.one_of("parallel.transport", parallel.transport.as_deref(), &transports)?;
        let algorithms = regatta_comm::Algorithm::ALL.map(regatta_comm::Algorithm::name);
        reader.one_of("parallel.algorithm", parallel.algorithm.as_deref(), &algorithms)?;
        reader.within("sample.temperature", self.sample.temperature, 0.0, 100.0, true)
    }
}

/// Reads sections, and says what is wrong with a key.
pub(super) struct Reader<'a> {
    origin: &'a str,
    sources: &'a Sources,
}

impl Reader<'_> {
    pub(super) fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        let origin = match self.sources.of(key) {
            Some(Origin::Variable(name)) => name,
            _ => self.origin,
        };
        Error::Config { origin: origin.into(), key: key.into(), problem: problem.into() }
    }

    fn section<T: DeserializeOwned>(&self, table: &Table, name: &str) -> Result<T> {
        match table.get(name) {
            None => self.read(Table::new(), name),
            Some(Value::Table(section)) => self.read(section.clone(), name),
            Some(_) => Err(self.error(name, format!("must be a section, as in [{name}]"))),
        }
    }

    fn model(&self, table: &Table) -> Result<ModelConfig> {
        let Some(Value::Table(section)) = table.get("model") else {
            return Err(self.error(
                "model",
                format!("missing: a section [model] with kind = one of {}", KINDS.join(", ")),
            ));
        };
        let mut section = section.clone();
        let kind = section.remove("kind");
        if let Some(kind) = kind.as_ref().filter(|kind| !kind.is_str()) {
            return Err(self.error("model.kind", unknown("kind", &kind.to_string(), &KINDS)));
        }
        match kind.as_ref().and_then(Value::as_str) {
            Some("gpt") => self.read(section, "model").map(ModelConfig::Gpt),
            Some("mlp") => self.read(section, "model").map(ModelConfig::Mlp),
            Some("resnet") => self.read(section, "model").map(ModelConfig::Resnet),
            Some("cnn") => self.read(section, "model").map(ModelConfig::Cnn),
            Some("encoder-decoder") => self.read(section, "model").map(ModelConfig::EncoderDecoder),
            Some(other) => Err(self.error("model.kind", unknown("kind", other, &KINDS))),
            None => Err(self.error("model.kind", format!("missing: one of {}", KINDS.join(", ")))),
        }
    }

    fn read<T: DeserializeOwned>(&self, mut section: Table, name: &str) -> Result<T> {
        // Key by key first, so that a wrong value is reported with its key.
        for (key, value) in &mut section {
            let path = format!("{name}.{key}");
            let one = |value: &Value| Value::Table(Table::from_iter([(key.clone(), value.clone())]));
            let Err(error) = one(value).try_into::<T>() else { continue };
            // A folder may be called 1984: a flag's value is text where text is wanted, whatever it looks like.
            let text = self.sources.text(&path).map(|text| Value::String(text.into()));
            match text.filter(|text| one(text).try_into::<T>().is_ok()) {
                Some(text) => *value = text,
                None => return Err(self.error(&path, explain(&error.to_string(), key))),
            }
        }
        Value::Table(section).try_into().map_err(|error: toml::de::Error| self.error(name, error.to_string()))
    }

    fn at_least_one(&self, section: &str, counts: &[(&str, usize)]) -> Result<()> {
        match counts.iter().find(|(_, count)| *count == 0) {
            Some((key, _)) => Err(self.error(&format!("{section}.{key}"), "must be at least 1")),
            None => Ok(()),
        }
    }

    /// Checks values against the largest that each may have.
    pub(super) fn at_most(&self, section: &str, counts: &[(&str, usize, usize)]) -> Result<()> {
        match counts.iter().find(|(_, count, most)| count > most) {
            Some((key, count, most)) => {
                Err(self.error(&format!("{section}.{key}"), format!("{count} is too large: at most {most}")))
            }
            None => Ok(()),
        }
    }

    fn within(&self, key: &str, value: f64, low: f64, high: f64, closed: bool) -> Result<()> {
        let below = if closed { value <= high } else { value < high };
        if value >= low && below {
            return Ok(());
        }
        let (upto, high) = if closed { ("to", high) } else { ("to below", high) };
        Err(self.error(key, format!("{value} is out of range: {low} {upto} {high}")))
    }

    fn one_of(&self, key: &str, value: Option<&str>, allowed: &[&str]) -> Result<()> {
        match value {
            Some(value) if !allowed.contains(&value) => {
                Err(self.error(key, unknown("value", value, allowed)))
            }
            _ => Ok(()),
        }
    }
}

/// Turns serde's message about one key into a sentence, with the nearest known key.
fn explain(message: &str, key: &str) -> String {
    let first = message.lines().next().unwrap_or(message);
    if !first.contains("unknown field") {
        let text = ["expected path string", "expected a string", "expected string"];
        let value = first.split('`').nth(1).filter(|_| text.iter().any(|text| first.contains(text)));
        return match value {
            Some(value) => format!("{first}: write text in quotes, as in {key} = \"{value}\""),
            None => first.to_string(),
        };
    }
    let known: Vec<&str> = first.split('`').skip(3).step_by(2).collect();
    unknown("key", key, &known)
}

fn unknown(what: &str, given: &str, known: &[&str]) -> String {
    let nearest = known.iter().min_by_key(|candidate| edits(given, candidate));
    match nearest.filter(|candidate| edits(given, candidate) <= 1 + given.len() / 3) {
        Some(nearest) => format!("unknown {what} `{given}`; did you mean `{nearest}`?"),
        None => format!("unknown {what} `{given}`; known are {}", known.join(", ")),
    }
}

/// Edits (insert, delete, replace) between two words (Levenshtein 1966).
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT: &str = "[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 12\n";

    fn problem(text: &str, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::parse(text, "c.toml", &sets).unwrap_err().to_string()
    }

    #[test]
    fn defaults_sets_and_round_trip() {
        let sets = ["train.steps=7".into(), "data.path=a b.txt".into(), "optimizer.lr=3e-4".into()];
        let config = Config::parse(GPT, "c.toml", &sets).unwrap();
        assert_eq!((config.train.steps, config.optimizer.lr), (7, 3e-4));
        assert_eq!(config.data.path.as_deref(), Some(Path::new("a b.txt")));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&text, "again", &[]).unwrap(), config);
    }

    #[test]
    fn a_misspelt_key_suggests_the_nearest() {
        assert_eq!(
            problem(GPT, &["train.stepz=3"]),
            "c.toml: `train.stepz`: unknown key `stepz`; did you mean `steps`?"
        );
        assert!(problem(GPT, &["model.hedas=3"]).contains("did you mean `heads`?"));
        assert!(problem(GPT, &["trian.steps=3"]).contains("did you mean `train`?"));
        assert!(problem(GPT, &["train.zzzzzzzz=3"]).contains("known are steps, batch"));
        assert!(problem(GPT, &["parallel.transport=shn"]).contains("did you mean `shm`?"));
        assert!(problem("[model]\nkind='gtp'", &[]).contains("did you mean `gpt`?"));
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for (set, key) in [
            ("train.steps=0", "train.steps"),
            ("model.dropout=1.0", "model.dropout"),
            ("model.heads=7", "model.embed"),
            ("optimizer.lr=-1", "optimizer.lr"),
            ("train.batch_per_worker=3", "train.batch"),
            ("train.steps=\"many\"", "train.steps"),
            ("train.steps=-4", "train.steps"),
            ("data.kind=mnist", "data.kind"),
            ("data.kind=synthetic", "data.kind"),
            ("optimizer.lr=nan", "optimizer.lr"),
            ("parallel.deadline_s=0", "parallel.deadline_s"),
        ] {
            let problem = problem(GPT, &[set]);
            assert!(problem.starts_with(&format!("c.toml: `{key}`: ")), "{set}: {problem}");
        }
        assert!(problem("[train\n", &[]).contains("c.toml"));
        assert!(problem("[model]\nkind='gpt'\n[train]\nbatch=1", &[]).contains("`data.path`: missing"));
        assert!(problem(GPT, &["train"]).contains("must be key.path=value"));
        let resnet = "[model]\nkind='resnet'\n[data]\nkind='synthetic'\n[train]\nbatch=1";
        assert!(Config::parse(resnet, "c.toml", &[]).is_ok());
        let mnist = problem(resnet, &["data.kind=mnist"]);
        assert!(mnist.contains("32 x 32 with 3 channel(s), and these are 28 x 28 with 1"), "{mnist}");
        assert!(problem(resnet, &["data.kind=text"]).contains("learns from pictures"));
        assert!(problem(resnet, &["model.stages=[]"]).contains("`model.stages`: 1 to 6 stages"));
        assert!(problem("model = 3", &[]).contains("missing: a section [model]"));
    }
}
