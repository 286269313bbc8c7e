//! Matrix products with the crate `gemm`, of row-major and transposed matrices.
//!
//! ```
//! use regatta_kernel::matmul::{Matrix, new_product};
//! let a = Matrix::new(&[1.0, 2.0, 3.0, 4.0], 2, 2);
//! let b = Matrix::new(&[5.0, 6.0], 1, 2).transposed();
//! assert_eq!(new_product(a, b), [17.0, 39.0]);
//! ```

use crate::uninit::filled;

/// Fewest multiplications for which a product uses several threads.
const MIN_PARALLEL: usize = 192 * 192 * 192;

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    /// Distances in elements from one row to the next, and from one column to the next.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// A row-major matrix `[rows, columns]`.
    ///
    /// # Panics
    /// If `data` does not have `rows * columns` elements.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "the length of the data of a {rows} x {columns} matrix");
        Self { data, rows, columns, strides: [columns, 1] }
    }

    /// The number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The transposed matrix, in the same memory.
    pub fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }
}

/// Writes `a * b` to `out`, row-major `[a's rows, b's columns]`. With `add`, adds it to the numbers in `out` instead.
///
/// # Panics
/// If `a` does not have as many columns as `b` has rows, or if `out` has another size.
pub fn product(a: Matrix, b: Matrix, out: &mut [f32], add: bool) {
    assert_eq!(out.len(), a.rows * b.columns, "the length of a {} x {} product", a.rows, b.columns);
    // SAFETY: `out` has the elements of the product, and they are initialised.
    unsafe { multiply(a, b, out.as_mut_ptr(), add) };
}

/// `a * b` in a new vector, row-major `[a's rows, b's columns]`.
///
/// # Panics
/// If `a` does not have as many columns as `b` has rows.
pub fn new_product(a: Matrix, b: Matrix) -> Vec<f32> {
    // SAFETY: without `add`, a product writes all elements of `out` and reads none of them.
    unsafe { filled(a.rows * b.columns, |out| multiply(a, b, out.as_mut_ptr().cast(), false)) }
}

/// # Safety
/// `out` points to `a.rows * b.columns` elements that nothing else accesses. With `add` they are initialised.
unsafe fn multiply(a: Matrix, b: Matrix, out: *mut f32, add: bool) {
    assert_eq!(a.columns, b.rows, "the inner dimensions of a product must be equal");
    let work = a.rows * a.columns * b.columns;
    let parallel = if work >= MIN_PARALLEL && rayon::current_num_threads() > 1 {
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    let step = |stride: usize| stride.cast_signed();
    // SAFETY: `new` has checked that the strides stay within the data; the caller guarantees `out`.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            step(b.columns),
            add,
            a.data.as_ptr(),
            step(a.strides[1]),
            step(a.strides[0]),
            b.data.as_ptr(),
            step(b.strides[1]),
            step(b.strides[0]),
            1.0,
            1.0,
            false,
            false,
            false,
            parallel,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, values};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_plain_loops(
            m in 0usize..30, k in 0usize..30, n in 0usize..30, a_transposed: bool, b_transposed: bool, seed: u64,
        ) {
            let (x, y) = (values(seed, m * k, 1.0), values(seed ^ 1, k * n, 1.0));
            let before = values(seed ^ 2, m * n, 1.0);
            let a = if a_transposed { Matrix::new(&x, k, m).transposed() } else { Matrix::new(&x, m, k) };
            let b = if b_transposed { Matrix::new(&y, n, k).transposed() } else { Matrix::new(&y, k, n) };
            let at = |data: &[f32], transposed: bool, rows: usize, columns: usize, i: usize, j: usize| {
                f64::from(if transposed { data[j * rows + i] } else { data[i * columns + j] })
            };
            let reference: Vec<f64> = (0..m * n)
                .map(|i| {
                    let a = |j| at(&x, a_transposed, m, k, i / n, j);
                    let b = |j| at(&y, b_transposed, k, n, j, i % n);
                    (0..k).map(|j| a(j) * b(j)).sum()
                })
                .collect();
            if k > 0 {
                close(&new_product(a, b), reference.clone(), 1e-5);
                let mut sum = before.clone();
                product(a, b, &mut sum, true);
                close(&sum, reference.iter().zip(&before).map(|(x, b)| x + f64::from(*b)), 1e-5);
            }
        }
    }
}
