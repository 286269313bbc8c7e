//! The forward pass and the gradient of the images: for every position of the target, a sum over taps and source
//! channels.

use super::{Epilogue, TapAt, scratch};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Steps (taps x source channels) of a panel of weights: for the vectors of a register tile it takes half of a 1 MiB
/// cache.
const STEPS: usize = 1280;
/// Side of the squares in which weights are transposed: a cache line of elements.
const SQUARE: usize = 16;

/// The weights and their layout.
pub(super) struct Weights<'a> {
    /// `[kernel, kernel, source, target]`, or transposed `[kernel, kernel, target, source]`.
    pub(super) values: &'a [f32],
    pub(super) transposed: bool,
}

/// Computes every position of the target as a sum over the taps that apply to it.
pub(super) struct Correlation<'a> {
    pub(super) images: usize,
    /// Rows, columns and channels of the source, which is read.
    pub(super) source: [usize; 3],
    /// Rows, columns and channels of the target, which is written.
    pub(super) target: [usize; 3],
    /// The taps along the rows, for each row of the target.
    pub(super) rows: &'a [Vec<TapAt>],
    /// The taps along the columns, for each column of the target.
    pub(super) columns: &'a [Vec<TapAt>],
    pub(super) kernel: usize,
    pub(super) weights: Weights<'a>,
    pub(super) epilogue: Epilogue<'a>,
}

impl Correlation<'_> {
    /// Computes `out` from `x`. Images are divided among the threads. Every sum is within one image, so results do
    /// not depend on the number of threads.
    pub(super) fn run(&self, x: &[f32], out: &mut [f32]) {
        let [source, target] = [self.source, self.target].map(|shape| shape.iter().product::<usize>());
        if target == 0 || self.images == 0 {
            return;
        }
        let each = self.images.div_ceil(rayon::current_num_threads());
        let part = |(x, out): (&[f32], &mut [f32])| super::dispatch(Part { all: self, x, out });
        if each == self.images || source == 0 {
            part((x, out));
        } else {
            x.par_chunks(each * source).zip(out.par_chunks_mut(each * target)).for_each(part);
        }
    }

    /// Copies the weights of `depth` source channels from `from` on and `width` target channels from `to` on into
    /// `panel` `[taps, depth, vectors]`, with zeros after the width.
    fn pack(&self, [from, depth]: [usize; 2], [to, width]: [usize; 2], panel: &mut [f32], lanes: usize) {
        let (sources, targets) = (self.source[2], self.target[2]);
        let all = self.weights.values;
        for (tap, panel) in panel.chunks_exact_mut(depth * lanes).enumerate() {
            if !self.weights.transposed {
                for (index, row) in panel.chunks_exact_mut(lanes).enumerate() {
                    let start = (tap * sources + from + index) * targets + to;
                    row[..width].copy_from_slice(&all[start..start + width]);
                    row[width..].fill(0.0);
                }
                continue;
            }
            if width < lanes {
                panel.fill(0.0);
            }
            // In squares, so that cache lines are read and written while they are in the cache.
            for begin in (0..depth).step_by(SQUARE) {
                let end = depth.min(begin + SQUARE);
                for column in 0..width {
                    let start = (tap * targets + to + column) * sources + from;
                    for (index, value) in all[start + begin..start + end].iter().enumerate() {
                        panel[(begin + index) * lanes + column] = *value;
                    }
                }
            }
        }
    }
}

/// The part of one thread: some of the images.
struct Part<'a> {
    all: &'a Correlation<'a>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Part<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { all, x, out } = self;
        let [source, target] = [all.source, all.target].map(|shape| shape.iter().product::<usize>());
        let images = out.len() / target;
        let most = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let taps = all.kernel * all.kernel;
        let depth = (STEPS / taps).max(1).min(all.source[2]);
        for to in (0..all.target[2]).step_by(most * S::F32_LANES) {
            let width = (all.target[2] - to).min(most * S::F32_LANES);
            let vectors = width.div_ceil(S::F32_LANES);
            let lanes = vectors * S::F32_LANES;
            for from in (0..all.source[2]).step_by(depth) {
                let depth = (all.source[2] - from).min(depth);
                scratch::with(taps * depth * lanes, |panel| {
                    all.pack([from, depth], [to, width], panel, lanes);
                    let mut image = 0;
                    while image < images {
                        let tile = rows_of_tile(vectors, images - image);
                        let sweep = Sweep {
                            all,
                            panel,
                            depth,
                            width,
                            x: &x[image * source + from..(image + tile) * source],
                            out: &mut out[image * target + to..(image + tile) * target],
                            first: from == 0,
                            bias: all.epilogue.bias.map(|bias| &bias[to..to + width]),
                            last: from + depth == all.source[2],
                        };
                        by_tile!(simd, sweep, tile, vectors);
                        image += tile;
                    }
                });
            }
        }
    }
}

