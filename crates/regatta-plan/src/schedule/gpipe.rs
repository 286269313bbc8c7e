//! GPipe (Huang et al. 2019, figure 2c).

use super::Task;

/// All forwards, then all backwards from the last micro-batch to the first, as in the paper's figure.
///
/// Every stage reverses the order, so gradients are sent in the order in which they are needed. All micro-batches are
/// in flight at the same time.
pub(super) fn tasks(micro_batches: usize) -> Vec<Task> {
    let forwards = (0..micro_batches).map(|micro_batch| Task::Forward { chunk: 0, micro_batch });
    forwards
        .chain((0..micro_batches).rev().map(|micro_batch| Task::Backward { chunk: 0, micro_batch }))
        .collect()
}
