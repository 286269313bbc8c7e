//! Upper bounds of the numbers in a configuration. They are far above what machines can train, and small enough that
//! no product of them overflows and no list of such a length is too long for memory.

use super::reader::Reader;
use super::schema::{Config, DataKind};
use crate::error::Result;
use regatta_plan::{MAX_RANKS, Plan, PlanError};

/// Tokens of a vocabulary, or classes.
const VOCABULARY: usize = 1 << 20;
/// Samples of a step.
const BATCH: usize = 1 << 20;
/// Micro-batches of a step.
const MICRO_BATCHES: usize = 1 << 16;
/// Steps: of training, of warm-up and decay, and tokens to generate.
const STEPS: usize = 1_000_000_000_000;
/// MiB of text.
const TEXT_MIB: usize = 1 << 20;
/// Samples that a sampler can number.
const SAMPLES: usize = u32::MAX as usize;
/// Values in all patterns of synthetic images.
const PATTERNS: usize = 1 << 28;
/// Blocks whose parameters are gathered ahead, and chunks of a model on a stage.
const BLOCKS: usize = 1 << 10;
/// Rank of the matrices that stand for gradients.
const RANK: usize = 1 << 10;
/// Threads of a rank.
const THREADS: usize = 1 << 12;
/// Forward passes of blocks in a step; each is an entry in a list.
const BLOCK_PASSES: usize = 1 << 20;
/// Checks of units in a step under ZeRO 3; this many take some seconds.
const UNIT_CHECKS: usize = 1 << 31;
/// Values that one worker's step may keep for backward.
const ACTIVATIONS: f64 = (1u64 << 50) as f64;

/// Checks all numbers against their upper bounds.
pub(super) fn check(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let Config { data, train, optimizer, parallel, compress, local, sync, sample, .. } = config;
    reader.at_most("model", &config.model.limits())?;
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
    reader.at_most("compress", &[("rank", compress.rank, RANK), ("warmup", compress.warmup, STEPS)])?;
    reader.at_most(
        "local",
        &[
            ("every", local.every, STEPS),
            ("start", local.start, STEPS),
            ("fragments", local.fragments, STEPS),
            ("overlap", local.overlap, STEPS),
        ],
    )?;
    reader.at_most("sync", &[("servers", sync.servers, MAX_RANKS), ("staleness", sync.staleness, STEPS)])?;
    reader.at_most("sample", &[("tokens", sample.tokens, STEPS)])?;
    if let (DataKind::Synthetic, Some([height, width, channels])) =
        (data.kind, config.model.samples().image())
    {
        let most = PATTERNS / (height * width * channels).max(1);
        if data.classes > most {
            let problem = format!(
                "{} patterns of {height} x {width} x {channels} numbers are too many: use at most {most} of this size",
                data.classes
            );
            return Err(reader.error("data.classes", problem));
        }
    }
    Ok(())
}

/// Checks the number of block passes in a step, and of the values that a worker keeps for backward.
pub(super) fn check_step(config: &Config, plan: &Plan, vocab: usize) -> Result<(), PlanError> {
    let costs = config.model.costs(vocab);
    let (blocks, kept) = (costs.len(), costs.iter().map(|cost| cost.kept).sum::<f64>());
    let passes = blocks.saturating_mul(plan.accumulate);
    // Under ZeRO 3 every pass checks which units must be gathered for the blocks ahead.
    let ahead = if plan.zero == 3 && plan.shards() > 1 { plan.prefetch.saturating_add(1) } else { 0 };
    if passes > BLOCK_PASSES || passes.saturating_mul(blocks).saturating_mul(ahead) > UNIT_CHECKS {
        return Err(PlanError::TooLarge(format!(
            "{blocks} blocks x {} micro-batches, with parallel.prefetch = {}, are too many for a step; lower \
             train.accumulate (--micro-batches)",
            plan.accumulate, plan.prefetch
        )));
    }
    let inputs = config.model.input_sizes(vocab).map_err(|error| PlanError::Model(error.to_string()))?;
    let values = (kept + inputs.iter().sum::<f64>()) * plan.batch_per_worker as f64;
    if values <= ACTIVATIONS {
        return Ok(());
    }
    Err(PlanError::TooLarge(format!(
        "the model has {values:.1e} values of activations for the {} samples of a worker, more than any machine holds; use a \
         smaller model or a smaller train.batch",
        plan.batch_per_worker
    )))
}
