//! The backward pass of one head.

use super::Head;
use super::pack::{Scratch, copy_as_columns, copy_rows};
use super::product::{Left, Right, add_product, product, store, vectors_at};
use super::softmax::{exp2, hide, hide_masked};
use super::view::{Rows, RowsMut};
use pulp::{Simd, WithSimd};

/// Queries of a tile.
const QUERIES: usize = 64;
/// Keys of a tile.
const KEYS: usize = 64;

/// The backward pass of one head.
pub(super) struct Backward<'a> {
    pub(super) head: Head<'a>,
    /// The output of the forward pass.
    pub(super) output: Rows<'a>,
    /// The gradient of the output.
    pub(super) gradient: Rows<'a>,
    /// The logarithms of the sums of exponentials.
    pub(super) sums: &'a [f32],
    /// Where the gradients of queries, keys and values go.
    pub(super) targets: [RowsMut; 3],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 { self.run::<S, 8>(simd) } else { self.run::<S, 4>(simd) }
    }
}

/// All queries and what belongs to them. Matrices are `[time, row]`.
struct Queries<'a> {
    /// The queries, scaled.
    queries: &'a [f32],
    /// The gradient of the output.
    gradient: &'a [f32],
    /// Base-2 logarithms of the sums of exponentials, one per query.
    sums: &'a [f32],
    /// The dot product of output and gradient, one per query.
    dots: &'a [f32],
    /// The gradient of the queries, not yet scaled.
    of_queries: &'a mut [f32],
}

/// A block of keys and values, and their gradients.
struct Keys<'a> {
    /// The keys as columns, `[panels, width, panel]`.
    columns: &'a [f32],
    /// The keys as rows, `[keys, row]`.
    rows: &'a [f32],
    /// The values as columns, `[panels, width, panel]`.
    values: &'a [f32],
    /// The gradient of the keys, `[keys, row]`.
    of_keys: &'a mut [f32],
    /// The gradient of the values, `[keys, row]`.
    of_values: &'a mut [f32],
}

/// Tiles of weights and of the gradients of scores, `[QUERIES, KEYS]`, and the dropout factors of `M` queries.
struct Tiles<'a> {
    weights: &'a mut [f32],
    scores: &'a mut [f32],
    dropout: &'a mut [f32],
}

impl Backward<'_> {
    /// The pass with `M` rows in registers.
    #[inline(always)]
    fn run<S: Simd, const M: usize>(self, simd: S) {
        let Self { head, output, gradient, sums, targets: [mut to_queries, mut to_keys, mut to_values] } =
            self;
        let Head { time, seen, width, .. } = head;
        let panel = 2 * S::F32_LANES;
        let row = width.next_multiple_of(S::F32_LANES);
        let rows = time.next_multiple_of(M);
        let of_block = KEYS * width;
        let lens = [
            rows * row,
            rows * row,
            rows * row,
            rows,
            rows,
            of_block,
            of_block,
            KEYS * row,
            KEYS * row,
            KEYS * row,
            QUERIES * KEYS,
            QUERIES * KEYS,
            M * KEYS,
        ];
        let mut scratch = Scratch::take();
        let [q, g, of_queries, logs, dots, key_columns, values, key_rows, of_keys, of_values, w, s, dropout] =
            scratch.parts(lens);
        {
            copy_rows(head.queries, 0, time, width, head.scale(), q, row);
            copy_rows(gradient, 0, time, width, 1.0, g, row);
            of_queries.fill(0.0);
            // Padding of the last group has weights 0.
            logs.fill(f32::INFINITY);
            dots.fill(0.0);
            for (i, (log, dot_of_query)) in logs.iter_mut().zip(dots.iter_mut()).enumerate().take(time) {
                *log = sums[i] * std::f32::consts::LOG2_E;
                *dot_of_query = dot(simd, output.row(i, width), &g[i * row..][..width]);
            }
            let mut queries = Queries { queries: q, gradient: g, sums: logs, dots, of_queries };
            let mut block = 0;
            while block < seen {
                let count = KEYS.min(seen - block);
                copy_as_columns(head.keys, block, count, width, key_columns, panel);
                copy_as_columns(head.values, block, count, width, values, panel);
                copy_rows(head.keys, block, count, width, 1.0, key_rows, row);
                of_keys.fill(0.0);
                of_values.fill(0.0);
                let mut keys = Keys { columns: key_columns, rows: key_rows, values, of_keys, of_values };
                let mut tiles = Tiles { weights: w, scores: s, dropout };
                // Earlier queries do not see the block.
                let mut first = head.past.map_or(0, |past| block.saturating_sub(past)) / M * M;
                while first < time {
                    tile::<S, M>(simd, &head, first, block, &mut queries, &mut keys, &mut tiles);
                    first += QUERIES;
                }
                for i in 0..count {
                    // SAFETY: the key exists. The factor undoes the scaling of queries for exponents of 2.
                    unsafe {
                        to_keys.write(block + i, &keys.of_keys[i * row..], std::f32::consts::LN_2);
                        to_values.write(block + i, &keys.of_values[i * row..], 1.0);
                    }
                }
                block += KEYS;
            }
            let scale = (width as f32).sqrt().recip();
            for i in 0..time {
                // SAFETY: the query exists.
                unsafe { to_queries.write(i, &queries.of_queries[i * row..], scale) };
            }
        }
    }
}

