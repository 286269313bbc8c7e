//! Backward of one head.

use super::Pair;
use super::pack::{Scratch, copy, transpose};
use super::product::{Left, Right, add_product, product, store, vectors_at};
use super::softmax::{exp2, hide, hide_masked};
use super::view::{Rows, RowsMut};
use pulp::{Simd, WithSimd};

/// Queries of a tile.
const QUERIES: usize = 64;
/// Keys of a tile.
const KEYS: usize = 64;

/// Backward of one head.
pub(super) struct Backward<'a> {
    pub(super) pair: Pair<'a>,
    /// What queries gathered.
    pub(super) output: Rows<'a>,
    /// Its gradient.
    pub(super) gradient: Rows<'a>,
    /// Logarithms of the sums of exponentials.
    pub(super) sums: &'a [f32],
    /// Get the gradients of queries, keys and values.
    pub(super) targets: [RowsMut; 3],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 { self.run::<S, 8>(simd) } else { self.run::<S, 4>(simd) }
    }
}

/// The queries' side, all of it: `[time, row]` each.
struct Queries<'a> {
    /// Scaled.
    queries: &'a [f32],
    /// Of the output.
    gradient: &'a [f32],
    /// Logarithms to base 2 of the sums of exponentials.
    sums: &'a [f32],
    /// Sums of output times gradient.
    shares: &'a [f32],
    /// Of the queries, and not yet scaled.
    of_queries: &'a mut [f32],
}

/// A block of the keys' side.
struct Keys<'a> {
    /// `[panels, width, panel]`
    across: &'a [f32],
    /// `[keys, row]`
    along: &'a [f32],
    /// `[panels, width, panel]`
    values: &'a [f32],
    of_keys: &'a mut [f32],
    of_values: &'a mut [f32],
}

/// Tiles of weights and of their scores' gradients, `[QUERIES, KEYS]`, and a row of dropout.
struct Tiles<'a> {
    weights: &'a mut [f32],
    scores: &'a mut [f32],
    drops: &'a mut [f32],
}

