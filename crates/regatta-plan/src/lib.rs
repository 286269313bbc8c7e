//! Arithmetic of parallel plans: which ranks form which axis, how a batch is divided, where a bucket ends.
//!
//! The crate has no tensors and no sockets, so a plan can be made, printed, tested and its costs estimated on any
//! machine.
//!
//! ```
//! use regatta_plan::{Batch, Mesh, Plan};
//! let plan = Plan::new(Mesh::data(2), Batch::global(12, 1), 25 << 20).unwrap();
//! assert_eq!(plan.batch_per_worker, 6);
//! assert_eq!(plan.to_string(), "mesh data=2, batch 6 per worker (12 in all), buckets of at most 25.0 MiB");
//! ```

mod axis;
mod bucket;
mod chosen;
mod compress;
mod cut;
mod exchange;
mod layout;
mod local;
mod memory;
mod mesh;
mod schedule;
mod servers;
mod simulate;
mod slices;
mod workers;

pub use axis::{Axis, AxisSet};
pub use bucket::{bucket_cap, buckets};
pub use compress::{Compress, CompressKind, Compressed};
pub use cut::balance;
pub use exchange::{
    Content, ExchangePlan, Kept, Mean, Operation, Sharded, UnitOperation, UnitUse, ZeroStage,
};
pub use layout::{Dim, Layout, SPLITTABLE_DIMS, TensorSpec, part};
pub use local::{Islands, Local, Outer};
pub use memory::{BlockLoad, Footprint, Load, mebibytes};
pub use mesh::{MAX_RANKS, Mesh};
pub use schedule::{Direction, Schedule, ScheduleKind, Task};
pub use servers::{Served, Servers, SyncMode};
pub use simulate::{Costs, Timeline, simulate};
pub use slices::{Piece, Run, copy as copy_pieces};
pub use workers::{default_workers, threads_per_worker};

use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a plan is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The global batch cannot be divided evenly.
    #[error(
        "a batch of {batch} does not divide among {parts} ({workers} workers x {accumulate} micro-batches, as \
         train.accumulate or --micro-batches says); \
         use a batch of {}, or another number of workers",
        if lower == upper { lower.to_string() } else { format!("{lower} or {upper}") }
    )]
    BatchDoesNotDivide {
        /// Samples per optimizer step, over all workers.
        batch: usize,
        /// Workers times micro-batches.
        parts: usize,
        /// Size of the data axis.
        workers: usize,
        /// Micro-batches per optimizer step.
        accumulate: usize,
        /// The next smaller batch that divides (at least `parts`).
        lower: usize,
        /// The next larger batch that divides.
        upper: usize,
    },
    /// A count that must be at least one is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The axes are invalid, or their product is not the number of ranks in the job.
    #[error("mesh {0}")]
    Mesh(String),
    /// The layout is invalid.
    #[error("layout: {0}")]
    Layout(String),
    /// The schedule's name is unknown; the second text lists the valid names.
    #[error("there is no schedule '{0}'; use one of {1}")]
    UnknownSchedule(String, String),
    /// The interleaved schedule was given only one chunk per stage.
    #[error(
        "the interleaved schedule needs at least 2 model chunks per stage; set 2 or more, or use the schedule 1f1b"
    )]
    TooFewChunks,
    /// Several chunks per stage were given to a schedule that takes one.
    #[error(
        "the schedule {kind} takes 1 model chunk per stage, not {chunks}; use 1, or the schedule interleaved"
    )]
    TooManyChunks {
        /// The schedule.
        kind: ScheduleKind,
        /// Chunks per stage that were requested.
        chunks: usize,
    },
    /// The schedule cannot be executed.
    #[error("the schedule cannot run: {0}")]
    Schedule(String),
    /// There are not as many costs as virtual stages.
    #[error("costs are given for {given} parts of the model, but it is cut into {needed}")]
    CostCount {
        /// Entries in the shortest list of costs.
        given: usize,
        /// Virtual stages.
        needed: usize,
    },
    /// There are more parts than blocks.
    #[error("the model has {blocks} blocks, so it can be cut into at most {blocks} stages, not {parts}")]
    TooFewBlocks {
        /// Blocks of the model.
        blocks: usize,
        /// Parts that were requested.
        parts: usize,
    },
    /// The cost of a block is negative, infinite or NaN.
    #[error("the cost of block {0} must be a finite number of at least zero")]
    Cost(usize),
    /// The parts of the model cannot be determined for this plan.
    #[error("the model: {0}")]
    Model(String),
    /// Gradients cannot be encoded so.
    #[error("compress: {0}")]
    Compress(String),
    /// Islands cannot train like this.
    #[error("local: {0}")]
    Local(String),
    /// Parameter servers do not go with the plan.
    #[error("sync: {0}")]
    Servers(String),
    /// A size is too large to count or to hold in memory.
    #[error("{0}")]
    TooLarge(String),
}