/// Adds to the gradients of a block of queries from `first` on and of a block of keys from `block` on what each
/// contributes to the other's.
#[inline(always)]
fn tile<S: Simd, const M: usize>(
    simd: S,
    head: &Head<'_>,
    first: usize,
    block: usize,
    queries: &mut Queries<'_>,
    keys: &mut Keys<'_>,
    tiles: &mut Tiles<'_>,
) {
    let width = head.width;
    let row = width.next_multiple_of(S::F32_LANES);
    let vectors = row / S::F32_LANES;
    let end = (first + QUERIES).min(head.time.next_multiple_of(M));
    let mut group = first;
    while group < end {
        let at = (group - first) * KEYS;
        let most = group_weights::<S, M>(simd, head, group, block, at, queries, keys, tiles);
        let scores = Left { values: &tiles.scores[at..], row: KEYS, column: 1 };
        let along = Right { values: keys.rows, row };
        let of_queries = &mut queries.of_queries[group * row..];
        add_product::<S, M>(simd, scores, along, most, of_queries, vectors, None);
        group += M;
    }
    let count = KEYS.min(head.seen - block);
    let mut column = 0;
    while column < count {
        // Earlier queries see none of these columns.
        let begin = head.past.map_or(first, |past| (block + column).saturating_sub(past).max(first));
        if begin < end {
            let at = (begin - first) * KEYS + column;
            let inner = end - begin;
            let weights = Left { values: &tiles.weights[at..], row: 1, column: KEYS };
            let gradient = Right { values: &queries.gradient[begin * row..], row };
            let of_values = &mut keys.of_values[column * row..];
            add_product::<S, M>(simd, weights, gradient, inner, of_values, vectors, None);
            let scores = Left { values: &tiles.scores[at..], row: 1, column: KEYS };
            let queries = Right { values: &queries.queries[begin * row..], row };
            let of_keys = &mut keys.of_keys[column * row..];
            add_product::<S, M>(simd, scores, queries, inner, of_keys, vectors, None);
        }
        column += M;
    }
}

