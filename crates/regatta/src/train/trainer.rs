//! Training from your own program.

use super::callback::{Callback, Callbacks};
use super::folder::claim_folder;
use super::job::{Job, Resume};
use super::requests::Requests;
use super::run::train_on;
use super::summary::Summary;
use crate::config::{
    Config, DataConfig, DataKind, OptimizerConfig, ParallelConfig, SampleConfig, SyncConfig, TrainConfig,
};
use crate::datasets::{Dataset, Datasets};
use crate::error::{Error, Result};
use crate::models::{ModelConfig, ModelSpec, register};
use regatta_comm::Group;
use regatta_plan::Plan;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Trains a model under a plan: joins the job in which this process was started, trains, evaluates, writes checkpoints
/// or resumes from them, and returns the summary. All ranks of the job make the same calls.
///
/// ```no_run
/// # use regatta::{datasets::Dataset, models::GptConfig, plan::{Batch, Plan}, train::{EarlyStopping, Trainer}};
/// # fn samples() -> Box<dyn Dataset> { unimplemented!() }
/// # fn main() -> regatta::Result<()> {
/// // Two stages of a pipeline, 8 samples a step in 4 micro-batches.
/// let plan = Plan::new("pipe=2".parse()?, Batch::global(8, 4), 25 << 20)?;
/// let summary = Trainer::new(plan)
///     .model(GptConfig { layers: 2, ..GptConfig::default() })
///     .data(samples(), samples(), 256)
///     .steps(1000)
///     .settings(|train| train.eval_every = 50)
///     .callback(EarlyStopping::new(3, 0.001))
///     .fit()?;
/// println!("{:?}", summary.val_loss);
/// # Ok(()) }
/// ```
pub struct Trainer {
    plan: Plan,
    model: Option<ModelConfig>,
    data: Option<Datasets>,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    group: Option<Group>,
    out: Option<PathBuf>,
    resume: Option<Resume>,
    requests: Arc<Requests>,
    callbacks: Callbacks,
    started: Instant,
}

impl Trainer {
    /// A trainer for `plan`, which determines how the work is distributed and the size of a step's batch.
    pub fn new(plan: Plan) -> Self {
        let train = TrainConfig { batch: Some(plan.global_batch()), ..TrainConfig::default() };
        Self {
            train: TrainConfig { accumulate: plan.accumulate, ..train },
            plan,
            model: None,
            data: None,
            optimizer: OptimizerConfig::default(),
            group: None,
            out: None,
            resume: None,
            requests: Arc::default(),
            callbacks: Callbacks::default(),
            started: Instant::now(),
        }
    }

    /// Sets the model. It must be set.
    #[must_use]
    pub fn model<S: ModelSpec>(mut self, spec: S) -> Self {
        // So that its checkpoints can be read.
        register::<S>();
        self.model = Some(ModelConfig::new(spec));
        self
    }

    /// Sets the training samples and the held-out samples. `classes` is the number of tokens in the vocabulary, or of
    /// classes. All ranks give the same samples. This or [`datasets`](Self::datasets) must be called.
    #[must_use]
    pub fn data(self, train: impl Dataset + 'static, val: impl Dataset + 'static, classes: usize) -> Self {
        self.datasets(Datasets {
            train: Arc::new(train),
            val: Arc::new(val),
            vocab: classes,
            tokenizer: None,
        })
    }

    /// As [`data`](Self::data), for data that is shared or has a tokenizer.
    #[must_use]
    pub fn datasets(mut self, data: Datasets) -> Self {
        self.data = Some(data);
        self
    }

    /// Sets how parameters are updated. The default is AdamW with a cosine decay of the learning rate.
    #[must_use]
    pub fn optimizer(mut self, optimizer: OptimizerConfig) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// Sets the number of optimizer steps.
    #[must_use]
    pub fn steps(mut self, steps: usize) -> Self {
        self.train.steps = steps;
        self
    }

    /// Changes the settings of `[train]`: seed, how often to evaluate and to save, precision, device. The batch is
    /// always the plan's.
    #[must_use]
    pub fn settings(mut self, change: impl FnOnce(&mut TrainConfig)) -> Self {
        let (batch, accumulate) = (self.train.batch, self.train.accumulate);
        change(&mut self.train);
        (self.train.batch, self.train.batch_per_worker, self.train.accumulate) = (batch, None, accumulate);
        self
    }

