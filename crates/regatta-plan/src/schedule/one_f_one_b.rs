//! 1F1B with a flush at the end of the step (Narayanan et al. 2019, "PipeDream", section 3.2; 2021,
//! "Memory-Efficient Pipeline-Parallel DNN Training", section 3.2).

use super::Task;

/// Warm-up: one forward for every stage behind this one. Then one forward and one backward in turn, and at the
/// end the backwards that the warm-up is ahead by.
pub(super) fn tasks(stage: usize, stages: usize, micros: usize) -> Vec<Task> {
    let ahead = warm_up(stage, stages, micros);
    let mut tasks = Vec::with_capacity(2 * micros);
    tasks.extend((0..ahead).map(|micro| Task::Forward { chunk: 0, micro }));
    for micro in 0..micros {
        if micro + ahead < micros {
            tasks.push(Task::Forward { chunk: 0, micro: micro + ahead });
        }
        tasks.push(Task::Backward { chunk: 0, micro });
    }
    tasks
}

/// Forwards that a stage is ahead of its backwards before they take turns.
pub(super) fn warm_up(stage: usize, stages: usize, micros: usize) -> usize {
    (stages - 1 - stage).min(micros)
}
