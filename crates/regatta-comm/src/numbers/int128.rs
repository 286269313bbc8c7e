//! The numbers that 64-bit integers are summed in for a mean.

use super::element::sealed::Sealed;
use crate::numbers::element::{DType, Element, ReduceOp};

/// A 128-bit integer that only exists within an operation. Two words, since it lies in memory that is aligned for words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Int128([u64; 2]);

impl From<i64> for Int128 {
    #[inline(always)]
    fn from(value: i64) -> Self {
        i128::from(value).into()
    }
}

impl From<u64> for Int128 {
    #[inline(always)]
    fn from(value: u64) -> Self {
        i128::from(value).into()
    }
}

impl From<i128> for Int128 {
    #[inline(always)]
    fn from(value: i128) -> Self {
        Self([value as u64, (value >> 64) as u64])
    }
}

impl From<Int128> for i128 {
    #[inline(always)]
    fn from(Int128([low, high]): Int128) -> Self {
        Self::from(high.cast_signed()) << 64 | Self::from(low)
    }
}

impl Sealed for Int128 {}

impl Element for Int128 {
    /// Peers see the type of the operation; this one is never announced.
    const DTYPE: DType = DType::I64;
    type Wide = Self;
    type Exact = Self;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }
    #[inline(always)]
    fn narrow(wide: Self) -> Self {
        wide
    }
    #[inline(always)]
    fn to_exact(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_exact(exact: Self) -> Self {
        exact
    }
    #[inline(always)]
    fn sum(a: Self, b: Self) -> Self {
        i128::from(a).wrapping_add(b.into()).into()
    }
    fn product(a: Self, b: Self) -> Self {
        i128::from(a).wrapping_mul(b.into()).into()
    }
    fn min(a: Self, b: Self) -> Self {
        i128::from(a).min(b.into()).into()
    }
    fn max(a: Self, b: Self) -> Self {
        i128::from(a).max(b.into()).into()
    }
    #[inline(always)]
    fn divide(a: Self, ranks: usize) -> Self {
        let (sum, ranks) = (i128::from(a), ranks as i64);
        match i64::try_from(sum) {
            // Much faster, and nearly always enough.
            Ok(sum) => (sum / ranks).into(),
            Err(_) => (sum / i128::from(ranks)).into(),
        }
    }
    fn and(a: Self, b: Self) -> Self {
        (i128::from(a) & i128::from(b)).into()
    }
    fn or(a: Self, b: Self) -> Self {
        (i128::from(a) | i128::from(b)).into()
    }
    fn to_f64(self) -> f64 {
        i128::from(self) as f64
    }
    fn from_f64(value: f64) -> Self {
        (value as i128).into()
    }
    fn neutral(op: ReduceOp) -> Self {
        match op {
            ReduceOp::Min => i128::MAX.into(),
            ReduceOp::Max => i128::MIN.into(),
            ReduceOp::Product => 1i128.into(),
            ReduceOp::And => (-1i128).into(),
            _ => 0i128.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_every_bit() {
        for value in [0, 1, -1, i128::MAX, i128::MIN, 1 << 64, -(1 << 64), i128::from(u64::MAX)] {
            assert_eq!(i128::from(Int128::from(value)), value);
        }
        let sum = Int128::sum(i64::MAX.into(), i64::MAX.into());
        assert_eq!(Int128::divide(sum, 2), i64::MAX.into());
        assert_eq!(Int128::divide((-7i64).into(), 2), (-3i64).into());
    }
}
