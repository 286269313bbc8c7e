//! A matrix as the product of two thin ones (Vogels et al. 2019, "PowerSGD", algorithm 1).
//!
//! With the factor `Q` of the step before, `P = M Q` is one step of a power iteration. After `P` has been made orthogonal,
//! `Q = M^T P`, and `P Q^T` is what comes near to `M`. Both steps are linear in `M`, so ranks sum thin matrices, not `M`.

use crate::matmul::{Matrix, product};

/// `P = M Q` for `matrix` `[rows, columns]` and `q` `[columns, rank]`, into `p` `[rows, rank]`.
///
/// # Panics
/// If lengths do not fit.
pub fn project(matrix: &[f32], columns: usize, q: &[f32], p: &mut [f32]) {
    let (rows, rank) = (matrix.len() / columns, q.len() / columns);
    product(Matrix::new(matrix, rows, columns), Matrix::new(q, columns, rank), p, false);
}

/// `Q = M^T P` for `matrix` `[rows, columns]` and `p` `[rows, rank]`, into `q` `[columns, rank]`.
///
/// # Panics
/// If lengths do not fit.
pub fn project_back(matrix: &[f32], columns: usize, p: &[f32], q: &mut [f32]) {
    let rows = matrix.len() / columns;
    product(Matrix::new(matrix, rows, columns).transposed(), Matrix::new(p, rows, p.len() / rows), q, false);
}

/// `P Q^T` for `p` `[rows, rank]` and `q` `[columns, rank]`, into `out` `[rows, columns]`.
///
/// # Panics
/// If lengths do not fit.
pub fn expand(p: &[f32], q: &[f32], rank: usize, out: &mut [f32]) {
    let (rows, columns) = (p.len() / rank, q.len() / rank);
    product(Matrix::new(p, rows, rank), Matrix::new(q, columns, rank).transposed(), out, false);
}

/// Makes the columns of `matrix` `[rows, rank]` orthogonal and of length 1, one after the other (modified Gram-Schmidt). A
/// column that depends on those before it becomes 0.
pub fn orthogonalize(matrix: &mut [f32], rank: usize) {
    let rows = matrix.len() / rank;
    let column =
        |matrix: &[f32], index: usize| (0..rows).map(|row| f64::from(matrix[row * rank + index])).collect();
    let mut done: Vec<Vec<f64>> = vec![];
    for index in 0..rank {
        let mut own: Vec<f64> = column(matrix, index);
        let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let before = length(&own);
        // Twice is enough for full precision (Giraud et al. 2005).
        for _ in 0..2 {
            for other in &done {
                let dot: f64 = own.iter().zip(other).map(|(a, b)| a * b).sum();
                own.iter_mut().zip(other).for_each(|(own, other)| *own -= dot * other);
            }
        }
        let after = length(&own);
        // What is left of a column that depends on the others is noise.
        let factor = if after <= 1e-6 * before { 0.0 } else { 1.0 / after };
        own.iter_mut().for_each(|x| *x *= factor);
        for (row, x) in own.iter().enumerate() {
            matrix[row * rank + index] = *x as f32;
        }
        done.push(own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn columns_become_orthogonal(rows in 1usize..40, rank in 1usize..6, seed: u64) {
            let mut matrix = values(seed, rows * rank, 1.0);
            orthogonalize(&mut matrix, rank);
            for a in 0..rank {
                for b in 0..rank {
                    let dot: f64 = (0..rows)
                        .map(|row| f64::from(matrix[row * rank + a]) * f64::from(matrix[row * rank + b]))
                        .sum();
                    let expected = f64::from(u8::from(a == b && a < rows));
                    prop_assert!((dot - expected).abs() < 1e-4, "{a} {b}: {dot}");
                }
            }
        }

        /// A matrix of rank 2 comes back whole from factors of rank 2 or more, after one step from any start.
        #[test]
        fn a_matrix_of_low_rank_comes_back(rows in 2usize..30, columns in 2usize..30, rank in 2usize..5, seed: u64) {
            let rank = rank.min(rows).min(columns);
            let (a, b) = (values(seed, rows * 2, 1.0), values(seed ^ 1, columns * 2, 1.0));
            let mut matrix = vec![0.0; rows * columns];
            expand(&a, &b, 2, &mut matrix);
            let mut q = values(seed ^ 2, columns * rank, 1.0);
            let (mut p, mut out) = (vec![0.0; rows * rank], vec![0.0; rows * columns]);
            project(&matrix, columns, &q, &mut p);
            orthogonalize(&mut p, rank);
            project_back(&matrix, columns, &p, &mut q);
            expand(&p, &q, rank, &mut out);
            let most = matrix.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (x, y) in matrix.iter().zip(&out) {
                prop_assert!((x - y).abs() < 2e-3 * most.max(1.0), "{x} {y}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut matrix = vec![0.0; 12];
        orthogonalize(&mut matrix, 3);
        assert_eq!(matrix, [0.0; 12]);
    }
}
