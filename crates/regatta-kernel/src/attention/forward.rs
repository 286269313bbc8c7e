//! Forward of one head.

use super::Pair;
use super::pack::{Scratch, copy, transpose};
use super::product::{Left, Right, add_product, product, store};
use super::softmax::{State, hide, hide_masked};
use super::view::RowsMut;
use pulp::{Simd, WithSimd};

/// Queries that go through the keys together.
const QUERIES: usize = 64;
/// Keys that are multiplied with before their values are gathered.
const KEYS: usize = 128;

/// Forward of one head.
pub(super) struct Forward<'a> {
    pub(super) pair: Pair<'a>,
    /// Gets what queries gather.
    pub(super) output: RowsMut,
    /// Gets the logarithms of the sums of exponentials.
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
    /// With `M` rows of queries in registers.
    #[inline(always)]
    fn run<S: Simd, const M: usize>(mut self, simd: S) {
        let Pair { time, seen, width, .. } = self.pair;
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
        let [keys, values, queries, gathered, tile, drops] = scratch.parts(lens);
        {
            transpose(self.pair.keys, 0, seen, width, keys, panel);
            copy(self.pair.values, 0, seen, width, 1.0, values, row);
            let mut first = 0;
            while first < time {
                let count = QUERIES.min(time - first);
                copy(self.pair.queries, first, count, width, self.pair.scale(), queries, width);
                gathered.fill(0.0);
                let mut states = [State::NEW; QUERIES];
                let mut block = 0;
                while block < self.pair.visible(first + count - 1) {
                    let mut group = 0;
                    while group < count {
                        let rows = Group { pair: &self.pair, first, group, count, block };
                        let queries = &queries[group * width..];
                        let gathered = &mut gathered[group * row..];
                        let states = &mut states[group..group + M];
                        rows.run::<S, M>(simd, [queries, keys, values], gathered, states, tile, drops);
                        group += M;
                    }
                    block += KEYS;
                }
                for (i, state) in states[..count].iter().enumerate() {
                    let factor = if state.sum == 0.0 { 0.0 } else { 1.0 / state.sum };
                    // SAFETY: the query exists.
                    unsafe {
                        self.output.write(first + i, &gathered[i * row..], factor);
                        self.sums.write(first + i, &[state.logarithm()], 1.0);
                    }
                }
                first += count;
            }
        }
    }
}

/// Queries whose scores are in registers together, and the keys that they see.
struct Group<'a> {
    pair: &'a Pair<'a>,
    /// The first query of the block, and how many there are.
    first: usize,
    count: usize,
    /// The first of these, in the block.
    group: usize,
    /// The first key.
    block: usize,
}

impl Group<'_> {
    #[inline(always)]
    fn run<S: Simd, const M: usize>(
        &self,
        simd: S,
        [queries, keys, values]: [&[f32]; 3],
        gathered: &mut [f32],
        states: &mut [State],
        tile: &mut [f32],
        drops: &mut [f32],
    ) {
        let &Self { pair, block, .. } = self;
        let width = pair.width;
        let panel = 2 * S::F32_LANES;
        let row = width.next_multiple_of(S::F32_LANES);
        let begin = self.first + self.group;
        let visible = |m: usize| pair.visible(begin + m).saturating_sub(block).min(KEYS);
        let most = visible(M - 1);
        if most == 0 {
            return;
        }
        let columns = most.next_multiple_of(S::F32_LANES);
        let zero = simd.splat_f32s(0.0);
        let queries = Left { values: queries, row: width, column: 1 };
        let mut column = 0;
        while column < columns {
            let right = Right { values: &keys[(block + column) * width..], row: panel };
            if column + panel <= columns {
                let scores = product::<S, M, 2>(simd, queries, right, width, [[zero; 2]; M]);
                for (m, scores) in scores.iter().enumerate() {
                    store::<S, 2>(&mut tile[m * KEYS + column..], scores);
                }
            } else {
                let scores = product::<S, M, 1>(simd, queries, right, width, [[zero; 1]; M]);
                for (m, scores) in scores.iter().enumerate() {
                    store::<S, 1>(&mut tile[m * KEYS + column..], scores);
                }
            }
            column += panel;
        }
        let mut factors = [1.0f32; M];
        for (m, (factor, state)) in factors.iter_mut().zip(states).enumerate() {
            if self.group + m >= self.count {
                break;
            }
            let scores = &mut tile[m * KEYS..][..columns];
            hide(simd, scores, visible(m), f32::NEG_INFINITY);
            hide_masked(pair, begin + m, block, scores, f32::NEG_INFINITY);
            *factor = state.take(simd, scores);
            if let Some(dropped) = pair.drops {
                let drops = &mut drops[..columns];
                dropped.factors((begin + m) * pair.seen + block, drops);
                scores.iter_mut().zip(drops).for_each(|(weight, factor)| *weight *= *factor);
            }
        }
        let weights = Left { values: tile, row: KEYS, column: 1 };
        let values = Right { values: &values[block * row..], row };
        add_product::<S, M>(simd, weights, values, most, gathered, row / S::F32_LANES, Some(factors));
    }
}
