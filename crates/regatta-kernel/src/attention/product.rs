//! Products of small matrices in the cache, by tiles in registers.

use pulp::Simd;

/// A left operand, of which single elements are read. Element `(i, j)` is `values[i * row + j * column]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [f32],
    pub(super) row: usize,
    pub(super) column: usize,
}

/// A right operand, of which vectors are read. Row `i` starts at `values[i * row]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) values: &'a [f32],
    pub(super) row: usize,
}

/// Returns `sums` plus the product of `M` rows of `left` and `N` vectors of columns of `right`, over the first
/// `inner` columns of `left` and rows of `right`. `M * N` sums, `N` vectors and one more should fit in the registers.
#[inline(always)]
pub(super) fn product<S: Simd, const M: usize, const N: usize>(
    simd: S,
    left: Left<'_>,
    right: Right<'_>,
    inner: usize,
    mut sums: [[S::f32s; N]; M],
) -> [[S::f32s; N]; M] {
    if inner == 0 {
        return sums;
    }
    assert!((M - 1) * left.row + (inner - 1) * left.column < left.values.len());
    assert!((inner - 1) * right.row + N * S::F32_LANES <= right.values.len());
    let mut numbers = left.values.as_ptr();
    let mut vectors = right.values.as_ptr();
    for _ in 0..inner {
        let mut b = [simd.splat_f32s(0.0); N];
        for (n, b) in b.iter_mut().enumerate() {
            // SAFETY: the vector is within `right` by the second assertion, and the read may be unaligned.
            *b = unsafe { vectors.add(n * S::F32_LANES).cast::<S::f32s>().read_unaligned() };
        }
        for (m, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the element is within `left` by the first assertion.
            let a = simd.splat_f32s(unsafe { *numbers.add(m * left.row) });
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = simd.mul_add_e_f32s(a, b, *sum);
            }
        }
        // After the last step the pointers may be outside of the slices; then they are not dereferenced.
        numbers = numbers.wrapping_add(left.column);
        vectors = vectors.wrapping_add(right.row);
    }
    sums
}

/// `out = out * factors + left * right` for `M` rows of `vectors` vectors. `out` has the row distance of `right`.
#[inline(always)]
pub(super) fn add_product<S: Simd, const M: usize>(
    simd: S,
    left: Left<'_>,
    right: Right<'_>,
    inner: usize,
    out: &mut [f32],
    vectors: usize,
    factors: Option<[f32; M]>,
) {
    let mut at = 0;
    while at + 2 <= vectors {
        add_columns::<S, M, 2>(simd, left, right, inner, out, at, factors);
        at += 2;
    }
    if at < vectors {
        add_columns::<S, M, 1>(simd, left, right, inner, out, at, factors);
    }
}

/// [`add_product`] for `N` vectors of columns from vector `at` on.
#[inline(always)]
fn add_columns<S: Simd, const M: usize, const N: usize>(
    simd: S,
    left: Left<'_>,
    right: Right<'_>,
    inner: usize,
    out: &mut [f32],
    at: usize,
    factors: Option<[f32; M]>,
) {
    let begin = at * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    for (m, sums) in sums.iter_mut().enumerate() {
        let row = vectors_at::<S, N>(&out[m * right.row + begin..]);
        for (sum, out) in sums.iter_mut().zip(row) {
            *sum = *out;
        }
        if let Some(factors) = factors {
            for sum in sums {
                *sum = simd.mul_f32s(*sum, simd.splat_f32s(factors[m]));
            }
        }
    }
    let right = Right { values: &right.values[begin..], row: right.row };
    let sums = product::<S, M, N>(simd, left, right, inner, sums);
    for (m, sums) in sums.iter().enumerate() {
        store::<S, N>(&mut out[m * right.row + begin..], sums);
    }
}

/// The first `N` vectors of `values`.
#[inline(always)]
pub(super) fn vectors_at<S: Simd, const N: usize>(values: &[f32]) -> &[S::f32s] {
    &S::as_simd_f32s(values).0[..N]
}

/// Stores `vectors` at the start of `out`.
#[inline(always)]
pub(super) fn store<S: Simd, const N: usize>(out: &mut [f32], vectors: &[S::f32s; N]) {
    S::as_mut_simd_f32s(out).0[..N].copy_from_slice(vectors);
}
