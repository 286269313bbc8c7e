//! The numbers that are communicated, and what is done with them.

use crate::float16;
use half::{bf16, f16};
use std::fmt;

/// A type of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DType {
    /// 32-bit float.
    F32 = 1,
    /// 64-bit float.
    F64,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 32-bit signed integer.
    I32,
    /// 64-bit signed integer.
    I64,
    /// Byte.
    U8,
    /// Signed byte.
    I8,
}

impl DType {
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::F32, Self::F64, Self::F16, Self::BF16, Self::I32, Self::I64, Self::U8, Self::I8]
            .into_iter()
            .find(|dtype| *dtype as u8 == code)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReduceOp {
    /// Their sum; integers wrap around.
    Sum = 1,
    /// Their sum divided by the number of ranks; integers are rounded towards zero.
    Mean,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// Their product; integers wrap around.
    Product,
}

impl ReduceOp {
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Sum, Self::Mean, Self::Min, Self::Max, Self::Product].into_iter().find(|op| *op as u8 == code)
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

/// A number that ranks can exchange and reduce.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + 'static {
    /// Its type, as peers see it.
    const DTYPE: DType;
    /// The type that it is accumulated in: itself, or f32 for the 16-bit floats.
    type Wide: Copy;
    #[doc(hidden)]
    fn widen(self) -> Self::Wide;
    #[doc(hidden)]
    fn narrow(wide: Self::Wide) -> Self;
    #[doc(hidden)]
    fn sum(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    #[doc(hidden)]
    fn product(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    #[doc(hidden)]
    fn min(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    #[doc(hidden)]
    fn max(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    #[doc(hidden)]
    fn divide(a: Self::Wide, ranks: usize) -> Self::Wide;
}

macro_rules! float {
    ($type:ty, $wide:ty, $dtype:ident, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            type Wide = $wide;
            #[inline(always)]
            fn widen(self) -> $wide {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }
            #[inline(always)]
            fn sum(a: $wide, b: $wide) -> $wide {
                a + b
            }
            #[inline(always)]
            fn product(a: $wide, b: $wide) -> $wide {
                a * b
            }
            #[inline(always)]
            fn min(a: $wide, b: $wide) -> $wide {
                if b < a || b.is_nan() { b } else { a }
            }
            #[inline(always)]
            fn max(a: $wide, b: $wide) -> $wide {
                if b > a || b.is_nan() { b } else { a }
            }
            #[inline(always)]
            fn divide(a: $wide, ranks: usize) -> $wide {
                a / ranks as $wide
            }
        }
    };
}

macro_rules! integer {
    ($type:ty, $dtype:ident) => {
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            type Wide = $type;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(wide: $type) -> Self {
                wide
            }
            #[inline(always)]
            fn sum(a: $type, b: $type) -> $type {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn product(a: $type, b: $type) -> $type {
                a.wrapping_mul(b)
            }
            #[inline(always)]
            fn min(a: $type, b: $type) -> $type {
                if b < a { b } else { a }
            }
            #[inline(always)]
            fn max(a: $type, b: $type) -> $type {
                if b > a { b } else { a }
            }
            #[inline(always)]
            fn divide(a: $type, ranks: usize) -> $type {
                (a as i128 / ranks as i128) as $type
            }
        }
    };
}

float!(f32, f32, F32, |x| x, |x| x);
float!(f64, f64, F64, |x| x, |x| x);
float!(f16, f32, F16, float16::widen, float16::narrow);
float!(bf16, f32, BF16, |x: bf16| x.to_f32(), bf16::from_f32);
integer!(i32, I32);
integer!(i64, I64);
integer!(u8, U8);
integer!(i8, I8);
