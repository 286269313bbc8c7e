//! 1F1B with a flush at the end of the step (Narayanan et al. 2019, "PipeDream", section 3.2; 2021,
//! "Memory-Efficient Pipeline-Parallel DNN Training", section 3.2).

use super::Task;

/// The warm-up is one forward for every stage after this one. Then come one forward and one backward in turn, and at
/// the end the backwards of as many micro-batches as the warm-up had.
pub(super) fn tasks(stage: usize, stages: usize, micro_batches: usize) -> Vec<Task> {
    let ahead = warm_up(stage, stages, micro_batches);
    let mut tasks = Vec::with_capacity(2 * micro_batches);
    tasks.extend((0..ahead).map(|micro_batch| Task::Forward { chunk: 0, micro_batch }));
    for micro_batch in 0..micro_batches {
        if micro_batch + ahead < micro_batches {
            tasks.push(Task::Forward { chunk: 0, micro_batch: micro_batch + ahead });
        }
        tasks.push(Task::Backward { chunk: 0, micro_batch });
    }
    tasks
}

/// The length of the warm-up: forwards before the first backward.
pub(super) fn warm_up(stage: usize, stages: usize, micro_batches: usize) -> usize {
    (stages - 1 - stage).min(micro_batches)
}
