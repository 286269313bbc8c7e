//! Whether what a manifest says can be true: somebody else may have written it, with a right checksum.
//!
//! Everything that is counted, divided by or reserved because of a manifest is held here against what it lists, and what it
//! lists is held against the files when they are used, so that a few bytes cannot ask for terabytes.

use super::Manifest;
use crate::train::ModelConfig;

/// No size of a model is larger: products of four of them can still be counted.
const LARGEST: usize = 1 << 24;

/// No step has more samples: their products with tokens can still be counted.
const MOST_SAMPLES: usize = 1 << 40;

/// No stage has more parts of a model.
const MOST_CHUNKS: usize = 1 << 16;

/// More layers than this are believed only where there are as many tensors: to describe these costs nothing.
const MANY_LAYERS: usize = 1000;

impl Manifest {
    /// # Errors
    /// A configuration that no user could have given, a plan that cannot be, sizes that do not go with the tensors, tensors
    /// that the parts do not fill.
    pub(super) fn plausible(&self) -> Result<(), String> {
        let state = &self.state;
        state.config.check_stored()?;
        let plan = &state.plan;
        let batch = plan.batch_per_worker.saturating_mul(plan.mesh.workers());
        let even = plan.accumulate > 0 && plan.batch_per_worker.is_multiple_of(plan.accumulate);
        if batch == 0 || batch > MOST_SAMPLES || !even || !(1..=MOST_CHUNKS).contains(&plan.chunks) {
            return Err(format!(
                "has a plan that cannot be: {} samples for each of {} workers in {} micro-batches, {} chunks a stage",
                plan.batch_per_worker,
                plan.mesh.workers(),
                plan.accumulate,
                plan.chunks
            ));
        }
        let tensors = self.tensors.len();
        let layers = |counts: &[usize]| {
            let all = counts.iter().try_fold(0usize, |all, &count| all.checked_add(count));
            all.filter(|&all| all <= tensors.max(MANY_LAYERS))
                .map(drop)
                .ok_or_else(|| format!("has a model of {counts:?} layers, but only {tensors} tensors"))
        };
        let sizes = |sizes: &[usize]| match sizes.iter().find(|&&size| size > LARGEST) {
            Some(size) => Err(format!("has a model with a size of {size}: {LARGEST} is the largest")),
            None => Ok(()),
        };
        sizes(&[state.vocab])?;
        match &state.config.model {
            ModelConfig::Gpt(gpt) => {
                layers(&[gpt.layers])?;
                sizes(&[gpt.heads, gpt.embed, gpt.block])?;
            }
            ModelConfig::EncoderDecoder(model) => {
                layers(&[model.encoder_layers, model.decoder_layers])?;
                sizes(&[model.heads, model.embed, model.block])?;
            }
            ModelConfig::Mlp(mlp) => {
                layers(&[mlp.hidden.len()])?;
                sizes(&mlp.hidden)?;
            }
            ModelConfig::Cnn(cnn) => {
                sizes(&cnn.channels)?;
                sizes(&[cnn.hidden])?;
            }
            ModelConfig::Resnet(resnet) => {
                layers(&resnet.stages)?;
                sizes(&[resnet.channels, resnet.inputs])?;
                // Its square counts pixels.
                sizes(&[resnet.side.saturating_mul(256)])?;
            }
        }
        self.filled()
    }

    /// Whether the parts of every tensor have as many elements as it has.
    fn filled(&self) -> Result<(), String> {
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
