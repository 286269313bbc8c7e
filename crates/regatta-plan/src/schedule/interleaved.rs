//! Interleaved 1F1B (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
//! Megatron-LM", section 2.2).

use super::Task;
use std::ops::Range;

/// 1F1B over the order of [`forwards`]. The warm-up brings the first group to the last chunk and is two forwards
/// longer for every stage behind this one: one on the way there, one on the way back.
pub(super) fn tasks(stage: usize, stages: usize, chunks: usize, micros: usize) -> Vec<Task> {
    let forwards = forwards(stages, chunks, micros);
    let largest = groups(stages, micros).map(|group| group.len()).max().unwrap_or(0);
    let ahead = (2 * (stages - 1 - stage) + (chunks - 1) * largest).min(forwards.len());
    // Backwards go through the groups alike, through the chunks from the last.
    let backwards =
        forwards.iter().map(|task| Task::Backward { chunk: chunks - 1 - task.chunk(), micro: task.micro() });

    let mut tasks = forwards[..ahead].to_vec();
    for (i, backward) in backwards.enumerate() {
        tasks.extend(forwards.get(i + ahead));
        tasks.push(backward);
    }
    tasks
}

/// The forwards of any stage: a group of micro-batches through its first chunk, then its second, then the next
/// group.
///
/// The order is the same on all stages and a task needs only earlier ones, so forwards alone cannot block.
pub(super) fn forwards(stages: usize, chunks: usize, micros: usize) -> Vec<Task> {
    groups(stages, micros)
        .flat_map(|group| {
            (0..chunks).flat_map(move |chunk| group.clone().map(move |micro| Task::Forward { chunk, micro }))
        })
        .collect()
}

/// Micro-batches in groups of at least `stages`, so that the first of a group has come around when the last has
/// left, and otherwise as small and as even as can be.
///
/// The paper has groups of exactly `stages` and asks for a multiple of it; with a shorter group the warm-up would
/// not suffice and stages would wait for each other in a circle.
fn groups(stages: usize, micros: usize) -> impl Iterator<Item = Range<usize>> {
    let count = (micros / stages).max(1);
    (0..count).map(move |i| i * micros / count..(i + 1) * micros / count)
}
