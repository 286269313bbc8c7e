//! Arithmetic of parallel plans: which ranks form which axis, how a batch is cut, where a bucket ends.
//!
//! No tensors and no sockets live here, so a plan can be made, printed, tested and priced anywhere.
//!
//! ```
//! use regatta_plan::{Batch, Mesh, Plan};
//! let plan = Plan::new(Mesh::data(2), Batch::global(12, 1), 25 << 20).unwrap();
//! assert_eq!(plan.batch_per_worker, 6);
//! assert_eq!(plan.to_string(), "mesh data=2, batch 6 per worker (12 in all), buckets of at most 25.0 MiB");
//! ```

mod bucket;
mod cut;
mod layout;
mod memory;
mod mesh;
mod schedule;
mod simulate;
mod slices;
mod workers;

pub use bucket::{bucket_cap, buckets};
pub use cut::balance;
pub use layout::{Dim, Layout, SPLITTABLE, TensorSpec, part};
pub use memory::{BlockLoad, Footprint, Load, mebibytes};
pub use mesh::{AXES, MAX_RANKS, Mesh};
pub use schedule::{Direction, Schedule, ScheduleKind, Task};
pub use simulate::{Costs, Timeline, simulate};
pub use slices::{Piece, Run, copy as copy_pieces};
pub use workers::{default_workers, threads_per_worker};

use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a plan cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The global batch cannot be cut evenly.
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
    /// Axes that make no mesh, or a mesh of another size than the job.
    #[error("mesh {0}")]
    Mesh(String),
    /// A layout that cannot be.
    #[error("layout: {0}")]
    Layout(String),
    /// A schedule that does not exist, and those that do.
    #[error("there is no schedule '{0}'; use one of {1}")]
    UnknownSchedule(String, String),
    /// The interleaved schedule with one chunk a stage.
    #[error(
        "the interleaved schedule takes at least 2 model chunks a stage; set 2 or more, or use the schedule 1f1b"
    )]
    TooFewChunks,
    /// Several chunks a stage with a schedule that has one.
    #[error(
        "the schedule {kind} takes 1 model chunk a stage, not {chunks}; use 1, or the schedule interleaved"
    )]
    TooManyChunks {
        /// The schedule.
        kind: ScheduleKind,
        /// Chunks asked for.
        chunks: usize,
    },
    /// A schedule that cannot be executed.
    #[error("the schedule cannot run: {0}")]
    Schedule(String),
    /// Costs of another number of parts than the model is cut into.
    #[error("there are costs of {given} parts of the model, which is cut into {needed}")]
    CostCount {
        /// Costs in the shortest list.
        given: usize,
        /// Virtual stages.
        needed: usize,
    },
    /// More parts than blocks to cut.
    #[error("the model has {blocks} blocks, so it can be cut into at most {blocks} stages, not {parts}")]
    TooFewBlocks {
        /// Blocks of the model.
        blocks: usize,
        /// Parts asked for.
        parts: usize,
    },
    /// A cost that is negative or not a number.
    #[error("the cost of block {0} is not a number of at least zero")]
    Cost(usize),
    /// A size that no machine can hold or count.
    #[error("{0}")]
    TooLarge(String),
}

/// How many samples one optimizer step takes, as the user said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Samples.
    pub samples: usize,
    /// Whether `samples` counts one worker's share or all workers'.
    pub per_worker: bool,
    /// Micro-batches the samples of one worker are cut into.
    pub accumulate: usize,
}

impl Batch {
    /// `samples` over all workers.
    pub fn global(samples: usize, accumulate: usize) -> Self {
        Self { samples, per_worker: false, accumulate }
    }

    /// `samples` on each worker.
    pub fn per_worker(samples: usize, accumulate: usize) -> Self {
        Self { samples, per_worker: true, accumulate }
    }
}

/// What is kept from forward for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Everything that backward reads.
    #[default]
    None,
    /// The input of every block; the rest is computed again (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    /// Cost").
    Block,
    /// The input of every chunk of the pipeline: its blocks run again before they go backward, and keep their inputs for
    /// so long (Huang et al. 2019, "GPipe", section 2.3).
    All,
}

