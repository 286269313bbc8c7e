//! The gradient of the weights: for every tap, the sum of images times gradients over the positions where it is
//! within the image.

use super::correlate::{Tile, by_tile, load, multiply, rows_of_tile, store};
use super::{Shape, scratch};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Positions whose gradients are packed at the same time: for the vectors of a register tile they take a quarter of a
/// 1 MiB cache.
const POSITIONS: usize = 1024;

/// Computes the gradient. Taps and inputs are divided among the threads, and one thread computes each sum, so results
/// do not depend on the number of threads.
pub(super) fn run(shape: &Shape, x: &[f32], gradient: &[f32], add: bool, out: &mut [f32]) {
    let items = shape.kernel * shape.kernel * shape.inputs.div_ceil(STRIP);
    let out = Target(out.as_mut_ptr());
    let parts = rayon::current_num_threads().min(items).max(1);
    let part = |index: usize| {
        let items = [index * items / parts, (index + 1) * items / parts];
        super::dispatch(Part { shape, x, gradient, add, out: &out, items });
    };
    match parts {
        1 => part(0),
        _ => (0..parts).into_par_iter().for_each(part),
    }
}

/// Inputs of a strip, which one thread processes: a multiple of the heights of tiles.
const STRIP: usize = 12;

/// The gradient of the weights, which the sums are written to.
struct Target(*mut f32);
// SAFETY: every part writes only the rows of its own items.
unsafe impl Sync for Target {}

/// The part of one thread: some pairs of a strip of inputs and a tap.
struct Part<'a> {
    shape: &'a Shape,
    x: &'a [f32],
    gradient: &'a [f32],
    add: bool,
    out: &'a Target,
    /// The first item and the end. Item `strip * taps + tap` is a tap of a strip.
    items: [usize; 2],
}

impl WithSimd for Part<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, x, gradient, add, out, items } = self;
        let positions = shape.out_height() * shape.out_width();
        let (source, target) = (shape.height * shape.width * shape.inputs, positions * shape.outputs);
        let most = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let group = (POSITIONS / positions.max(1)).clamp(1, shape.images.max(1));
        let taps = shape.kernel * shape.kernel;
        for first in (0..shape.images.max(1)).step_by(group) {
            let images = group.min(shape.images - first);
            for to in (0..shape.outputs).step_by(most * S::F32_LANES) {
                let width = (shape.outputs - to).min(most * S::F32_LANES);
                let vectors = width.div_ceil(S::F32_LANES);
                let lanes = vectors * S::F32_LANES;
                scratch::with(images * positions * lanes, |panel| {
                    let rows =
                        gradient[first * target..(first + images) * target].chunks_exact(shape.outputs);
                    for (to_row, row) in panel.chunks_exact_mut(lanes).zip(rows) {
                        to_row[..width].copy_from_slice(&row[to..to + width]);
                        to_row[width..].fill(0.0);
                    }
                    let x = &x[first * source..(first + images) * source];
                    let mut strip = items[0] / taps;
                    while strip * taps < items[1] {
                        let begin = items[0].saturating_sub(strip * taps);
                        let end = (items[1] - strip * taps).min(taps);
                        let stop = shape.inputs.min((strip + 1) * STRIP);
                        let mut from = strip * STRIP;
                        while from < stop {
                            let rows = rows_of_tile(vectors, stop - from);
                            for tap in begin..end {
                                let sums = Sums {
                                    shape,
                                    x: &x[from..],
                                    panel,
                                    images,
                                    tap,
                                    width,
                                    first: first == 0 && !add,
                                    // SAFETY: the address is within the gradient, which has a row for each input.
                                    out: unsafe {
                                        out.0.add((tap * shape.inputs + from) * shape.outputs + to)
                                    },
                                };
                                by_tile!(simd, sums, rows, vectors);
                            }
                            from += rows;
                        }
                        strip += 1;
                    }
                });
            }
        }
    }
}

/// Computes the sums of one tap for as many inputs as the tile has rows.
struct Sums<'a> {
    shape: &'a Shape,
    /// The images, from the first input channel of the tile on.
    x: &'a [f32],
    /// The packed gradients, `[images, positions, vectors]`.
    panel: &'a [f32],
    images: usize,
    tap: usize,
    width: usize,
    /// Whether these are the first images; if not, the sums are added to `out`.
    first: bool,
    out: *mut f32,
}

impl<const P: usize, const V: usize> WithSimd for Tile<Sums<'_>, P, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sums { shape, x, panel, images, tap, width, first, out } = self.0;
        let Shape { height, width: columns, inputs, kernel, stride, padding, .. } = *shape;
        let (out_height, out_width) = (shape.out_height(), shape.out_width());
        let lanes = V * S::F32_LANES;
        let [rows, across] = [(tap / kernel, height, out_height), (tap % kernel, columns, out_width)]
            .map(|(tap, len, positions)| valid_positions(tap, len, positions, stride, padding));
        let mut sums = [[simd.splat_f32s(0.0); V]; P];
        let run = across[1] - across[0];
        for image in 0..if run > 0 { images } else { 0 } {
            for row in rows[0]..rows[1] {
                let y = row * stride + tap / kernel - padding;
                let column = across[0] * stride + tap % kernel - padding;
                let start = ((image * height + y) * columns + column) * inputs;
                let position = (image * out_height + row) * out_width + across[0];
                assert!(
                    start + (run - 1) * stride * inputs + P <= x.len()
                        && (position + run) * lanes <= panel.len()
                );
                // SAFETY: the first and the last element of both are within their slices by the assertion.
                unsafe {
                    let numbers = x.as_ptr().add(start);
                    let vectors = panel.as_ptr().add(position * lanes);
                    multiply(simd, &mut sums, numbers, [1, stride * inputs], vectors, run);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            // SAFETY: this is a row of the gradient that no other thread accesses; `out` is the first row of the tile.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(row * shape.outputs), width) };
            for (vector, sum) in sums.into_iter().enumerate() {
                let begin = vector * S::F32_LANES;
                let end = width.min(begin + S::F32_LANES);
                let out = &mut out[begin..end];
                let sum = if first { sum } else { simd.add_f32s(sum, load(simd, out)) };
                store(simd, out, sum);
            }
        }
    }
}

/// The first position of the output along one axis at which `tap` is within an image of `len`, and the end of these
/// positions.
fn valid_positions(tap: usize, len: usize, positions: usize, stride: usize, padding: usize) -> [usize; 2] {
    let begin = padding.saturating_sub(tap).div_ceil(stride);
    let end = (len + padding).saturating_sub(tap).div_ceil(stride).min(positions);
    [begin.min(end), end]
}
