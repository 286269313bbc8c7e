//! Loss (and accuracy) on held-out data, shared out among the ranks.

use super::dataset::Dataset;
use crate::error::Result;
use crate::layers::Context;
use crate::models::Model;
use regatta_comm::{Group, ReduceOp};

/// The result of an evaluation over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean loss over the samples.
    pub loss: f64,
    /// Part of the samples classified rightly, for models that classify.
    pub accuracy: Option<f64>,
}

/// Evaluates `model` (without autodiff) on `samples` samples spread evenly over `data`, or on all where that is
/// 0 or more than there are, in batches of `rows`. Every rank takes its share and all get the same result.
///
/// # Errors
/// Data that cannot be read, or a peer that fails.
pub fn evaluate<M: Model>(
    model: &M,
    data: &dyn Dataset,
    samples: usize,
    rows: usize,
    group: &Group,
) -> Result<Option<Score>> {
    let (total, world) = (data.len(), group.size());
    let samples = if samples == 0 { total } else { samples.min(total) };
    let mine: Vec<usize> = (group.rank()..samples)
        .step_by(world)
        .map(|i| (i as u128 * total as u128 / samples as u128) as usize)
        .collect();
    // [sum of losses, samples, right ones, whether the model classifies]
    let mut sums = [0.0f64; 4];
    for indices in mine.chunks(rows.max(1)) {
        let batch = data.batch(0, indices)?.into_batch(&crate::autograd::device());
        let output = model.forward(&batch, &Context::eval());
        if let Some(correct) = model.correct(&output, &batch) {
            sums[2] += correct as f64;
            sums[3] = 1.0;
        }
        sums[0] += f64::from(model.loss(output, &batch).into_scalar::<f32>()) * indices.len() as f64;
        sums[1] += indices.len() as f64;
    }
    group.all_reduce(&mut sums, ReduceOp::Sum)?;
    let [loss, count, correct, classifies] = sums;
    let accuracy = (classifies > 0.0).then(|| correct / count);
    Ok((count > 0.0).then(|| Score { loss: loss / count, accuracy }))
}
