//! Interleaved 1F1B (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
//! Megatron-LM", section 2.2).

use super::Task;
use std::ops::Range;

/// 1F1B in the order of [`forwards`]. The warm-up lets the first group reach the last chunk. It is two forwards
/// longer for every stage after this one: one for the way of the activations, and one for the way back of the
/// gradients.
pub(super) fn tasks(stage: usize, stages: usize, chunks: usize, micro_batches: usize) -> Vec<Task> {
    let forwards = forwards(stages, chunks, micro_batches);
    let largest = groups(stages, micro_batches).map(|group| group.len()).max().unwrap_or(0);
    let ahead = (2 * (stages - 1 - stage) + (chunks - 1) * largest).min(forwards.len());
    // Backwards take the groups in the same order, and the chunks from the last to the first.
    let backwards = forwards
        .iter()
        .map(|task| Task::Backward { chunk: chunks - 1 - task.chunk(), micro_batch: task.micro_batch() });

    let mut tasks = forwards[..ahead].to_vec();
    for (i, backward) in backwards.enumerate() {
        tasks.extend(forwards.get(i + ahead));
        tasks.push(backward);
    }
    tasks
}

/// The forwards of any stage: a group of micro-batches goes through the first chunk, then the second and so on; then
/// comes the next group.
///
/// The order is the same on all stages and a task needs only earlier tasks, so forwards alone cannot deadlock.
pub(super) fn forwards(stages: usize, chunks: usize, micro_batches: usize) -> Vec<Task> {
    groups(stages, micro_batches)
        .flat_map(|group| {
            (0..chunks).flat_map(move |chunk| {
                group.clone().map(move |micro_batch| Task::Forward { chunk, micro_batch })
            })
        })
        .collect()
}

/// The micro-batches in groups of at least `stages`, otherwise as small and as even as possible. With this size, the
/// first micro-batch of a group has gone through all stages when the stage is done with the last one.
///
/// The paper uses groups of exactly `stages` and requires that they divide the micro-batches. With a smaller group the
/// warm-up would be too short, and the stages would deadlock.
fn groups(stages: usize, micro_batches: usize) -> impl Iterator<Item = Range<usize>> {
    let count = (micro_batches / stages).max(1);
    (0..count).map(move |i| i * micro_batches / count..(i + 1) * micro_batches / count)
}
