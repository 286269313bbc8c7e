//! What a parameter server does instead of training.

use super::job::Job;
use super::run::for_model;
use crate::datasets::Datasets;
use crate::error::Result;
use crate::servers::{Served, ServerEnd, serve as serve_workers};
use crate::setup::shard;

/// Keeps a shard of the parameters of `job`'s model for the workers, until all of them have left. The job's group is of no use
/// to a server.
///
/// # Errors
/// The data cannot be read, communication fails, or a worker has another model.
pub fn serve(job: &Job, end: ServerEnd) -> Result<Served> {
    let data = for_model(job, Datasets::open(&job.config)?)?;
    let offload =
        job.plan.offload.then(|| job.out.join("offload").join(format!("server-{:05}", end.index())));
    let shard = shard(&job.config, &job.plan, end.index(), data.vocab, offload.as_deref())?;
    serve_workers(end, shard)
}