/// The number of rows of a register tile that is `vectors` wide, if `left` rows are left.
pub(super) fn rows_of_tile(vectors: usize, left: usize) -> usize {
    if vectors <= 2 && left >= 12 { 12 } else { left.min(6) }
}

/// Runs `$job` as a [`Tile`] of this size: a separate function, compiled for the vector unit.
macro_rules! by_tile {
    ($simd:expr, $job:expr, $rows:expr, $vectors:expr) => {{
        use crate::conv::correlate::Tile;
        let job = $job;
        match ($rows, $vectors) {
            (1, 1) => $simd.vectorize(Tile::<_, 1, 1>(job)),
            (2, 1) => $simd.vectorize(Tile::<_, 2, 1>(job)),
            (3, 1) => $simd.vectorize(Tile::<_, 3, 1>(job)),
            (4, 1) => $simd.vectorize(Tile::<_, 4, 1>(job)),
            (5, 1) => $simd.vectorize(Tile::<_, 5, 1>(job)),
            (6, 1) => $simd.vectorize(Tile::<_, 6, 1>(job)),
            (_, 1) => $simd.vectorize(Tile::<_, 12, 1>(job)),
            (1, 2) => $simd.vectorize(Tile::<_, 1, 2>(job)),
            (2, 2) => $simd.vectorize(Tile::<_, 2, 2>(job)),
            (3, 2) => $simd.vectorize(Tile::<_, 3, 2>(job)),
            (4, 2) => $simd.vectorize(Tile::<_, 4, 2>(job)),
            (5, 2) => $simd.vectorize(Tile::<_, 5, 2>(job)),
            (6, 2) => $simd.vectorize(Tile::<_, 6, 2>(job)),
            (_, 2) => $simd.vectorize(Tile::<_, 12, 2>(job)),
            (1, 3) => $simd.vectorize(Tile::<_, 1, 3>(job)),
            (2, 3) => $simd.vectorize(Tile::<_, 2, 3>(job)),
            (3, 3) => $simd.vectorize(Tile::<_, 3, 3>(job)),
            (4, 3) => $simd.vectorize(Tile::<_, 4, 3>(job)),
            (5, 3) => $simd.vectorize(Tile::<_, 5, 3>(job)),
            (_, 3) => $simd.vectorize(Tile::<_, 6, 3>(job)),
            (1, _) => $simd.vectorize(Tile::<_, 1, 4>(job)),
            (2, _) => $simd.vectorize(Tile::<_, 2, 4>(job)),
            (3, _) => $simd.vectorize(Tile::<_, 3, 4>(job)),
            (4, _) => $simd.vectorize(Tile::<_, 4, 4>(job)),
            (5, _) => $simd.vectorize(Tile::<_, 5, 4>(job)),
            _ => $simd.vectorize(Tile::<_, 6, 4>(job)),
        }
    }};
}
pub(super) use by_tile;

/// A job with the size of its register tile: `P` rows of `V` vectors.
pub(super) struct Tile<J, const P: usize, const V: usize>(pub(super) J);

/// Computes all positions of as many images as the tile has rows.
pub(super) struct Sweep<'a> {
    all: &'a Correlation<'a>,
    /// The packed weights, `[taps, depth, vectors]`.
    panel: &'a [f32],
    /// The number of source channels.
    depth: usize,
    /// The number of target channels.
    width: usize,
    /// The source, from the first source channel of the first image on.
    x: &'a [f32],
    /// The target, from the first target channel of the first image on.
    out: &'a mut [f32],
    /// Whether these are the first source channels; if not, the sums are added to `out`.
    first: bool,
    /// Whether these are the last source channels; then the epilogue is applied.
    last: bool,
    bias: Option<&'a [f32]>,
}

