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
mod mesh;
mod workers;

pub use bucket::{bucket_cap, buckets};
pub use mesh::Mesh;
pub use workers::{default_workers, threads_per_worker};

use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a plan cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The global batch cannot be cut evenly.
    #[error(
        "a batch of {batch} does not divide among {parts} ({workers} workers x {accumulate} micro-steps); \
         use a batch of {lower} or {upper}, or another number of workers"
    )]
    BatchDoesNotDivide {
        /// Samples per optimizer step, over all workers.
        batch: usize,
        /// Workers times micro-steps.
        parts: usize,
        /// Size of the data axis.
        workers: usize,
        /// Micro-steps per optimizer step.
        accumulate: usize,
        /// The next smaller batch that divides (at least `parts`).
        lower: usize,
        /// The next larger batch that divides.
        upper: usize,
    },
    /// A count that must be at least one is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
}

/// How many samples one optimizer step takes, as the user said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Samples.
    pub samples: usize,
    /// Whether `samples` counts one worker's share or all workers'.
    pub per_worker: bool,
    /// Micro-steps the samples of one worker are cut into.
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

/// How a job is spread: printed at the start, kept in every checkpoint and summary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The named axes and their sizes.
    pub mesh: Mesh,
    /// Samples of one worker in one optimizer step.
    pub batch_per_worker: usize,
    /// Micro-steps that a worker's samples are cut into; gradients are communicated after the last.
    pub accumulate: usize,
    /// Upper bound of a gradient bucket in bytes.
    pub bucket_bytes: usize,
}

impl Plan {
    /// A plan over `mesh` for `batch`.
    ///
    /// # Errors
    /// When the batch does not divide among workers and micro-steps.
    pub fn new(mesh: Mesh, batch: Batch, bucket_bytes: usize) -> Result<Self, PlanError> {
        let workers = mesh.axis("data");
        if batch.samples == 0 {
            return Err(PlanError::Zero("the batch"));
        }
        if batch.accumulate == 0 {
            return Err(PlanError::Zero("the number of micro-steps"));
        }
        let total = if batch.per_worker { batch.samples * workers } else { batch.samples };
        let parts = workers * batch.accumulate;
        if !total.is_multiple_of(parts) {
            let lower = (total / parts * parts).max(parts);
            return Err(PlanError::BatchDoesNotDivide {
                batch: total,
                parts,
                workers,
                accumulate: batch.accumulate,
                lower,
                upper: total.next_multiple_of(parts),
            });
        }
        Ok(Self { mesh, batch_per_worker: total / workers, accumulate: batch.accumulate, bucket_bytes })
    }

    /// Ranks in the job.
    pub fn world(&self) -> usize {
        self.mesh.size()
    }

    /// Samples per optimizer step over all workers.
    pub fn global_batch(&self) -> usize {
        self.batch_per_worker * self.mesh.axis("data")
    }

    /// Samples of one worker in one micro-step.
    pub fn micro_batch(&self) -> usize {
        self.batch_per_worker / self.accumulate
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
            write!(f, " in {} micro-steps", self.accumulate)?;
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
    fn zero_is_refused() {
        assert_eq!(Plan::new(Mesh::data(1), Batch::global(0, 1), 1), Err(PlanError::Zero("the batch")));
        assert!(Plan::new(Mesh::data(1), Batch::global(1, 0), 1).is_err());
    }
}
