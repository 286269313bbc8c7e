//! Helpers for the tests of the kernels.

use crate::random::Stream;

/// Normally distributed numbers.
pub(crate) fn values(seed: u64, len: usize, deviation: f32) -> Vec<f32> {
    Stream::new(seed).normal(len, deviation)
}

/// Asserts that every difference is at most `bound` times the largest expected value, or 0.1 if that is smaller.
#[track_caller]
pub(crate) fn close(found: &[f32], expected: impl IntoIterator<Item = f64>, bound: f64) {
    let expected: Vec<f64> = expected.into_iter().collect();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.1f64, |most, x| most.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - expected).abs() / largest;
        assert!(error <= bound, "element {i} is {found}, expected {expected}: {error:.1e} of {largest}");
    }
}

/// The derivative of `f` at `x` by finite differences.
pub(crate) fn derivative_of(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    // Fourth order: the error is about h^4.
    let h = 1e-3;
    (8.0 * (f(x + h) - f(x - h)) - (f(x + 2.0 * h) - f(x - 2.0 * h))) / (12.0 * h)
}

/// The gradient by finite differences of a scalar function of all of `x`.
pub(crate) fn gradient_of(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let at = |i: usize| {
        let along = |value: f64| {
            let mut moved = x.to_vec();
            moved[i] = value;
            f(&moved)
        };
        derivative_of(along, x[i])
    };
    (0..x.len()).map(at).collect()
}

/// The values as f64.
pub(crate) fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}
