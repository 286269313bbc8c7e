//! Sharing out work among the threads of the current pool.

use rayon::prelude::*;

/// Elements below which threads cost more than they bring.
const WORTH: usize = 1 << 15;

/// Calls `each` with the index of every chunk of `chunk` elements of `out` (the last may be shorter) and that chunk;
/// on several threads where there are any and it is worth it. A caller with one thread never leaves it.
pub(crate) fn for_chunks<T: Send>(out: &mut [T], chunk: usize, each: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() < WORTH || rayon::current_num_threads() == 1 {
        out.chunks_mut(chunk).enumerate().for_each(|(index, part)| each(index, part));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(index, part)| each(index, part));
    }
}

/// [`for_chunks`] that returns what every call returns, in order.
pub(crate) fn map_chunks<T: Send, R: Send>(
    out: &mut [T],
    chunk: usize,
    each: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    let chunk = chunk.max(1);
    if out.len() < WORTH || rayon::current_num_threads() == 1 {
        out.chunks_mut(chunk).enumerate().map(|(index, part)| each(index, part)).collect()
    } else {
        out.par_chunks_mut(chunk).enumerate().map(|(index, part)| each(index, part)).collect()
    }
}

/// Rows of `width` elements that make a chunk of about `1 << 14` elements: the same however many threads there are.
pub(crate) fn rows_of_chunk(width: usize) -> usize {
    ((1 << 14) / width.max(1)).max(1)
}
