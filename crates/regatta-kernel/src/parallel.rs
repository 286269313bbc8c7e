//! Dividing work among the threads of the current `rayon` pool.

use rayon::prelude::*;

/// With fewer elements, starting threads costs more than it saves.
const MIN_PARALLEL: usize = 1 << 15;

/// Calls `each` with the index of every chunk of `chunk` elements of `out` (the last may be shorter) and with that
/// chunk. It uses several threads if the pool has them and `out` is large enough. With one thread, everything runs on
/// the caller's thread.
pub(crate) fn for_chunks<T: Send>(out: &mut [T], chunk: usize, each: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() < MIN_PARALLEL || rayon::current_num_threads() == 1 {
        out.chunks_mut(chunk).enumerate().for_each(|(index, part)| each(index, part));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(index, part)| each(index, part));
    }
}

/// As [`for_chunks`], but returns the results of all calls in order.
pub(crate) fn map_chunks<T: Send, R: Send>(
    out: &mut [T],
    chunk: usize,
    each: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    let chunk = chunk.max(1);
    if out.len() < MIN_PARALLEL || rayon::current_num_threads() == 1 {
        out.chunks_mut(chunk).enumerate().map(|(index, part)| each(index, part)).collect()
    } else {
        out.par_chunks_mut(chunk).enumerate().map(|(index, part)| each(index, part)).collect()
    }
}

/// Elements of a chunk of rows.
const CHUNK: usize = 1 << 14;

/// How many rows of `width` elements make a chunk of about [`CHUNK`] elements. The result does not depend on the
/// threads.
pub(crate) fn rows_of_chunk(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}
