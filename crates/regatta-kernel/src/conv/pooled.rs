//! Convolution, bias, ReLU and 2x2 max pooling in one pass over chunks of images, so the result of the convolution is
//! never stored as a whole.

use super::{Epilogue, Shape, by_input, by_weight, forward, scratch};
use crate::pool::{NO_GRADIENT, back_2x2, relu_max_2x2};

/// Images per chunk: two register tiles. This must not depend on the number of threads, because the gradient of the
/// weights is summed over the chunks.
const CHUNK: usize = 24;

/// For every chunk of images: its shape, and its ranges in the images and in the pooled results.
fn chunks(shape: &Shape) -> impl Iterator<Item = (Shape, [std::ops::Range<usize>; 2])> {
    let one = Shape { images: 1, ..*shape };
    let lens = [one.input_len(), pooled_len(&one)];
    let whole = *shape;
    (0..shape.images).step_by(CHUNK).map(move |first| {
        let images = CHUNK.min(whole.images - first);
        (Shape { images, ..whole }, lens.map(|len| first * len..(first + images) * len))
    })
}

/// Elements of the pooled result.
fn pooled_len(shape: &Shape) -> usize {
    shape.images * (shape.out_height() / 2) * (shape.out_width() / 2) * shape.outputs
}

/// Convolution of `x` with `weight`, plus `bias` `[outputs]`, then ReLU and 2x2 max pooling. `out` is `[images,
/// out_height / 2, out_width / 2, outputs]`, and `codes` of the same shape gets what [`pooled_backward`] needs.
///
/// # Panics
/// If a slice does not have the length of the shape.
pub fn pooled(shape: &Shape, x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32], codes: &mut [u8]) {
    assert_eq!(
        (out.len(), codes.len()),
        (pooled_len(shape), pooled_len(shape)),
        "the number of results for {shape:?}"
    );
    assert_eq!(x.len(), shape.input_len(), "the number of elements for {shape:?}");
    let sides = [shape.out_height(), shape.out_width(), shape.outputs];
    for (shape, [input, output]) in chunks(shape) {
        scratch::with(shape.output_len(), |sums| {
            forward(&shape, &x[input], weight, Epilogue { bias: Some(bias), relu: false }, sums);
            relu_max_2x2(sums, sides, &mut out[output.clone()], &mut codes[output]);
        });
    }
}

/// Backward of [`pooled`]: from the `gradient` of its result and its `codes`, writes the gradients of the images (if
/// `of_input` is given), of the weights and of the bias.
///
/// # Panics
/// If a slice does not have the length of the shape.
#[allow(clippy::too_many_arguments)]
pub fn pooled_backward(
    shape: &Shape,
    x: &[f32],
    weight: &[f32],
    gradient: &[f32],
    codes: &[u8],
    mut of_input: Option<&mut [f32]>,
    of_weight: &mut [f32],
    of_bias: &mut [f32],
) {
    assert_eq!(
        (gradient.len(), codes.len()),
        (pooled_len(shape), pooled_len(shape)),
        "the number of results for {shape:?}"
    );
    assert_eq!(
        (x.len(), of_bias.len()),
        (shape.input_len(), shape.outputs),
        "the number of elements for {shape:?}"
    );
    let sides = [shape.out_height(), shape.out_width(), shape.outputs];
    let mut bias = vec![0.0f64; shape.outputs];
    for (index, (shape, [input, output])) in chunks(shape).enumerate() {
        scratch::with(shape.output_len(), |sums| {
            back_2x2(&gradient[output.clone()], &codes[output.clone()], sides, sums);
            by_weight(&shape, &x[input.clone()], sums, index > 0, of_weight);
            if let Some(of_input) = &mut of_input {
                by_input(&shape, sums, weight, &mut of_input[input]);
            }
        });
        of_bias.fill(0.0);
        add_columns(&gradient[output.clone()], &codes[output], of_bias);
        bias.iter_mut().zip(&*of_bias).for_each(|(sum, part)| *sum += f64::from(*part));
    }
    if shape.images == 0 {
        of_weight.fill(0.0);
    }
    of_bias.iter_mut().zip(bias).for_each(|(out, sum)| *out = sum as f32);
}

crate::simd::vectorized! {
    /// Adds to `sums` the gradients of each channel, except those of squares in which no number has a gradient.
    fn add_columns(gradient: &[f32], codes: &[u8], sums: &mut [f32]) {
        let channels = sums.len();
        for (gradient, codes) in gradient.chunks_exact(channels).zip(codes.chunks_exact(channels)) {
            for ((sum, g), code) in sums.iter_mut().zip(gradient).zip(codes) {
                *sum += if u32::from(*code) < u32::from(NO_GRADIENT) { *g } else { 0.0 };
            }
        }
    }
}