/// How many samples one optimizer step takes, as the user gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Number of samples.
    pub samples: usize,
    /// Whether `samples` counts the samples of one worker (else those of all workers together).
    pub per_worker: bool,
    /// Micro-batches that the samples of one worker are divided into.
    pub accumulate: usize,
}

impl Batch {
    /// `samples` in total over all workers, each worker's share in `accumulate` micro-batches.
    pub fn global(samples: usize, accumulate: usize) -> Self {
        Self { samples, per_worker: false, accumulate }
    }

    /// `samples` on each worker, in `accumulate` micro-batches.
    pub fn per_worker(samples: usize, accumulate: usize) -> Self {
        Self { samples, per_worker: true, accumulate }
    }
}

/// Which activations forward keeps for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Forward keeps everything that backward reads.
    #[default]
    None,
    /// Forward keeps the input of every block; backward recomputes the rest (Chen et al. 2016, "Training Deep Nets
    /// with Sublinear Memory Cost").
    Block,
    /// Forward keeps the input of every chunk of the pipeline. Before a chunk's backward its blocks run forward
    /// again, and their inputs are kept until that backward ends (Huang et al. 2019, "GPipe", section 2.3).
    All,
}

/// How a job is distributed over ranks. It is printed at the start and stored in every checkpoint and summary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The named axes and their sizes.
    pub mesh: Mesh,
    /// Which tensor dimension is split over which axis.
    pub layout: Layout,
    /// Samples of one worker in one optimizer step.
    pub batch_per_worker: usize,
    /// Micro-batches that a worker's samples are divided into.
    pub accumulate: usize,
    /// Upper limit for the size of a gradient bucket, in bytes.
    pub bucket_bytes: usize,
    /// The ZeRO stage, which says what is sharded over the axis `data`: 0 nothing, 1 the optimizer state, 2 also the
    /// gradients, 3 also the parameters (Rajbhandari et al. 2020, "ZeRO").
    pub zero: u8,
    /// With `zero` 3: how many blocks ahead of their use parameters are gathered.
    pub prefetch: usize,
    /// Whether the optimizer state is kept in a file instead of in memory.
    pub offload: bool,
    /// In which order the stages of a pipeline execute forwards and backwards.
    pub schedule: ScheduleKind,
    /// Chunks of the model that each stage holds.
    pub chunks: usize,
    /// Whether activations between tensor-parallel layers are split along `time`: sequence parallelism (Korthikanti et
    /// al. 2022, "Reducing Activation Recomputation in Large Transformer Models").
    pub sequence: bool,
    /// Which activations forward keeps for backward.
    pub recompute: Recompute,
    /// How workers encode the gradients that they send each other.
    #[serde(default)]
    pub compress: Compress,
    /// When islands, the indices along the axis `replica`, come together.
    #[serde(default)]
    pub local: Local,
    /// Which ranks keep the parameters for the workers, if workers do not do it themselves.
    #[serde(default)]
    pub servers: Servers,
}

impl Plan {
    /// A plan over `mesh` for `batch`, with nothing sharded.
    ///
    /// # Errors
    /// [`PlanError::Zero`] for an empty batch or no micro-batches, [`PlanError::BatchDoesNotDivide`] if the batch
    /// does not divide evenly among workers and micro-batches, and [`PlanError::TooLarge`] if a product overflows.
    pub fn new(mesh: Mesh, batch: Batch, bucket_bytes: usize) -> Result<Self, PlanError> {
        let workers = mesh.workers();
        if batch.samples == 0 {
            return Err(PlanError::Zero("the batch"));
        }
        if batch.accumulate == 0 {
            return Err(PlanError::Zero("the number of micro-batches"));
        }
        let Batch { samples, per_worker, accumulate } = batch;
        let too_large = |count: usize, what: &str| {
            PlanError::TooLarge(format!("{workers} workers x {count} {what} is too large a number"))
        };
        let total = if per_worker { samples.checked_mul(workers) } else { Some(samples) };
        let total = total.ok_or_else(|| too_large(samples, "samples"))?;
        let parts = workers.checked_mul(accumulate).ok_or_else(|| too_large(accumulate, "micro-batches"))?;
        if !total.is_multiple_of(parts) {
            let lower = (total / parts * parts).max(parts);
            return Err(PlanError::BatchDoesNotDivide {
                batch: total,
                parts,
                workers,
                accumulate: batch.accumulate,
                lower,
                upper: total.checked_next_multiple_of(parts).unwrap_or(lower),
            });
        }
        Ok(Self {
            mesh,
            layout: Layout::default(),
            batch_per_worker: total / workers,
            accumulate: batch.accumulate,
            bucket_bytes,
            zero: 0,
            prefetch: 1,
            offload: false,
            schedule: ScheduleKind::default(),
            chunks: 1,
            sequence: false,
            recompute: Recompute::None,
            compress: Compress::default(),
            local: Local::default(),
            servers: Servers::default(),
        })
    }

    /// Ranks of the mesh.
    pub fn world(&self) -> usize {
        self.mesh.size()
    }