/// Computes weights and gradients of scores for `M` queries from `group` on, and stores them at `at` in the tiles.
/// They are 0 where a query does not see a key. Returns how many keys of the block the last query sees.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn group_weights<S: Simd, const M: usize>(
    simd: S,
    head: &Head<'_>,
    group: usize,
    block: usize,
    at: usize,
    queries: &Queries<'_>,
    keys: &Keys<'_>,
    tiles: &mut Tiles<'_>,
) -> usize {
    let visible = |m: usize| head.visible(group + m).saturating_sub(block).min(KEYS);
    let most = visible(M - 1);
    // A multiple of `M`, so that a group of columns of the second step is either complete or not used.
    let columns = most.next_multiple_of(S::F32_LANES.max(M));
    if let Some(dropout) = head.dropout {
        for m in 0..M {
            dropout.factors((group + m) * head.seen + block, &mut tiles.dropout[m * KEYS..][..columns]);
        }
    }
    let rows_of_group = RowGroup { head, group, block, at, fewest: visible(0) };
    let mut column = 0;
    while column + 2 * S::F32_LANES <= columns {
        rows_of_group.columns::<S, M, 2>(simd, column, queries, keys, tiles);
        column += 2 * S::F32_LANES;
    }
    if column < columns {
        rows_of_group.columns::<S, M, 1>(simd, column, queries, keys, tiles);
    }
    most
}

/// A group of queries, and where it is in the tiles.
struct RowGroup<'a> {
    head: &'a Head<'a>,
    group: usize,
    block: usize,
    at: usize,
    /// How many keys of the block the first query of the group sees: no other query sees fewer.
    fewest: usize,
}

impl RowGroup<'_> {
    /// Computes weights and gradients of scores in `N` vectors of columns.
    #[inline(always)]
    fn columns<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        column: usize,
        queries: &Queries<'_>,
        keys: &Keys<'_>,
        tiles: &mut Tiles<'_>,
    ) {
        let &Self { head, group, block, at, .. } = self;
        let width = head.width;
        let row = width.next_multiple_of(S::F32_LANES);
        let len = N * S::F32_LANES;
        let zero = [[simd.splat_f32s(0.0); N]; M];
        let right = |values| Right { values, row: 2 * S::F32_LANES };
        let left = Left { values: &queries.queries[group * row..], row, column: 1 };
        let across = right(&keys.columns[column * width..]);
        let mut weights = product::<S, M, N>(simd, left, across, width, zero);
        for (m, weights) in weights.iter_mut().enumerate() {
            let log = simd.splat_f32s(queries.sums[group + m]);
            for weight in weights.iter_mut() {
                *weight = exp2(simd, simd.sub_f32s(*weight, log));
            }
            store::<S, N>(&mut tiles.weights[at + m * KEYS + column..], weights);
        }
        if self.fewest < column + len || head.hidden.is_some() {
            for m in 0..M {
                let visible = head.visible(group + m).saturating_sub(block).min(KEYS);
                let weights = &mut tiles.weights[at + m * KEYS + column..][..len];
                hide(simd, weights, visible.saturating_sub(column), 0.0);
                hide_masked(head, group + m, block + column, weights, 0.0);
            }
        }
        let left = Left { values: &queries.gradient[group * row..], row, column: 1 };
        let across = right(&keys.values[column * width..]);
        let mut scores = product::<S, M, N>(simd, left, across, width, zero);
        for (m, scores) in scores.iter_mut().enumerate() {
            let dot_of_query = simd.splat_f32s(queries.dots[group + m]);
            let begin = at + m * KEYS + column;
            if head.dropout.is_some() {
                let (weights, _) = S::as_mut_simd_f32s(&mut tiles.weights[begin..][..len]);
                let dropout = vectors_at::<S, N>(&tiles.dropout[m * KEYS + column..]);
                for ((score, weight), drop) in scores.iter_mut().zip(weights).zip(dropout) {
                    let kept = simd.mul_f32s(*score, *drop);
                    *score = simd.mul_f32s(*weight, simd.sub_f32s(kept, dot_of_query));
                    *weight = simd.mul_f32s(*weight, *drop);
                }
            } else {
                let weights = vectors_at::<S, N>(&tiles.weights[begin..]);
                for (score, weight) in scores.iter_mut().zip(weights) {
                    *score = simd.mul_f32s(*weight, simd.sub_f32s(*score, dot_of_query));
                }
            }
            store::<S, N>(&mut tiles.scores[begin..], scores);
        }
    }
}

/// The dot product of two slices.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, last_a), (b, last_b)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    let rest: f32 = last_a.iter().zip(last_b).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(sum) + rest
}
