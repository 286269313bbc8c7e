//! The forward pass of one head.

use super::Head;
use super::pack::{Scratch, copy_as_columns, copy_rows};
use super::product::{Left, Right, add_product, product, store};
use super::softmax::{State, exp2, hide, hide_masked};
use super::view::RowsMut;
use pulp::{Simd, WithSimd};

/// Queries of a block, which pass over the keys together.
const QUERIES: usize = 64;
/// Keys of a block: their scores are computed before their values are added.
const KEYS: usize = 128;

/// The forward pass of one head.
pub(super) struct Forward<'a> {
    pub(super) head: Head<'a>,
    /// Where the output goes.
    pub(super) output: RowsMut,
    /// Where the logarithms of the sums of exponentials go.
    pub(super) sums: RowsMut,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 { self.run::<S, 8>(simd) } else { self.run::<S, 4>(simd) }
    }
}

impl Forward<'_> {
    /// The pass with `M` queries in registers.
    #[inline(always)]
    fn run<S: Simd, const M: usize>(mut self, simd: S) {
        let Head { time, seen, width, .. } = self.head;
        let panel = 2 * S::F32_LANES;
        let row = width.next_multiple_of(S::F32_LANES);
        let lens = [
            seen.next_multiple_of(panel) * width,
            seen * row,
            QUERIES * width,
            QUERIES * row,
            M * KEYS,
            KEYS,
        ];
        let mut scratch = Scratch::take();
        let [keys, values, queries, weighted, tile, dropout] = scratch.parts(lens);
        {
            copy_as_columns(self.head.keys, 0, seen, width, keys, panel);
            copy_rows(self.head.values, 0, seen, width, 1.0, values, row);
            let mut first = 0;
            while first < time {
                let count = QUERIES.min(time - first);
                copy_rows(self.head.queries, first, count, width, self.head.scale(), queries, width);
                weighted.fill(0.0);
                let mut states = [State::NEW; QUERIES];
                let mut block = 0;
                while block < self.head.visible(first + count - 1) {
                    let mut group = 0;
                    while group < count {
                        let rows = Group { head: &self.head, first, group, block };
                        let queries = &queries[group * width..];
                        let weighted = &mut weighted[group * row..];
                        let states = &mut states[group..group + M];
                        rows.run::<S, M>(simd, [queries, keys, values], weighted, states, tile, dropout);
                        group += M;
                    }
                    block += KEYS;
                }
                for (i, state) in states[..count].iter().enumerate() {
                    let factor = if state.sum == 0.0 { 0.0 } else { 1.0 / state.sum };
                    // SAFETY: the query exists.
                    unsafe {
                        self.output.write(first + i, &weighted[i * row..], factor);
                        self.sums.write(first + i, &[state.logarithm()], 1.0);
                    }
                }
                first += count;
            }
        }
    }
}

/// `M` queries whose scores are in registers at the same time, and a block of keys.
struct Group<'a> {
    head: &'a Head<'a>,
    /// Index of the first query of the block of queries.
    first: usize,
    /// Index of the first query of this group in the block.
    group: usize,
    /// Index of the first key of the block of keys.
    block: usize,
}

impl Group<'_> {
    /// Adds what the queries get from this block of keys to `weighted`.
    #[inline(always)]
    fn run<S: Simd, const M: usize>(
        &self,
        simd: S,
        [queries, keys, values]: [&[f32]; 3],
        weighted: &mut [f32],
        states: &mut [State],
        tile: &mut [f32],
        dropout: &mut [f32],
    ) {
        let &Self { head, block, .. } = self;
        let width = head.width;
        let panel = 2 * S::F32_LANES;
        let row = width.next_multiple_of(S::F32_LANES);
        let begin = self.first + self.group;
        let visible = |m: usize| head.visible(begin + m).saturating_sub(block).min(KEYS);
        let most = visible(M - 1);
        if most == 0 {
            return;
        }
        let columns = most.next_multiple_of(S::F32_LANES);
        let queries = Left { values: queries, row: width, column: 1 };
        let mut range = ScoreRange::new(simd);
        let mut column = 0;
        while column < columns {
            let right = Right { values: &keys[(block + column) * width..], row: panel };
            let tile = &mut tile[column..];
            if column + panel <= columns {
                scores::<S, M, 2>(simd, queries, right, width, tile, &mut range);
            } else {
                scores::<S, M, 1>(simd, queries, right, width, tile, &mut range);
            }
            column += panel;
        }
        for m in 0..M {
            let scores = &mut tile[m * KEYS..][..columns];
            if visible(m) < columns {
                hide(simd, scores, visible(m), f32::NEG_INFINITY);
            }
            hide_masked(head, begin + m, block, scores, f32::NEG_INFINITY);
        }
        let mut factors = [1.0f32; M];
        match range.common_maximum(simd).filter(|_| head.hidden.is_none()) {
            Some(largest) => {
                let shifts = raise_all(states, largest, visible, &mut factors);
                exponentials::<S, M>(simd, tile, columns, shifts, states);
            }
            None => {
                for (m, (factor, state)) in factors.iter_mut().zip(states).enumerate() {
                    *factor = state.update(simd, &mut tile[m * KEYS..][..columns]);
                }
            }
        }
        if let Some(dropped) = head.dropout {
            for m in 0..M {
                let dropout = &mut dropout[..columns];
                dropped.factors((begin + m) * head.seen + block, dropout);
                let weights = tile[m * KEYS..].iter_mut();
                weights.zip(dropout).for_each(|(weight, factor)| *weight *= *factor);
            }
        }
        let weights = Left { values: tile, row: KEYS, column: 1 };
        let values = Right { values: &values[block * row..], row };
        add_product::<S, M>(simd, weights, values, most, weighted, row / S::F32_LANES, Some(factors));
    }
}