impl<const P: usize, const V: usize> WithSimd for Tile<Sweep<'_>, P, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sweep { all, panel, depth, width, x, out, first, last, bias } = self.0;
        let [_, source_columns, sources] = all.source;
        let [target_rows, target_columns, targets] = all.target;
        let (lanes, kernel) = (V * S::F32_LANES, all.kernel);
        let source_image = all.source.iter().product::<usize>();
        let target_image = all.target.iter().product::<usize>();
        assert!(
            panel.len() >= kernel * kernel * depth * lanes && width <= lanes && width + S::F32_LANES > lanes
        );
        assert!(all.rows.len() == target_rows && all.columns.len() == target_columns);
        for (row, row_taps) in all.rows.iter().enumerate() {
            for (column, column_taps) in all.columns.iter().enumerate() {
                let mut sums = [[simd.splat_f32s(0.0); V]; P];
                for row_tap in row_taps {
                    for column_tap in column_taps {
                        let start = (row_tap.at * source_columns + column_tap.at) * sources;
                        assert!(start + (P - 1) * source_image + depth <= x.len());
                        // SAFETY: taps are below the size of the kernel, for which the length of the panel was checked
                        // above, and the last channel of the last row is within `x` by the assertion.
                        unsafe {
                            let weights =
                                panel.as_ptr().add((row_tap.tap * kernel + column_tap.tap) * depth * lanes);
                            multiply(
                                simd,
                                &mut sums,
                                x.as_ptr().add(start),
                                [source_image, 1],
                                weights,
                                depth,
                            );
                        }
                    }
                }
                for (image, sums) in sums.into_iter().enumerate() {
                    let start = image * target_image + (row * target_columns + column) * targets;
                    let out = &mut out[start..start + width];
                    for (vector, sum) in sums.into_iter().enumerate() {
                        let begin = vector * S::F32_LANES;
                        let end = width.min(begin + S::F32_LANES);
                        let out = &mut out[begin..end];
                        let mut sum = sum;
                        if !first {
                            sum = simd.add_f32s(sum, load(simd, out));
                        }
                        if last {
                            if let Some(bias) = bias {
                                sum = simd.add_f32s(sum, load(simd, &bias[begin..end]));
                            }
                            if all.epilogue.relu {
                                sum = simd.max_f32s(sum, simd.splat_f32s(0.0));
                            }
                        }
                        store(simd, out, sum);
                    }
                }
            }
        }
    }
}

/// Loads a vector from `from`, which has the vector's length or fewer elements.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, from: &[f32]) -> S::f32s {
    match S::as_simd_f32s(from).0 {
        [whole, ..] => *whole,
        [] => simd.partial_load_f32s(from),
    }
}

/// Stores the first elements of `vector` to `to`, which has the vector's length or fewer elements.
#[inline(always)]
pub(super) fn store<S: Simd>(simd: S, to: &mut [f32], vector: S::f32s) {
    match S::as_mut_simd_f32s(to).0 {
        [whole, ..] => *whole = vector,
        [] => simd.partial_store_f32s(to, vector),
    }
}

/// Adds to row `p` of `sums`, for every step `s`, element `p * row + s * step` of `numbers` times the vectors of step
/// `s`.
///
/// # Safety
/// `numbers` points to more than `(P - 1) * row + (steps - 1) * step` elements, and `vectors` to `steps * V` vectors.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd, const P: usize, const V: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; P],
    numbers: *const f32,
    [row, step]: [usize; 2],
    vectors: *const f32,
    steps: usize,
) {
    let mut local = *sums;
    let (mut numbers, mut vectors) = (numbers, vectors);
    for _ in 0..steps {
        let mut weights = [simd.splat_f32s(0.0); V];
        for (v, weight) in weights.iter_mut().enumerate() {
            // SAFETY: this is one of the vectors of the step.
            *weight = unsafe { vectors.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned() };
        }
        for (p, sums) in local.iter_mut().enumerate() {
            // SAFETY: this is the element of the step and the row.
            let number = simd.splat_f32s(unsafe { *numbers.add(p * row) });
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = simd.mul_add_e_f32s(number, weight, *sum);
            }
        }
        numbers = numbers.wrapping_add(step);
        vectors = vectors.wrapping_add(V * S::F32_LANES);
    }
    *sums = local;
}
