//! Pooling of channels-last images, forward and backward.

use crate::simd::vectorized;

/// The code of a square in which no number is above 0: ReLU gives 0, and no number of the square gets a gradient.
pub(crate) const NO_GRADIENT: u8 = 4;

vectorized! {
    /// ReLU and 2x2 max pooling: the largest number of each 2x2 square of `x` `[images, height, width, channels]`, or
    /// 0 if that is larger. `out` is `[images, height / 2, width / 2, channels]`, and `codes` has the same shape and
    /// gets which number of the square was the largest, for [`back_2x2`]. `shape` is `[height, width, channels]`. The
    /// last row or column of an odd side is ignored.
    pub fn relu_max_2x2(x: &[f32], shape: [usize; 3], out: &mut [f32], codes: &mut [u8]) {
        let [height, width, channels] = shape;
        let (down, across) = (height / 2, width / 2);
        let row = width * channels;
        let images = x.chunks_exact(height * row).flat_map(|image| image.chunks_exact(2 * row).take(down));
        // An image with less than two rows or columns has no square.
        let len = (across * channels).max(1);
        for ((rows, out), codes) in images.zip(out.chunks_exact_mut(len)).zip(codes.chunks_exact_mut(len)) {
            let (upper, lower) = rows.split_at(row);
            let squares = upper.chunks_exact(2 * channels).zip(lower.chunks_exact(2 * channels));
            let positions = out.chunks_exact_mut(channels).zip(codes.chunks_exact_mut(channels));
            for ((upper, lower), (out, codes)) in squares.zip(positions) {
                let (a, b) = upper.split_at(channels);
                let (c, d) = lower.split_at(channels);
                let numbers = a.iter().zip(b).zip(c.iter().zip(d));
                for (((a, b), (c, d)), (out, code)) in numbers.zip(out.iter_mut().zip(codes)) {
                    let (mut largest, mut which) = (0.0f32, u32::from(NO_GRADIENT));
                    for (index, value) in [*a, *b, *c, *d].into_iter().enumerate() {
                        which = if value > largest { index as u32 } else { which };
                        largest = if value > largest { value } else { largest };
                    }
                    *out = largest;
                    *code = which as u8;
                }
            }
        }
    }
}

vectorized! {
    /// Backward of [`relu_max_2x2`]: writes the gradient of its input to `out` `[images, height, width, channels]`,
    /// from the `gradient` of its result and its `codes`. `shape` is `[height, width, channels]`.
    pub fn back_2x2(gradient: &[f32], codes: &[u8], shape: [usize; 3], out: &mut [f32]) {
        let [height, width, channels] = shape;
        let (down, across) = (height / 2, width / 2);
        let row = width * channels;
        if height != 2 * down || width != 2 * across {
            out.fill(0.0);
        }
        let images = out.chunks_exact_mut(height * row).flat_map(|image| image.chunks_exact_mut(2 * row).take(down));
        // An image with less than two rows or columns has no square.
        let len = (across * channels).max(1);
        for ((rows, gradient), codes) in images.zip(gradient.chunks_exact(len)).zip(codes.chunks_exact(len)) {
            let (upper, lower) = rows.split_at_mut(row);
            for (rows, first) in [(upper, 0u32), (lower, 2)] {
                let positions = gradient.chunks_exact(channels).zip(codes.chunks_exact(channels));
                for (square, (gradient, codes)) in rows.chunks_exact_mut(2 * channels).zip(positions) {
                    let (a, b) = square.split_at_mut(channels);
                    for ((a, b), (g, code)) in a.iter_mut().zip(b).zip(gradient.iter().zip(codes)) {
                        let code = u32::from(*code);
                        *a = if code == first { *g } else { 0.0 };
                        *b = if code == first + 1 { *g } else { 0.0 };
                    }
                }
            }
        }
    }
}

vectorized! {
    /// Global average pooling: writes the mean over the positions of each image of `x` `[images, positions, channels]`
    /// to `out` `[images, channels]`.
    pub fn mean(x: &[f32], positions: usize, channels: usize, out: &mut [f32]) {
        let scale = 1.0 / positions as f32;
        for (image, out) in x.chunks_exact(positions * channels).zip(out.chunks_exact_mut(channels)) {
            out.fill(0.0);
            for row in image.chunks_exact(channels) {
                out.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            out.iter_mut().for_each(|sum| *sum *= scale);
        }
    }
}

vectorized! {
    /// Backward of [`mean`]: writes the gradient of its input to `out` `[images, positions, channels]`, from the
    /// `gradient` `[images, channels]` of its result.
    pub fn back_mean(gradient: &[f32], positions: usize, channels: usize, out: &mut [f32]) {
        let scale = 1.0 / positions as f32;
        for (gradient, image) in gradient.chunks_exact(channels).zip(out.chunks_exact_mut(positions * channels)) {
            for row in image.chunks_exact_mut(channels) {
                row.iter_mut().zip(gradient).for_each(|(out, g)| *out = g * scale);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_largest_of_a_square_gets_the_gradient(
            images in 1usize..4, height in 1usize..8, width in 1usize..8, channels in 1usize..20,
        ) {
            let shape = [height, width, channels];
            let x = Stream::new(1).normal(images * height * width * channels, 1.0);
            let (down, across) = (height / 2, width / 2);
            let gradient = Stream::new(2).normal(images * down * across * channels, 1.0);
            let (mut out, mut codes) = (vec![f32::NAN; gradient.len()], vec![9; gradient.len()]);
            relu_max_2x2(&x, shape, &mut out, &mut codes);
            let mut back = vec![f32::NAN; x.len()];
            back_2x2(&gradient, &codes, shape, &mut back);
            let mut expected = vec![0.0; x.len()];
            for (index, g) in gradient.iter().enumerate() {
                let [channel, rest] = [index % channels, index / channels];
                let (column, row, image) = (rest % across, rest / across % down, rest / across / down);
                let at = |k: usize| {
                    ((image * height + 2 * row + k / 2) * width + 2 * column + k % 2) * channels + channel
                };
                let best = (0..4).map(at).max_by(|a, b| x[*a].total_cmp(&x[*b])).unwrap();
                prop_assert_eq!(out[index], x[best].max(0.0));
                if x[best] > 0.0 {
                    expected[best] = *g;
                }
            }
            prop_assert_eq!(back, expected);
        }
    }

    #[test]
    fn mean_and_its_backward() {
        let x = [1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0];
        let mut out = [0.0; 4];
        mean(&x, 2, 2, &mut out);
        assert_eq!(out, [2.0, 20.0, 6.0, 60.0]);
        let mut back = [f32::NAN; 8];
        back_mean(&[2.0, 4.0, 6.0, 8.0], 2, 2, &mut back);
        assert_eq!(back, [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
    }
}
