//! Adding a bias to every row, and the gradient of the bias.

use crate::parallel::{for_chunks, rows_of_chunk};
use crate::simd::vectorized;

vectorized! {
    pub(crate) fn add_rows(rows: &mut [f32], bias: &[f32]) {
        for row in rows.chunks_exact_mut(bias.len().max(1)) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
}

vectorized! {
    fn sum_rows(rows: &[f32], sums: &mut [f32]) {
        for row in rows.chunks_exact(sums.len().max(1)) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    }
}

vectorized! {
    fn add_to(sums: &mut [f32], values: &[f32]) {
        sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
    }
}

/// Adds `bias` `[width]` to every row of `rows` `[rows, width]`, in place.
pub fn add(rows: &mut [f32], bias: &[f32]) {
    let chunk = rows_of_chunk(bias.len()) * bias.len();
    for_chunks(rows, chunk, |_, part| add_rows(part, bias));
}

/// The gradient of the bias: the sum of the rows of `rows` `[rows, width]`, as `[width]`.
pub fn column_sums(rows: &[f32], width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    let chunk = rows_of_chunk(width) * width;
    // Summing chunk by chunk keeps the precision of long sums. The chunks do not depend on the number of threads.
    let mut sums = vec![0.0; width];
    for part in rows.chunks(chunk.max(1)) {
        sums.fill(0.0);
        sum_rows(part, &mut sums);
        add_to(&mut total, &sums);
    }
    total
}

/// `sums += values`, element by element.
///
/// # Panics
/// If the slices have different lengths.
pub fn accumulate(sums: &mut [f32], values: &[f32]) {
    assert_eq!(sums.len(), values.len(), "sums and values must have the same length");
    const CHUNK: usize = 1 << 14;
    for_chunks(sums, CHUNK, |index, sums| add_to(sums, &values[index * CHUNK..][..sums.len()]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, values};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agree_with_plain_loops(rows in 0usize..300, width in 1usize..200, seed: u64) {
            let (x, bias) = (values(seed, rows * width, 1.0), values(seed ^ 1, width, 1.0));
            let mut sums = vec![0.0f64; width];
            x.iter().enumerate().for_each(|(i, x)| sums[i % width] += f64::from(*x));
            close(&column_sums(&x, width), sums, 1e-5);
            let mut y = x.clone();
            add(&mut y, &bias);
            for i in 0..x.len() {
                prop_assert_eq!(y[i], x[i] + bias[i % width]);
            }
            accumulate(&mut y, &x);
            for i in 0..x.len() {
                prop_assert_eq!(y[i], (x[i] + bias[i % width]) + x[i]);
            }
        }
    }
}
