//! Matrix products, by the crate `gemm`, of matrices that lie in memory in any order.

use crate::fresh::fresh;

/// Multiplications from which on a product is worth several threads.
const WORTH: usize = 192 * 192 * 192;

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    /// Elements from a row to the next, and from a column to the next.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Row-major `[rows, columns]`.
    ///
    /// # Panics
    /// When `data` has another number of elements.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of {rows} x {columns}");
        Self { data, rows, columns, strides: [columns, 1] }
    }

    /// How many columns it has.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The transposed matrix, in the same memory.
    pub fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }
}

/// Writes `a * b` to `out`, row-major; adds it to what is there if `add`.
///
/// # Panics
/// When sizes do not fit.
pub fn product(a: Matrix, b: Matrix, out: &mut [f32], add: bool) {
    assert_eq!(out.len(), a.rows * b.columns, "a product of {} x {}", a.rows, b.columns);
    // SAFETY: as many elements, of which each is a number before and after.
    unsafe { multiply(a, b, out.as_mut_ptr(), add) };
}

/// `a * b`, row-major.
///
/// # Panics
/// When sizes do not fit.
pub fn new_product(a: Matrix, b: Matrix) -> Vec<f32> {
    // SAFETY: a product writes all of its elements without reading them.
    unsafe { fresh(a.rows * b.columns, |out| multiply(a, b, out.as_mut_ptr().cast(), false)) }
}

/// # Safety
/// `out` has room for `a.rows * b.columns` elements that nobody else looks at; with `add` they are numbers.
unsafe fn multiply(a: Matrix, b: Matrix, out: *mut f32, add: bool) {
    assert_eq!(a.columns, b.rows, "inner dimensions of a product");
    let work = a.rows * a.columns * b.columns;
    let parallel = if work >= WORTH && rayon::current_num_threads() > 1 {
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    let step = |stride: usize| stride.cast_signed();
    // SAFETY: `new` checked that the strides stay inside of the data; `out` is the caller's promise.
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
        fn agrees_with_plain_loops(m in 0usize..30, k in 0usize..30, n in 0usize..30, a_turned: bool, b_turned: bool, seed: u64) {
            let (x, y, before) = (values(seed, m * k, 1.0), values(seed ^ 1, k * n, 1.0), values(seed ^ 2, m * n, 1.0));
            let a = if a_turned { Matrix::new(&x, k, m).transposed() } else { Matrix::new(&x, m, k) };
            let b = if b_turned { Matrix::new(&y, n, k).transposed() } else { Matrix::new(&y, k, n) };
            let at = |data: &[f32], turned: bool, rows: usize, columns: usize, i: usize, j: usize| {
                f64::from(if turned { data[j * rows + i] } else { data[i * columns + j] })
            };
            let plain: Vec<f64> = (0..m * n)
                .map(|i| (0..k).map(|j| at(&x, a_turned, m, k, i / n, j) * at(&y, b_turned, k, n, j, i % n)).sum())
                .collect();
            if k > 0 {
                close(&new_product(a, b), plain.clone(), 1e-5);
                let mut sum = before.clone();
                product(a, b, &mut sum, true);
                close(&sum, plain.iter().zip(&before).map(|(x, b)| x + f64::from(*b)), 1e-5);
            }
        }
    }
}
