//! Complex numbers.

use super::element::sealed::Sealed;
use super::element::{DType, Element, ReduceOp};

/// A complex number of two floats, the real part first, as in C, Fortran, NumPy and MPI.
///
/// They have a sum, a mean and a product, but no order.
///
/// ```
/// use regatta_comm::{Complex, Group, ReduceOp};
///
/// let mut data = [Complex::new(1.0f32, -2.0)];
/// Group::solo().all_reduce(&mut data, ReduceOp::Sum)?;
/// assert_eq!((data[0].re(), data[0].im()), (1.0, -2.0));
/// # Ok::<(), regatta_comm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Complex<F>([F; 2]);

impl<F: Copy> Complex<F> {
    /// From its parts.
    #[inline(always)]
    pub fn new(re: F, im: F) -> Self {
        Self([re, im])
    }

    /// The real part.
    #[inline(always)]
    pub fn re(self) -> F {
        self.0[0]
    }

    /// The imaginary part.
    #[inline(always)]
    pub fn im(self) -> F {
        self.0[1]
    }
}

macro_rules! complex {
    ($part:ty, $dtype:ident) => {
        impl Sealed for Complex<$part> {}

        impl Element for Complex<$part> {
            const DTYPE: DType = DType::$dtype;
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
            #[inline(always)]
            fn sum(Self([a, b]): Self, Self([c, d]): Self) -> Self {
                Self([a + c, b + d])
            }
            #[inline(always)]
            fn product(Self([a, b]): Self, Self([c, d]): Self) -> Self {
                // The same bits whichever comes first.
                Self([a * c - b * d, a * d + b * c])
            }
            #[inline(always)]
            fn divide(Self([a, b]): Self, ranks: usize) -> Self {
                Self([a / ranks as $part, b / ranks as $part])
            }
            // What needs an order or bits is refused before anything is sent: `ReduceOp::suits`.
            fn min(a: Self, _: Self) -> Self {
                a
            }
            fn max(a: Self, _: Self) -> Self {
                a
            }
            fn and(a: Self, _: Self) -> Self {
                a
            }
            fn or(a: Self, _: Self) -> Self {
                a
            }
            #[inline(always)]
            fn scale(self, factor: f64) -> Self {
                Self(self.0.map(|part| (f64::from(part) * factor) as $part))
            }
            fn to_f64(self) -> f64 {
                self.re().into()
            }
            fn from_f64(value: f64) -> Self {
                Self([value as $part, 0.0])
            }
            fn neutral(op: ReduceOp) -> Self {
                Self::from_f64(if op == ReduceOp::Product { 1.0 } else { 0.0 })
            }
        }
    };
}

complex!(f32, C64);
complex!(f64, C128);