/// How a job is spread: printed at the start, kept in every checkpoint and summary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The named axes and their sizes.
    pub mesh: Mesh,
    /// Which dimension is split over which axis.
    pub layout: Layout,
    /// Samples of one worker in one optimizer step.
    pub batch_per_worker: usize,
    /// Micro-batches that a worker's samples are cut into.
    pub accumulate: usize,
    /// Upper bound of a gradient bucket in bytes.
    pub bucket_bytes: usize,
    /// What is sharded over the axis `data`, cumulatively: 1 optimizer state, 2 gradients, 3 parameters (Rajbhandari et
    /// al. 2020, "ZeRO").
    pub zero: u8,
    /// Blocks whose parameters are gathered ahead of their use, under `zero` 3.
    pub prefetch: usize,
    /// Whether the optimizer's state is in a file and not in memory.
    pub offload: bool,
    /// In which order the stages of a pipeline do their work.
    pub schedule: ScheduleKind,
    /// Parts of the model that each stage holds.
    pub chunks: usize,
    /// Whether the regions between split layers are split by `time` (Korthikanti et al. 2022).
    pub sequence: bool,
    /// What is kept from forward for backward.
    pub recompute: Recompute,
}

impl Plan {
    /// A plan over `mesh` for `batch`, with nothing sharded.
    ///
    /// # Errors
    /// When the batch does not divide among workers and micro-batches, or cannot be counted.
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
            PlanError::TooLarge(format!("{workers} workers x {count} {what} are more than can be counted"))
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
        })
    }

    /// Ranks in the job.
    pub fn world(&self) -> usize {
        self.mesh.size()
    }

    /// Samples per optimizer step over all workers.
    pub fn global_batch(&self) -> usize {
        self.batch_per_worker * self.mesh.workers()
    }

    /// Samples of one worker in one micro-step.
    pub fn micro_batch(&self) -> usize {
        self.batch_per_worker / self.accumulate
    }

    /// Stages of the pipeline.
    pub fn stages(&self) -> usize {
        self.mesh.axis("pipe")
    }

    /// Ranks that a unit of parameters is sharded over: 1 where nothing is sharded.
    pub fn shards(&self) -> usize {
        if self.zero == 0 { 1 } else { self.mesh.axis("data") }
    }

    /// What the stages of the pipeline do in a step.
    ///
    /// # Errors
    /// A number of chunks that the schedule does not take.
    pub fn pipeline(&self) -> Result<Schedule, PlanError> {
        Schedule::new(self.schedule, self.stages(), self.chunks, self.accumulate)
    }

    /// Cuts blocks of these costs into the chunks of all stages, by virtual stage: as even as can be.
    ///
    /// # Errors
    /// Fewer blocks than chunks.
    pub fn cut(&self, costs: &[f64]) -> Result<Vec<std::ops::Range<usize>>, PlanError> {
        balance(costs, self.stages() * self.chunks)
    }
}

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
            write!(f, " with {} chunks a stage", self.chunks)?;
        }
        if self.zero > 0 {
            write!(f, ", zero {}", self.zero)?;
        }
        if self.sequence {
            write!(f, ", norm regions split by time")?;
        }
        match self.recompute {
            Recompute::None => {}
            Recompute::Block => write!(f, ", blocks computed again in backward")?,
            Recompute::All => write!(f, ", stages and blocks computed again in backward")?,
        }
        if self.offload {
            write!(f, ", optimizer state in a file")?;
        }
        write!(f, ", buckets of at most {:.1} MiB", self.bucket_bytes as f64 / (1 << 20) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_does_not_divide_is_refused_with_its_neighbours() {
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
    fn the_same_global_batch_for_every_world() {
        for workers in [1, 2, 3, 4, 6, 12] {
            let plan = Plan::new(Mesh::data(workers), Batch::global(12, 1), 1).unwrap();
            assert_eq!(plan.global_batch(), 12);
        }
    }

    #[test]
    fn numbers_that_cannot_be_multiplied_are_refused() {
        let most = usize::MAX / 2;
        let refused = [
            Plan::new(Mesh::data(4), Batch::global(8, most), 1),
            Plan::new(Mesh::data(4), Batch::per_worker(most, 1), 1),
            Plan::new(Mesh::data(1), Batch::global(most, most - 1), 1),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        let mesh = format!("data={most},pipe={most}");
        assert!(mesh.parse::<Mesh>().unwrap_err().to_string().contains("at most 65536 ranks"));
        let schedule = Schedule::new(ScheduleKind::OneFOneB, 1, 1, 250_000_000_000).unwrap_err();
        assert!(schedule.to_string().contains("train.accumulate"), "{schedule}");
        assert!(Schedule::new(ScheduleKind::Interleaved, most, most, most).is_err());
    }

    #[test]
    fn zero_is_refused() {
        assert_eq!(Plan::new(Mesh::data(1), Batch::global(0, 1), 1), Err(PlanError::Zero("the batch")));
        assert!(Plan::new(Mesh::data(1), Batch::global(1, 0), 1).is_err());
    }
}