impl Backward<'_> {
    /// With `M` rows in registers.
    #[inline(always)]
    fn run<S: Simd, const M: usize>(self, simd: S) {
        let Self { pair, output, gradient, sums, targets: [mut to_queries, mut to_keys, mut to_values] } =
            self;
        let Pair { time, seen, width, .. } = pair;
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
        let [q, g, of_queries, logs, shares, across, values, along, of_keys, of_values, w, s, drops] =
            scratch.parts(lens);
        {
            copy(pair.queries, 0, time, width, pair.scale(), q, row);
            copy(gradient, 0, time, width, 1.0, g, row);
            of_queries.fill(0.0);
            // Queries that only fill the last group up weigh nothing.
            logs.fill(f32::INFINITY);
            shares.fill(0.0);
            for (i, (log, share)) in logs.iter_mut().zip(shares.iter_mut()).enumerate().take(time) {
                *log = sums[i] * std::f32::consts::LOG2_E;
                *share = dot(simd, output.row(i, width), &g[i * row..][..width]);
            }
            let mut queries = Queries { queries: q, gradient: g, sums: logs, shares, of_queries };
            let mut block = 0;
            while block < seen {
                let count = KEYS.min(seen - block);
                transpose(pair.keys, block, count, width, across, panel);
                transpose(pair.values, block, count, width, values, panel);
                copy(pair.keys, block, count, width, 1.0, along, row);
                of_keys.fill(0.0);
                of_values.fill(0.0);
                let mut keys = Keys { across, along, values, of_keys, of_values };
                let mut tiles = Tiles { weights: w, scores: s, drops };
                // Queries before do not see the block.
                let mut first = pair.past.map_or(0, |past| block.saturating_sub(past)) / M * M;
                while first < time {
                    tile::<S, M>(simd, &pair, first, block, &mut queries, &mut keys, &mut tiles);
                    first += QUERIES;
                }
                for i in 0..count {
                    // SAFETY: the key exists. Queries came scaled, for exponents of two.
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

/// What the queries from `first` on and the keys from `block` on do to each other's gradients.
#[inline(always)]
fn tile<S: Simd, const M: usize>(
    simd: S,
    pair: &Pair<'_>,
    first: usize,
    block: usize,
    queries: &mut Queries<'_>,
    keys: &mut Keys<'_>,
    tiles: &mut Tiles<'_>,
) {
    let width = pair.width;
    let row = width.next_multiple_of(S::F32_LANES);
    let vectors = row / S::F32_LANES;
    let end = (first + QUERIES).min(pair.time.next_multiple_of(M));
    let mut group = first;
    while group < end {
        let at = (group - first) * KEYS;
        let most = group_weights::<S, M>(simd, pair, group, block, at, queries, keys, tiles);
        let scores = Left { values: &tiles.scores[at..], row: KEYS, column: 1 };
        let along = Right { values: keys.along, row };
        let of_queries = &mut queries.of_queries[group * row..];
        add_product::<S, M>(simd, scores, along, most, of_queries, vectors, None);
        group += M;
    }
    let count = KEYS.min(pair.seen - block);
    let mut column = 0;
    while column < count {
        // Queries before see none of these columns.
        let begin = pair.past.map_or(first, |past| (block + column).saturating_sub(past).max(first));
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

/// Weights and their scores' gradients for `M` queries from `group` on, at `at` of the tiles; zeros where a query does not see
/// a key. Returns how many keys the last sees.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn group_weights<S: Simd, const M: usize>(
    simd: S,
    pair: &Pair<'_>,
    group: usize,
    block: usize,
    at: usize,
    queries: &Queries<'_>,
    keys: &Keys<'_>,
    tiles: &mut Tiles<'_>,
) -> usize {
    let visible = |m: usize| pair.visible(group + m).saturating_sub(block).min(KEYS);
    let most = visible(M - 1);
    // So that a group of columns of the second step is all within or all without.
    let columns = most.next_multiple_of(S::F32_LANES.max(M));
    if let Some(drops) = pair.drops {
        for m in 0..M {
            drops.factors((group + m) * pair.seen + block, &mut tiles.drops[m * KEYS..][..columns]);
        }
    }
    let side = Side { pair, group, block, at, least: visible(0) };
    let mut column = 0;
    while column + 2 * S::F32_LANES <= columns {
        side.columns::<S, M, 2>(simd, column, queries, keys, tiles);
        column += 2 * S::F32_LANES;
    }
    if column < columns {
        side.columns::<S, M, 1>(simd, column, queries, keys, tiles);
    }
    most
}

/// Rows of queries and where they are in the tiles.
struct Side<'a> {
    pair: &'a Pair<'a>,
    group: usize,
    block: usize,
    at: usize,
    /// Keys of the block that the first of them sees.
    least: usize,
}

impl Side<'_> {
    /// Weights and gradients of scores in `N` vectors of columns.
    #[inline(always)]
    fn columns<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        column: usize,
        queries: &Queries<'_>,
        keys: &Keys<'_>,
        tiles: &mut Tiles<'_>,
    ) {
        let &Self { pair, group, block, at, .. } = self;
        let width = pair.width;
        let row = width.next_multiple_of(S::F32_LANES);
        let len = N * S::F32_LANES;
        let zero = [[simd.splat_f32s(0.0); N]; M];
        let right = |values| Right { values, row: 2 * S::F32_LANES };
        let left = Left { values: &queries.queries[group * row..], row, column: 1 };
        let across = right(&keys.across[column * width..]);
        let mut weights = product::<S, M, N>(simd, left, across, width, zero);
        for (m, weights) in weights.iter_mut().enumerate() {
            let log = simd.splat_f32s(queries.sums[group + m]);
            for weight in weights.iter_mut() {
                *weight = exp2(simd, simd.sub_f32s(*weight, log));
            }
            store::<S, N>(&mut tiles.weights[at + m * KEYS + column..], weights);
        }
        if self.least < column + len || pair.hidden.is_some() {
            for m in 0..M {
                let visible = pair.visible(group + m).saturating_sub(block).min(KEYS);
                let weights = &mut tiles.weights[at + m * KEYS + column..][..len];
                hide(simd, weights, visible.saturating_sub(column), 0.0);
                hide_masked(pair, group + m, block + column, weights, 0.0);
            }
        }
        let left = Left { values: &queries.gradient[group * row..], row, column: 1 };
        let across = right(&keys.values[column * width..]);
        let mut scores = product::<S, M, N>(simd, left, across, width, zero);
        for (m, scores) in scores.iter_mut().enumerate() {
            let share = simd.splat_f32s(queries.shares[group + m]);
            let begin = at + m * KEYS + column;
            if pair.drops.is_some() {
                let (weights, _) = S::as_mut_simd_f32s(&mut tiles.weights[begin..][..len]);
                let drops = vectors_at::<S, N>(&tiles.drops[m * KEYS + column..]);
                for ((score, weight), drop) in scores.iter_mut().zip(weights).zip(drops) {
                    let kept = simd.mul_f32s(*score, *drop);
                    *score = simd.mul_f32s(*weight, simd.sub_f32s(kept, share));
                    *weight = simd.mul_f32s(*weight, *drop);
                }
            } else {
                let weights = vectors_at::<S, N>(&tiles.weights[begin..]);
                for (score, weight) in scores.iter_mut().zip(weights) {
                    *score = simd.mul_f32s(*weight, simd.sub_f32s(*score, share));
                }
            }
            store::<S, N>(&mut tiles.scores[begin..], scores);
        }
    }
}

/// The sum of the products of what is side by side.
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
