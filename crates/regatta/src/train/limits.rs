//! The largest numbers of a configuration. They are far beyond what machines train, and small enough that no product of
//! theirs is too large to be counted and that no list of theirs is too large to be made.

use super::config::{Config, DataKind, ModelConfig, Reader};
use crate::error::Result;
use regatta_plan::{MAX_RANKS, Plan, PlanError};

/// Layers, or blocks of all stages, of a model.
const LAYERS: usize = 1 << 10;
/// Numbers side by side: the width of a layer.
const WIDTH: usize = 1 << 17;
/// Tokens of a context.
const CONTEXT: usize = 1 << 20;
/// Channels of a convolution.
const CHANNELS: usize = 1 << 12;
/// Pixels along a side of a picture.
const SIDE: usize = 1 << 11;
/// Tokens of a vocabulary, or classes.
const VOCABULARY: usize = 1 << 20;
/// Samples of a step.
const BATCH: usize = 1 << 20;
/// Micro-batches of a step.
const MICRO_BATCHES: usize = 1 << 16;
/// Steps, of all kinds.
const STEPS: usize = 1_000_000_000_000;
/// MiB of text.
const TEXT_MIB: usize = 1 << 20;
/// Samples that a sampler can number.
const SAMPLES: usize = u32::MAX as usize;
/// Numbers of all patterns that made-up pictures are made from.
const PATTERNS: usize = 1 << 28;
/// Blocks that parameters are gathered ahead of, and parts of a model on a stage.
const BLOCKS: usize = 1 << 10;
/// Threads of a rank.
const THREADS: usize = 1 << 12;
/// Forwards of blocks in a step, each of which is an entry of a list.
const VISITS: usize = 1 << 20;
/// Looks at units in a step under ZeRO 3: some seconds' worth.
const LOOKS: usize = 1 << 31;
/// Numbers that one worker's step may leave for backward.
const ACTIVATIONS: f64 = (1u64 << 50) as f64;

/// Checks that no number is larger than what can be counted.
pub(super) fn check(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let Config { data, train, optimizer, parallel, sample, .. } = config;
    reader.at_most("model", &of_model(&config.model))?;
    reader.at_most(
        "data",
        &[
            ("vocab_size", data.vocab_size, VOCABULARY),
            ("max_mib", data.max_mib, TEXT_MIB),
            ("classes", data.classes, VOCABULARY),
            ("samples", data.samples, SAMPLES),
        ],
    )?;
    reader.at_most(
        "train",
        &[
            ("steps", train.steps, STEPS),
            ("batch", train.batch.unwrap_or(1), BATCH),
            ("batch_per_worker", train.batch_per_worker.unwrap_or(1), BATCH),
            ("accumulate", train.accumulate, MICRO_BATCHES),
            ("eval_batches", train.eval_batches, SAMPLES),
        ],
    )?;
    let decay_steps = optimizer.decay_steps.unwrap_or(1);
    reader
        .at_most("optimizer", &[("warmup", optimizer.warmup, STEPS), ("decay_steps", decay_steps, STEPS)])?;
    reader.at_most(
        "parallel",
        &[
            ("workers", parallel.workers.unwrap_or(1), MAX_RANKS),
            ("prefetch", parallel.prefetch, BLOCKS),
            ("chunks", parallel.chunks.unwrap_or(1), BLOCKS),
            ("threads", parallel.threads.unwrap_or(1), THREADS),
        ],
    )?;
    reader.at_most("sample", &[("tokens", sample.tokens, STEPS)])?;
    if let (DataKind::Synthetic, Some([height, width, channels])) = (data.kind, config.model.picture()) {
        let most = PATTERNS / (height * width * channels).max(1);
        if data.classes > most {
            let problem = format!(
                "{} patterns of {height} x {width} x {channels} numbers are too many: at most {most} of this size",
                data.classes
            );
            return Err(reader.error("data.classes", problem));
        }
    }
    Ok(())
}

fn of_model(model: &ModelConfig) -> Vec<(&'static str, usize, usize)> {
    let widest = |widths: &[usize]| widths.iter().copied().max().unwrap_or(0);
    let together = |counts: &[usize]| counts.iter().copied().fold(0, usize::saturating_add);
    match model {
        ModelConfig::Gpt(gpt) => vec![
            ("layers", gpt.layers, LAYERS),
            ("heads", gpt.heads, WIDTH),
            ("embed", gpt.embed, WIDTH),
            ("block", gpt.block, CONTEXT),
        ],
        ModelConfig::EncoderDecoder(model) => vec![
            ("encoder_layers", model.encoder_layers, LAYERS),
            ("decoder_layers", model.decoder_layers, LAYERS),
            ("heads", model.heads, WIDTH),
            ("embed", model.embed, WIDTH),
            ("block", model.block, CONTEXT),
        ],
        ModelConfig::Mlp(mlp) => {
            vec![("hidden", widest(&mlp.hidden), WIDTH), ("hidden", mlp.hidden.len(), LAYERS)]
        }
        ModelConfig::Cnn(cnn) => {
            vec![("channels", widest(&cnn.channels), CHANNELS), ("hidden", cnn.hidden, WIDTH)]
        }
        ModelConfig::Resnet(resnet) => vec![
            ("stages", together(&resnet.stages), LAYERS),
            ("channels", resnet.channels, CHANNELS),
            ("side", resnet.side, SIDE),
            ("inputs", resnet.inputs, CHANNELS),
        ],
    }
}

/// Checks that what a worker's step leaves for backward, and what it does, can be counted.
pub(super) fn check_step(config: &Config, plan: &Plan, vocab: usize) -> Result<(), PlanError> {
    let costs = config.model.costs(vocab);
    let (blocks, kept) = (costs.len(), costs.iter().map(|cost| cost.kept).sum::<f64>());
    let visits = blocks.saturating_mul(plan.accumulate);
    // Under ZeRO 3 every visit looks for what is to be fetched for the blocks ahead.
    let ahead = if plan.zero == 3 && plan.shards() > 1 { plan.prefetch.saturating_add(1) } else { 0 };
    if visits > VISITS || visits.saturating_mul(blocks).saturating_mul(ahead) > LOOKS {
        return Err(PlanError::TooLarge(format!(
            "{blocks} blocks x {} micro-batches, with parallel.prefetch = {}, are more than a step may have; lower \
             train.accumulate (--micro-batches)",
            plan.accumulate, plan.prefetch
        )));
    }
    let numbers = (kept + config.model.inputs().iter().sum::<f64>()) * plan.batch_per_worker as f64;
    if numbers <= ACTIVATIONS {
        return Ok(());
    }
    Err(PlanError::TooLarge(format!(
        "the model has {numbers:.1e} numbers of activations for the {} samples of a worker, more than any machine holds; use a \
         smaller model or a smaller train.batch",
        plan.batch_per_worker
    )))
}