    /// Samples per optimizer step over all workers.
    pub fn global_batch(&self) -> usize {
        self.batch_per_worker * self.mesh.workers()
    }

    /// Samples of one worker in one micro-batch.
    pub fn micro_batch(&self) -> usize {
        self.batch_per_worker / self.accumulate
    }

    /// Stages of the pipeline.
    pub fn stages(&self) -> usize {
        self.mesh.axis(Axis::Pipe)
    }

    /// Ranks that a unit of parameters is sharded over; 1 if nothing is sharded.
    pub fn shards(&self) -> usize {
        self.sharded().map_or(1, |sharded| sharded.shards)
    }

    /// The schedule of a training step: the tasks of every stage of the pipeline, in order.
    ///
    /// # Errors
    /// Those of [`Schedule::new`], as a number of chunks that the schedule does not support.
    pub fn pipeline(&self) -> Result<Schedule, PlanError> {
        Schedule::new(self.schedule, self.stages(), self.chunks, self.accumulate)
    }

    /// Divides the model's blocks into one range per virtual stage, as evenly as possible by cost. `costs` has the
    /// cost of each block, in any unit.
    ///
    /// # Errors
    /// Those of [`balance`]: fewer blocks than virtual stages, or an invalid cost.
    pub fn cut(&self, costs: &[f64]) -> Result<Vec<std::ops::Range<usize>>, PlanError> {
        balance(costs, self.stages() * self.chunks)
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mesh {}, batch {} per worker ({} in all)",
            self.mesh,
            self.batch_per_worker,
            self.global_batch()
        )?;
        if self.accumulate > 1 {
            write!(f, " in {} micro-batches", self.accumulate)?;
        }
        if self.stages() > 1 {
            write!(f, ", schedule {}", self.schedule)?;
        }
        if self.chunks > 1 {
            write!(f, " with {} chunks per stage", self.chunks)?;
        }
        if self.zero > 0 {
            write!(f, ", zero {}", self.zero)?;
        }
        if self.sequence {
            write!(f, ", norm regions split along time")?;
        }
        match self.recompute {
            Recompute::None => {}
            Recompute::Block => write!(f, ", blocks recomputed in backward")?,
            Recompute::All => write!(f, ", stages and blocks recomputed in backward")?,
        }
        if self.offload {
            write!(f, ", optimizer state in a file")?;
        }
        if let Some(local) = self.local() {
            write!(f, ", {local}")?;
        }
        if self.servers.count > 0 {
            write!(f, ", {}", self.servers)?;
        }
        if self.compress.kind != CompressKind::None {
            let what = if self.local().is_some() { "differences" } else { "gradients" };
            write!(f, ", {what} as {}", self.compress)?;
        }
        if self.compress.pipeline != CompressKind::None && self.stages() > 1 {
            write!(f, ", activations as {}", self.compress.pipeline)?;
        }
        write!(f, ", buckets of at most {:.1} MiB", self.bucket_bytes as f64 / (1 << 20) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_does_not_divide_is_refused_with_the_nearest_valid_ones() {
        let error = Plan::new(Mesh::data(5), Batch::global(12, 1), 1).unwrap_err();
        assert_eq!(
            error,
            PlanError::BatchDoesNotDivide {
                batch: 12,
                parts: 5,
                workers: 5,
                accumulate: 1,
                lower: 10,
                upper: 15
            }
        );
        let error = Plan::new(Mesh::data(2), Batch::per_worker(3, 2), 1).unwrap_err();
        assert!(error.to_string().contains("a batch of 6 does not divide among 4"), "{error}");
    }

    #[test]
    fn the_global_batch_is_the_same_for_every_world_size() {
        for workers in [1, 2, 3, 4, 6, 12] {
            let plan = Plan::new(Mesh::data(workers), Batch::global(12, 1), 1).unwrap();
            assert_eq!(plan.global_batch(), 12);
        }
    }

    #[test]
    fn products_that_overflow_are_refused() {
        let huge = usize::MAX / 2;
        let refused = [
            Plan::new(Mesh::data(4), Batch::global(8, huge), 1),
            Plan::new(Mesh::data(4), Batch::per_worker(huge, 1), 1),
            Plan::new(Mesh::data(1), Batch::global(huge, huge - 1), 1),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        let mesh = format!("data={huge},pipe={huge}");
        assert!(mesh.parse::<Mesh>().unwrap_err().to_string().contains("at most 65536 ranks"));
        let schedule = Schedule::new(ScheduleKind::OneFOneB, 1, 1, 250_000_000_000).unwrap_err();
        assert!(schedule.to_string().contains("train.accumulate"), "{schedule}");
        assert!(Schedule::new(ScheduleKind::Interleaved, huge, huge, huge).is_err());
    }

    #[test]
    fn zero_is_refused() {
        assert_eq!(Plan::new(Mesh::data(1), Batch::global(0, 1), 1), Err(PlanError::Zero("the batch")));
        assert!(Plan::new(Mesh::data(1), Batch::global(1, 0), 1).is_err());
    }
}
