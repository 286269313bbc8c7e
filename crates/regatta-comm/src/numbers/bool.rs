//! Truth values.

use super::element::sealed::Sealed;
use super::element::{DType, Element, ReduceOp};

/// A truth value: a byte, where 0 is false and every other value true, so that any memory holds truth values.
///
/// Reductions leave 0 or 1. `And` and `Or` ask whether all or one are true, and so do `Min` and `Max`.
///
/// ```
/// use regatta_comm::{Bool, Group, ReduceOp};
///
/// let mut found = [Bool::from(true), Bool::from(false)];
/// Group::solo().all_reduce(&mut found, ReduceOp::Or)?;
/// assert_eq!(found.map(bool::from), [true, false]);
/// assert_eq!(Bool::slice(&[true, false]), found);
/// # Ok::<(), regatta_comm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Bool(u8);

impl Bool {
    /// The same memory as truth values to exchange.
    pub fn slice(values: &[bool]) -> &[Self] {
        // A `bool` is the byte 0 or 1.
        bytemuck::checked::cast_slice(values)
    }
}

impl PartialEq for Bool {
    fn eq(&self, other: &Self) -> bool {
        bool::from(*self) == bool::from(*other)
    }
}

impl Eq for Bool {}

impl From<bool> for Bool {
    #[inline(always)]
    fn from(value: bool) -> Self {
        Self(value.into())
    }
}

impl From<Bool> for bool {
    #[inline(always)]
    fn from(value: Bool) -> Self {
        value.0 != 0
    }
}

#[inline(always)]
fn both(a: Bool, b: Bool) -> Bool {
    (bool::from(a) & bool::from(b)).into()
}

#[inline(always)]
fn either(a: Bool, b: Bool) -> Bool {
    (bool::from(a) | bool::from(b)).into()
}

impl Sealed for Bool {}

impl Element for Bool {
    const DTYPE: DType = DType::Bool;
    type Wide = Self;
    type Exact = Self;

    #[inline(always)]
    fn to_exact(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_exact(exact: Self) -> Self {
        exact
    }
    #[inline(always)]
    fn widen(self) -> Self {
        self
    }
    #[inline(always)]
    fn narrow(wide: Self) -> Self {
        wide
    }
    // Sums, products and means are refused before anything is sent: `ReduceOp::suits`.
    fn sum(a: Self, b: Self) -> Self {
        either(a, b)
    }
    fn product(a: Self, b: Self) -> Self {
        both(a, b)
    }
    fn divide(a: Self, _: usize) -> Self {
        a
    }
    #[inline(always)]
    fn min(a: Self, b: Self) -> Self {
        both(a, b)
    }
    #[inline(always)]
    fn max(a: Self, b: Self) -> Self {
        either(a, b)
    }
    #[inline(always)]
    fn and(a: Self, b: Self) -> Self {
        both(a, b)
    }
    #[inline(always)]
    fn or(a: Self, b: Self) -> Self {
        either(a, b)
    }
    fn to_f64(self) -> f64 {
        u8::from(bool::from(self)).into()
    }
    fn from_f64(value: f64) -> Self {
        (value != 0.0).into()
    }
    fn neutral(op: ReduceOp) -> Self {
        matches!(op, ReduceOp::Min | ReduceOp::And | ReduceOp::Product).into()
    }
}
