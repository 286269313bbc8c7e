//! Forward of one head.

use super::Pair;
use super::pack::{Scratch, copy, transpose};
use super::product::{Left, Right, add_product, product, store};
use super::softmax::{State, exp2, hide, hide_masked};
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
                        let rows = Group { pair: &self.pair, first, group, block };
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
    /// The first query of the block.
    first: usize,
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
        let queries = Left { values: queries, row: width, column: 1 };
        let mut range = Range::new(simd);
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
            hide_masked(pair, begin + m, block, scores, f32::NEG_INFINITY);
        }
        let mut factors = [1.0f32; M];
        match range.narrow(simd).filter(|_| pair.hidden.is_none()) {
            Some(largest) => {
                let shifts = shared(states, largest, visible, &mut factors);
                exponentials::<S, M>(simd, tile, columns, shifts, states);
            }
            None => {
                for (m, (factor, state)) in factors.iter_mut().zip(states).enumerate() {
                    *factor = state.take(simd, &mut tile[m * KEYS..][..columns]);
                }
            }
        }
        if let Some(dropped) = pair.drops {
            for m in 0..M {
                let drops = &mut drops[..columns];
                dropped.factors((begin + m) * pair.seen + block, drops);
                let weights = tile[m * KEYS..].iter_mut();
                weights.zip(drops).for_each(|(weight, factor)| *weight *= *factor);
            }
        }
        let weights = Left { values: tile, row: KEYS, column: 1 };
        let values = Right { values: &values[block * row..], row };
        add_product::<S, M>(simd, weights, values, most, gathered, row / S::F32_LANES, Some(factors));
    }
}

/// Scores of `M` queries and `N` vectors of keys.
#[inline(always)]
fn scores<S: Simd, const M: usize, const N: usize>(
    simd: S,
    queries: Left<'_>,
    keys: Right<'_>,
    width: usize,
    tile: &mut [f32],
    range: &mut Range<S>,
) {
    let scores = product::<S, M, N>(simd, queries, keys, width, [[simd.splat_f32s(0.0); N]; M]);
    for (m, scores) in scores.iter().enumerate() {
        for score in scores {
            range.largest = simd.max_f32s(range.largest, *score);
            range.least = simd.min_f32s(range.least, *score);
        }
        store::<S, N>(&mut tile[m * KEYS..], scores);
    }
}

/// The largest and the least of scores, also of hidden ones.
struct Range<S: Simd> {
    largest: S::f32s,
    least: S::f32s,
}

impl<S: Simd> Range<S> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        Self { largest: simd.splat_f32s(f32::NEG_INFINITY), least: simd.splat_f32s(f32::INFINITY) }
    }

    /// The largest, if no score is so far below it that its exponential would lose digits. Then it does for all queries
    /// that see one of the keys, and nobody has to look for each one's own.
    #[inline(always)]
    fn narrow(&self, simd: S) -> Option<f32> {
        let (largest, least) = (simd.reduce_max_f32s(self.largest), simd.reduce_min_f32s(self.least));
        (largest - least < 64.0).then_some(largest)
    }
}

/// Makes `largest` what is taken from the scores of all queries that see a key, and returns it for each. `factors` get by
/// what their earlier exponentials must be multiplied.
#[inline(always)]
fn shared<const M: usize>(
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

/// Scores to their exponentials less `shifts`, whose sums go to the states.
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
