//! The memory-efficient schedule ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1).

use super::{Task, one_f_one_b::warm_up};

/// 1F1B whose backward is cut in the gradient of the input, which the stage before waits for, and the gradient of
/// the weights, which nobody waits for.
///
/// The weight part of stage `s` comes `s` micro-batches late. Later stages thus pass their first gradients on at
/// once and have weight parts left for the end, where 1F1B waits. What 1F1B holds less on later stages is what
/// the late parts hold there: no stage holds more than the first one, `stages` micro-batches.
pub(super) fn tasks(stage: usize, stages: usize, micros: usize) -> Vec<Task> {
    let ahead = warm_up(stage, stages, micros);
    let late = stage.min(micros);
    let mut tasks = Vec::with_capacity(3 * micros);
    tasks.extend((0..ahead).map(|micro| Task::Forward { chunk: 0, micro }));
    for micro in 0..micros {
        if micro + ahead < micros {
            tasks.push(Task::Forward { chunk: 0, micro: micro + ahead });
        }
        tasks.push(Task::BackwardInput { chunk: 0, micro });
        if micro >= late {
            tasks.push(Task::BackwardWeight { chunk: 0, micro: micro - late });
        }
    }
    tasks.extend((micros - late..micros).map(|micro| Task::BackwardWeight { chunk: 0, micro }));
    tasks
}
