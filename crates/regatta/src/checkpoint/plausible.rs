//! Checks whether a manifest can be true. A foreign manifest may be wrong though its checksum is right.
//!
//! Every size by which the reader counts, divides or allocates is compared with the tensors that the manifest lists,
//! and these are compared with the files when they are read. So a small manifest cannot make the reader allocate
//! terabytes.

use super::Manifest;

/// Largest vocabulary: its products with the sizes of a model do not overflow.
const LARGEST_VOCABULARY: usize = 1 << 24;

/// Most samples in a step: their products with tokens do not overflow.
const MOST_SAMPLES: usize = 1 << 40;

/// Most chunks of a model on a stage.
const MOST_CHUNKS: usize = 1 << 16;

/// Blocks that a manifest may have without listing as many tensors; describing this many is cheap.
const MANY_BLOCKS: usize = 1000;

impl Manifest {
    /// Checks that the manifest is consistent.
    ///
    /// # Errors
    /// The configuration or the plan is invalid, sizes do not match the tensors, or the parts do not cover the
    /// tensors.
    pub(super) fn plausible(&self) -> Result<(), String> {
        let state = &self.state;
        state.config.check_stored()?;
        let plan = &state.plan;
        let batch = plan.batch_per_worker.saturating_mul(plan.mesh.workers());
        let even = plan.accumulate > 0 && plan.batch_per_worker.is_multiple_of(plan.accumulate);
        if batch == 0 || batch > MOST_SAMPLES || !even || !(1..=MOST_CHUNKS).contains(&plan.chunks) {
            return Err(format!(
                "has an invalid plan: {} samples for each of {} workers in {} micro-batches, {} chunks a stage",
                plan.batch_per_worker,
                plan.mesh.workers(),
                plan.accumulate,
                plan.chunks
            ));
        }
        if state.vocab > LARGEST_VOCABULARY {
            return Err(format!(
                "has a model with {} tokens or classes: at most {LARGEST_VOCABULARY} are supported",
                state.vocab
            ));
        }
        let (blocks, tensors) = (state.config.model.costs(state.vocab).len(), self.tensors.len());
        if blocks > tensors.max(MANY_BLOCKS) {
            return Err(format!("has a model of {blocks} blocks, but only {tensors} tensors"));
        }
        self.check_elements()
    }

    /// Checks that the parts of every tensor have as many elements as the tensor.
    fn check_elements(&self) -> Result<(), String> {
        let mut missing: std::collections::BTreeMap<&str, i128> = self
            .tensors
            .iter()
            .map(|(name, shape)| (name.as_str(), shape.iter().map(|&dim| dim as i128).product()))
            .collect();
        for part in self.files.iter().flat_map(|file| &file.parts) {
            if let Some(left) = missing.get_mut(part.name.as_str()) {
                *left -= part.piece.len() as i128;
            }
        }
        match missing.iter().find(|(_, left)| **left != 0) {
            Some((name, left)) if *left > 0 => Err(format!("lacks {left} elements of {name}")),
            Some((name, left)) => Err(format!("has {} elements too many of {name}", -left)),
            None => Ok(()),
        }
    }
}
