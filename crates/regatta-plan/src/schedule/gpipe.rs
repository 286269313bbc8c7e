//! GPipe (Huang et al. 2019, figure 2c).

use super::Task;

/// All forwards, then all backwards from the last micro-batch to the first, as in the paper's figure.
///
/// Every stage reverses, so gradients travel in the order in which they are wanted. All micro-batches are in
/// flight at once.
pub(super) fn tasks(micros: usize) -> Vec<Task> {
    let forwards = (0..micros).map(|micro| Task::Forward { chunk: 0, micro });
    forwards.chain((0..micros).rev().map(|micro| Task::Backward { chunk: 0, micro })).collect()
}