    /// Sets the run's folder. The default is a new one in `runs`, named after the model.
    #[must_use]
    pub fn out(mut self, folder: impl Into<PathBuf>) -> Self {
        self.out = Some(folder.into());
        self
    }

    /// Resumes from a checkpoint in the run's folder.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = Some(resume);
        self
    }

    /// Sets the group of all ranks, for example of threads in one process. The default is the group of the job in
    /// which this process was started.
    #[must_use]
    pub fn group(mut self, group: Group) -> Self {
        self.group = Some(group);
        self
    }

    /// Sets the requests by which others, for example a signal handler, make the run save or stop.
    #[must_use]
    pub fn requests(mut self, requests: Arc<Requests>) -> Self {
        self.requests = requests;
        self
    }

    /// Adds a callback on this rank. They are called in the order in which they were added.
    #[must_use]
    pub fn callback(mut self, callback: impl Callback + 'static) -> Self {
        self.callbacks.0.push(Box::new(callback));
        self
    }

    /// Trains, and returns the summary.
    ///
    /// # Errors
    /// The model or the data is missing, the plan is for another number of ranks, the model does not support it, or an
    /// error of [`train`](super::train).
    pub fn fit(mut self) -> Result<Summary> {
        let missing =
            |what: &str| Error::Usage(format!("the trainer has no {what}: call {what}() before fit()"));
        let model = self.model.take().ok_or_else(|| missing("model"))?;
        let data = self.data.take().ok_or_else(|| missing("data"))?;
        if self.resume.is_some() && self.out.is_none() {
            return Err(Error::Usage("the trainer resumes from the run's folder: call out() with it".into()));
        }
        if !model.survives_text() {
            return Err(Error::Usage(format!(
                "the configuration of the model {} changes when it is written as TOML and read again, as checkpoints do: it \
                 needs fields that TOML can hold, none of them called `kind`",
                model.kind()
            )));
        }
        let config = self.config(model);
        config.validate("the trainer")?;
        self.callbacks.0.iter().try_for_each(|callback| callback.check(&config))?;
        let group = match self.group.take() {
            Some(group) => group,
            None => crate::horovod::init()?,
        };
        self.plan.mesh.check_world(group.size())?;
        let out = match self.out.take() {
            Some(out) => out,
            None => claim_folder(&group, &PathBuf::from("runs").join(config.model.kind()))?,
        };
        let job = Job {
            config,
            plan: self.plan,
            group,
            servers: None,
            out,
            resume: self.resume,
            requests: self.requests,
            started: self.started,
            threads: rayon::current_num_threads(),
        };
        train_on(&job, data, &mut self.callbacks).inspect_err(|error| {
            // All ranks return these errors alike. With another one, the others learn why and do not wait until their deadline.
            let on_all =
                matches!(error, Error::Config { .. } | Error::Plan(_) | Error::Numeric(_) | Error::Comm(_));
            if job.group.size() > 1 && !on_all {
                job.group.abort(&error.to_string());
            }
        })
    }

    /// The same settings as a configuration.
    fn config(&self, model: ModelConfig) -> Config {
        let plan = &self.plan;
        Config {
            model,
            data: DataConfig { kind: DataKind::Own, ..DataConfig::default() },
            train: self.train.clone(),
            optimizer: self.optimizer.clone(),
            parallel: ParallelConfig {
                mesh: Some(plan.mesh.to_string()),
                zero: plan.zero,
                prefetch: plan.prefetch,
                offload: plan.offload,
                schedule: plan.schedule,
                chunks: Some(plan.chunks),
                sequence: plan.sequence,
                recompute: plan.recompute,
                bucket_mib: plan.bucket_bytes as f64 / f64::from(1 << 20),
                ..ParallelConfig::default()
            },
            compress: plan.compress.into(),
            local: plan.local.into(),
            sync: SyncConfig {
                servers: plan.servers.count,
                mode: plan.servers.mode,
                staleness: plan.servers.staleness as usize,
            },
            sample: SampleConfig::default(),
        }
    }
}
