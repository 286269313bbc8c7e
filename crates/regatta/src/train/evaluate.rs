//! Loss (and accuracy) on held-out data, shared out among the workers.

use super::dataset::Dataset;
use crate::error::Result;
use crate::layers::Context;
use crate::models::Model;
use crate::parallel::Engine;
use regatta_comm::ReduceOp;

/// The result of an evaluation over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean loss over the samples.
    pub loss: f64,
    /// Part of the samples classified rightly, for models that classify.
    pub accuracy: Option<f64>,
}

/// Evaluates on `samples` samples spread evenly over `data`, or on all where that is 0 or more than there are, in
/// batches of `rows`. Every worker takes its share and all ranks get the same result.
///
/// # Errors
/// Data that cannot be read, or a peer that fails.
pub fn evaluate<M: Model>(
    engine: &mut Engine<M>,
    data: &dyn Dataset,
    samples: usize,
    rows: usize,
) -> Result<Option<Score>> {
    let axes = engine.axes().clone();
    let (total, workers, rows) = (data.len(), axes.mesh.workers(), rows.max(1));
    let samples = if samples == 0 { total } else { samples.min(total) };
    if samples == 0 {
        return Ok(None);
    }
    let place = |i: usize| (i as u128 * total as u128 / samples as u128) as usize;
    let mine: Vec<usize> = (axes.worker()..samples).step_by(workers).map(place).collect();
    // As many batches on every worker, because they may fetch parameters from one another.
    let batches = samples.div_ceil(workers).div_ceil(rows);
    let compute = engine.compute().clone();
    let speaks = engine.is_last() && axes.coordinate("tensor") == 0;
    // [sum of losses, samples, right ones, whether the model classifies]
    let mut sums = [0.0f64; 4];
    for index in 0..batches {
        let indices = mine.chunks(rows).nth(index).unwrap_or(&[0]);
        let counts = index * rows < mine.len();
        let batch = data.batch(0, indices)?.into_batch(&compute.device()).cast(compute.dtype());
        let Some(output) = engine.evaluate(&batch, &Context::eval())? else { continue };
        let correct = engine.quiet().correct(&output, &batch);
        let loss = engine.quiet().loss(output, &batch).into_scalar::<f32>();
        if !(speaks && counts) {
            continue;
        }
        if let Some(correct) = correct {
            sums[2] += correct as f64;
            sums[3] = 1.0;
        }
        sums[0] += f64::from(loss) * indices.len() as f64;
        sums[1] += indices.len() as f64;
    }
    axes.world.all_reduce(&mut sums, ReduceOp::Sum)?;
    let [loss, count, correct, classifies] = sums;
    let accuracy = (classifies > 0.0).then(|| correct / count);
    Ok((count > 0.0).then(|| Score { loss: loss / count, accuracy }))
}
