//! The memory-efficient schedule ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1).

use super::{Task, one_f_one_b::warm_up};

/// 1F1B whose backward is divided into two parts: the gradient of the input, which the stage before waits for, and the
/// gradient of the weights, which no stage waits for.
///
/// Stage `s` delays its weight parts by `s` micro-batches. So later stages send their first gradients at once, and
/// have weight parts left for the end, where 1F1B waits. The delayed parts keep activations of more micro-batches on
/// later stages, but no stage holds more than the first one: `stages` micro-batches.
pub(super) fn tasks(stage: usize, stages: usize, micro_batches: usize) -> Vec<Task> {
    let ahead = warm_up(stage, stages, micro_batches);
    let late = stage.min(micro_batches);
    let mut tasks = Vec::with_capacity(3 * micro_batches);
    tasks.extend((0..ahead).map(|micro_batch| Task::Forward { chunk: 0, micro_batch }));
    for micro_batch in 0..micro_batches {
        if micro_batch + ahead < micro_batches {
            tasks.push(Task::Forward { chunk: 0, micro_batch: micro_batch + ahead });
        }
        tasks.push(Task::BackwardInput { chunk: 0, micro_batch });
        if micro_batch >= late {
            tasks.push(Task::BackwardWeight { chunk: 0, micro_batch: micro_batch - late });
        }
    }
    tasks.extend(
        (micro_batches - late..micro_batches)
            .map(|micro_batch| Task::BackwardWeight { chunk: 0, micro_batch }),
    );
    tasks
}