/// Computes the scores of `M` queries and `N` vectors of keys.
#[inline(always)]
fn scores<S: Simd, const M: usize, const N: usize>(
    simd: S,
    queries: Left<'_>,
    keys: Right<'_>,
    width: usize,
    tile: &mut [f32],
    range: &mut ScoreRange<S>,
) {
    let scores = product::<S, M, N>(simd, queries, keys, width, [[simd.splat_f32s(0.0); N]; M]);
    for (m, scores) in scores.iter().enumerate() {
        for score in scores {
            range.largest = simd.max_f32s(range.largest, *score);
            range.smallest = simd.min_f32s(range.smallest, *score);
        }
        store::<S, N>(&mut tile[m * KEYS..], scores);
    }
}

/// With a larger difference between scores (as exponents of 2), exponentials less the largest score may lose
/// precision.
const MAX_DIFFERENCE: f32 = 64.0;

/// The largest and the smallest score, hidden ones included.
struct ScoreRange<S: Simd> {
    largest: S::f32s,
    smallest: S::f32s,
}

impl<S: Simd> ScoreRange<S> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        Self { largest: simd.splat_f32s(f32::NEG_INFINITY), smallest: simd.splat_f32s(f32::INFINITY) }
    }

    /// The largest score, if no score is so far below it that its exponential would lose precision. Then it can be
    /// subtracted from the scores of all queries, without finding the maximum of each.
    #[inline(always)]
    fn common_maximum(&self, simd: S) -> Option<f32> {
        let (largest, smallest) = (simd.reduce_max_f32s(self.largest), simd.reduce_min_f32s(self.smallest));
        (largest - smallest < MAX_DIFFERENCE).then_some(largest)
    }
}

/// Raises the maximum of all queries that see a key to `largest`. Returns what to subtract from each query's scores,
/// and sets `factors` to what its earlier exponentials must be multiplied by.
#[inline(always)]
fn raise_all<const M: usize>(
    states: &mut [State],
    largest: f32,
    visible: impl Fn(usize) -> usize,
    factors: &mut [f32; M],
) -> [f32; M] {
    let mut shifts = [largest; M];
    for (m, state) in states[..M].iter_mut().enumerate() {
        if visible(m) > 0 {
            factors[m] = state.raise(largest);
            shifts[m] = state.largest;
        }
    }
    shifts
}

/// Replaces scores by the exponentials of scores minus `shifts`, and adds their sums to the states.
#[inline(always)]
fn exponentials<S: Simd, const M: usize>(
    simd: S,
    tile: &mut [f32],
    columns: usize,
    shifts: [f32; M],
    states: &mut [State],
) {
    let mut sums = [simd.splat_f32s(0.0); M];
    let mut column = 0;
    while column < columns {
        for m in 0..M {
            let at = &mut S::as_mut_simd_f32s(&mut tile[m * KEYS + column..][..S::F32_LANES]).0[0];
            *at = exp2(simd, simd.sub_f32s(*at, simd.splat_f32s(shifts[m])));
            sums[m] = simd.add_f32s(sums[m], *at);
        }
        column += S::F32_LANES;
    }
    for m in 0..M {
        states[m].sum += simd.reduce_sum_f32s(sums[m]);
    }
}
