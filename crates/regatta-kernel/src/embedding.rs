//! Embedding: rows of a table by their indices, and the gradient of the table.

use crate::simd::vectorized;

/// The rows of `table` `[rows, width]` at the indices `ids`, as `[ids, width]`. A `None` gives a row of zeros.
///
/// # Panics
/// If an index is not below the number of rows.
pub fn gather(table: &[f32], ids: &[Option<usize>], width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(ids.len() * width);
    for id in ids {
        match id {
            Some(row) => out.extend_from_slice(&table[row * width..][..width]),
            None => out.resize(out.len() + width, 0.0),
        }
    }
    out
}

vectorized! {
    /// Backward of [`gather`]: adds each row of `gradients` `[ids, width]` to the row of `sums` `[rows, width]` with
    /// its index, in the order of `ids`. A `None` adds nothing.
    ///
    /// # Panics
    /// If an index is not below the number of rows.
    pub fn scatter_add(gradients: &[f32], ids: &[Option<usize>], width: usize, sums: &mut [f32]) {
        for (id, gradient) in ids.iter().zip(gradients.chunks_exact(width.max(1))) {
            if let Some(row) = id {
                let sums = &mut sums[row * width..][..width];
                sums.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, to_f64, values};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agree_with_plain_loops(
            rows in 1usize..20, width in 1usize..40,
            picks in prop::collection::vec(prop::option::of(0usize..1000), 0..50), seed: u64,
        ) {
            let ids: Vec<Option<usize>> = picks.iter().map(|id| id.map(|id| id % rows)).collect();
            let table = values(seed, rows * width, 1.0);
            let out = gather(&table, &ids, width);
            for (i, x) in out.iter().enumerate() {
                prop_assert_eq!(*x, ids[i / width].map_or(0.0, |row| table[row * width + i % width]));
            }
            let g = values(seed ^ 1, out.len(), 1.0);
            let before = values(seed ^ 2, table.len(), 1.0);
            let (mut sums, mut expected) = (before.clone(), to_f64(&before));
            scatter_add(&g, &ids, width, &mut sums);
            for (i, g) in g.iter().enumerate() {
                if let Some(row) = ids[i / width] {
                    expected[row * width + i % width] += f64::from(*g);
                }
            }
            close(&sums, expected, 1e-5);
        }
    }
}
