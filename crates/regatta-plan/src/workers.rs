//! The default number of workers on a machine, and of threads per worker.

/// More workers than this are limited by memory bandwidth and memory size.
const MOST_WORKERS: usize = 8;

/// The number of workers for `cores` cores: one per core, at most eight.
///
/// Dividing the batch over processes scales better than dividing matrix products over threads. With more than eight
/// workers, memory bandwidth and memory size become the limit. If the global batch `batch` is given, the result
/// divides it.
pub fn default_workers(cores: usize, batch: Option<usize>) -> usize {
    let most = cores.clamp(1, MOST_WORKERS);
    match batch {
        Some(batch) => (1..=most).rev().find(|n| batch.is_multiple_of(*n)).unwrap_or(1),
        None => most,
    }
}

/// Threads per worker: an equal share of the `cores`, at least one.
pub fn threads_per_worker(cores: usize, workers: usize) -> usize {
    (cores / workers.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_divide_the_batch_and_share_the_cores() {
        assert_eq!(default_workers(2, Some(12)), 2);
        assert_eq!(default_workers(8, Some(12)), 6);
        assert_eq!(default_workers(4, Some(7)), 1);
        assert_eq!(default_workers(64, None), 8);
        assert_eq!(default_workers(0, None), 1);
        assert_eq!(threads_per_worker(8, 3), 2);
        assert_eq!(threads_per_worker(2, 4), 1);
    }
}
