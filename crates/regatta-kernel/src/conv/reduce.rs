//! The gradient of the weights: for every tap, sums over the places that it meets, of images times gradients.

use super::correlate::{Tile, by_tile, load, multiply, rows_of_tile, store};
use super::{Shape, scratch};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Places whose gradients are packed at once: with vectors for a register tile they take a quarter of a 1 MiB cache.
const PLACES: usize = 1024;

/// Taps and inputs are shared out among the threads: each sum is one thread's, so results do not depend on how.
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

/// Inputs that go to one thread together: a whole number of tiles, whatever their height.
const STRIP: usize = 12;

/// Where the sums go.
struct Target(*mut f32);
// SAFETY: every part writes the rows of its own items only.
unsafe impl Sync for Target {}

/// Some of the strips of inputs and taps.
struct Part<'a> {
    shape: &'a Shape,
    x: &'a [f32],
    gradient: &'a [f32],
    add: bool,
    out: &'a Target,
    /// From the first to behind the last: strip by strip, of each tap by tap.
    items: [usize; 2],
}

impl WithSimd for Part<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, x, gradient, add, out, items } = self;
        let places = shape.out_height() * shape.out_width();
        let (source, target) = (shape.height * shape.width * shape.inputs, places * shape.outputs);
        let most = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let group = (PLACES / places.max(1)).clamp(1, shape.images.max(1));
        let taps = shape.kernel * shape.kernel;
        for first in (0..shape.images.max(1)).step_by(group) {
            let images = group.min(shape.images - first);
            for to in (0..shape.outputs).step_by(most * S::F32_LANES) {
                let width = (shape.outputs - to).min(most * S::F32_LANES);
                let vectors = width.div_ceil(S::F32_LANES);
                let lanes = vectors * S::F32_LANES;
                scratch::with(images * places * lanes, |panel| {
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
                                    // SAFETY: within the weights' gradient: a row for each of the tile's inputs.
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

/// The sums of one tap, of as many inputs as the tile has rows.
struct Sums<'a> {
    shape: &'a Shape,
    /// From the first input on.
    x: &'a [f32],
    /// Gradients, `[images, places, vectors]`.
    panel: &'a [f32],
    images: usize,
    tap: usize,
    width: usize,
    /// Whether these are the first images: else sums go on.
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
            .map(|(tap, len, places)| met(tap, len, places, stride, padding));
        let mut sums = [[simd.splat_f32s(0.0); V]; P];
        let run = across[1] - across[0];
        for image in 0..if run > 0 { images } else { 0 } {
            for row in rows[0]..rows[1] {
                let y = row * stride + tap / kernel - padding;
                let x_ = across[0] * stride + tap % kernel - padding;
                let start = ((image * height + y) * columns + x_) * inputs;
                let place = (image * out_height + row) * out_width + across[0];
                assert!(
                    start + (run - 1) * stride * inputs + P <= x.len()
                        && (place + run) * lanes <= panel.len()
                );
                // SAFETY: the first and the last of both are within their slices by the assertion.
                unsafe {
                    let numbers = x.as_ptr().add(start);
                    let vectors = panel.as_ptr().add(place * lanes);
                    multiply(simd, &mut sums, numbers, [1, stride * inputs], vectors, run);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            // SAFETY: a row of the weights' gradient that no other thread has; the caller gave the first of them.
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

/// From the first to behind the last place of the output at which `tap` meets an image of `len` along one axis.
fn met(tap: usize, len: usize, places: usize, stride: usize, padding: usize) -> [usize; 2] {
    let begin = padding.saturating_sub(tap).div_ceil(stride);
    let end = (len + padding).saturating_sub(tap).div_ceil(stride).min(places);
    [begin.min(end), end]
}
