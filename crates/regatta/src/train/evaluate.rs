//! Loss and metrics on held-out data, which is divided among the workers.

use crate::datasets::Dataset;
use crate::error::{Error, Result};
use crate::layers::Context;
use crate::models::{Activation, Model};
use crate::parallel::Engine;
use regatta_comm::ReduceOp;
use regatta_plan::Axis;

/// The result of an evaluation over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// Mean loss over all targets that count.
    pub loss: f64,
    /// Fraction of the samples that count and were classified correctly, for models that classify.
    pub accuracy: Option<f64>,
    /// The model's own metrics by name, each a mean over the samples.
    pub metrics: Vec<(String, f64)>,
}

/// Evaluates on `samples` samples spread evenly over `data`, in batches of `rows`; on all samples if `samples` is 0 or
/// more than there are. Every worker takes its share, and all ranks get the same result; none without samples that
/// count.
///
/// # Errors
/// Data cannot be read, or communication fails.
pub fn evaluate(
    engine: &mut Engine,
    data: &dyn Dataset,
    samples: usize,
    rows: usize,
) -> Result<Option<Score>> {
    let groups = engine.groups().clone();
    let (total, workers, rows) = (data.len(), groups.mesh().workers(), rows.max(1));
    let samples = if samples == 0 { total } else { samples.min(total) };
    if samples == 0 {
        return Ok(None);
    }
    let place = |i: usize| (i as u128 * total as u128 / samples as u128) as usize;
    let own: Vec<usize> = (groups.worker()..samples).step_by(workers).map(place).collect();
    // The same number of batches on every worker, because workers may gather parameters from one another.
    let batches = samples.div_ceil(workers).div_ceil(rows);
    let compute = engine.compute().clone();
    // One rank of each worker adds the worker's sums.
    let reports = engine.is_last() && groups.coordinate(Axis::Tensor) == 0;
    // [sum of losses, weight of samples, samples, correct ones, weight of those that were classified], then the metrics.
    let names = engine.evaluator().metric_names();
    let mut sums = vec![0.0f64; 5 + names.len()];
    for index in 0..batches {
        let indices = own.chunks(rows).nth(index).unwrap_or(&[0]);
        let counts = index * rows < own.len();
        let host = data.batch(0, indices)?;
        // The number of samples times the fraction of targets that count.
        let weight = indices.len() as f64 * (host.counted() as f64 / host.targets() as f64);
        let batch = host.into_batch(&compute.device()).cast(compute.dtype());
        let judge = |model: &dyn Model, output: Activation| {
            let (correct, metrics) = (model.correct(&output, &batch), model.metrics(&output, &batch));
            (correct, metrics, model.loss(output, &batch).into_scalar::<f32>())
        };
        let Some((correct, metrics, loss)) = engine.evaluate(&batch, &Context::eval(), judge)? else {
            continue;
        };
        if metrics.len() != names.len() {
            return Err(Error::Usage(format!(
                "Model::metrics returned {} numbers, and Model::metric_names has {} names",
                metrics.len(),
                names.len()
            )));
        }
        // Without targets there is no loss, whatever the model makes of it.
        if !(reports && counts && weight > 0.0) {
            continue;
        }
        if let Some(correct) = correct {
            sums[3] += correct as f64;
            sums[4] += weight;
        }
        sums[5..].iter_mut().zip(metrics).for_each(|(sum, metric)| *sum += metric);
        sums[0] += f64::from(loss) * weight;
        sums[1] += weight;
        sums[2] += indices.len() as f64;
    }
    groups.world().all_reduce(&mut sums, ReduceOp::Sum)?;
    let [loss, count, samples, correct, classified] = sums[..5] else { return Ok(None) };
    let accuracy = (classified > 0.0).then(|| correct / classified);
    let metrics = names.iter().zip(&sums[5..]).map(|(name, sum)| (name.to_string(), sum / samples)).collect();
    Ok((count > 0.0).then_some(Score { loss: loss / count, accuracy, metrics }))
}
