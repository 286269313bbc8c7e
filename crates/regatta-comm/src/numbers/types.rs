//! The types of numbers that ranks exchange, each as an [`Element`].

use super::bool::Bool;
use super::complex::Complex;
use super::element::sealed::Sealed;
use super::element::{DType, Element, ReduceOp, Typed};
use super::float16;
use super::int128::Int128;
use half::{bf16, f16};

impl DType {
    /// Calls `work` with the [`Element`] of this type: the one place where a type that is known only when the program
    /// runs becomes one that the compiler knows.
    ///
    /// ```
    /// use regatta_comm::{DType, Element, Typed};
    ///
    /// struct Zeros(usize);
    ///
    /// impl Typed for Zeros {
    ///     type Output = String;
    ///
    ///     fn call<T: Element>(self) -> String {
    ///         format!("{:?}", vec![T::zeroed(); self.0])
    ///     }
    /// }
    ///
    /// assert_eq!(DType::F32.with(Zeros(2)), "[0.0, 0.0]");
    /// assert_eq!(DType::U8.with(Zeros(2)), "[0, 0]");
    /// ```
    pub fn with<W: Typed>(self, work: W) -> W::Output {
        match self {
            Self::F32 => work.call::<f32>(),
            Self::F64 => work.call::<f64>(),
            Self::F16 => work.call::<f16>(),
            Self::BF16 => work.call::<bf16>(),
            Self::I32 => work.call::<i32>(),
            Self::I64 => work.call::<i64>(),
            Self::U8 => work.call::<u8>(),
            Self::I8 => work.call::<i8>(),
            Self::Bool => work.call::<Bool>(),
            Self::I16 => work.call::<i16>(),
            Self::U16 => work.call::<u16>(),
            Self::U32 => work.call::<u32>(),
            Self::U64 => work.call::<u64>(),
            Self::C64 => work.call::<Complex<f32>>(),
            Self::C128 => work.call::<Complex<f64>>(),
        }
    }
}

macro_rules! float {
    ($type:ty, $wide:ty, $dtype:ident, $widen:expr, $narrow:expr, $from:expr) => {
        impl Sealed for $type {}

        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            type Wide = $wide;
            type Exact = $wide;
            #[inline(always)]
            fn to_exact(self) -> $wide {
                $widen(self)
            }
            #[inline(always)]
            fn from_exact(exact: $wide) -> Self {
                $narrow(exact)
            }
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
            // Refused before anything is sent: `ReduceOp::suits`.
            #[inline(always)]
            fn and(a: $wide, _: $wide) -> $wide {
                a
            }
            #[inline(always)]
            fn or(a: $wide, _: $wide) -> $wide {
                a
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $from(value)
            }
            fn neutral(op: ReduceOp) -> Self {
                match op {
                    ReduceOp::Min => <$type>::INFINITY,
                    ReduceOp::Max => <$type>::NEG_INFINITY,
                    ReduceOp::Product => $from(1.0),
                    _ => $from(0.0),
                }
            }
        }
    };
}

macro_rules! integer {
    ($type:ty, $dtype:ident, $long:ty, $exact:ty, $from_exact:expr) => {
        impl Sealed for $type {}

        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            type Wide = $type;
            type Exact = $exact;
            #[inline(always)]
            fn to_exact(self) -> $exact {
                self.into()
            }
            #[inline(always)]
            fn from_exact(exact: $exact) -> Self {
                $from_exact(exact)
            }
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
                // Of sums that fit; numbers of ranks do.
                (a as $long / ranks as $long) as $type
            }
            #[inline(always)]
            fn and(a: $type, b: $type) -> $type {
                a & b
            }
            #[inline(always)]
            fn or(a: $type, b: $type) -> $type {
                a | b
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            fn neutral(op: ReduceOp) -> Self {
                match op {
                    ReduceOp::Min => <$type>::MAX,
                    ReduceOp::Max => <$type>::MIN,
                    ReduceOp::Product => 1,
                    ReduceOp::And => !0,
                    _ => 0,
                }
            }
        }
    };
}

float!(f32, f32, F32, |x| x, |x| x, |x: f64| x as f32);
float!(f64, f64, F64, |x| x, |x| x, |x: f64| x);
float!(f16, f32, F16, float16::widen, float16::narrow, f16::from_f64);
float!(bf16, f32, BF16, |x: bf16| x.to_f32(), bf16::from_f32, bf16::from_f64);
integer!(i8, I8, i64, i64, |x| x as i8);
integer!(i16, I16, i64, i64, |x| x as i16);
integer!(i32, I32, i64, i64, |x| x as i32);
integer!(i64, I64, i64, Int128, |x| i128::from(x) as i64);
integer!(u8, U8, i64, i64, |x| x as u8);
integer!(u16, U16, i64, i64, |x| x as u16);
integer!(u32, U32, i64, i64, |x| x as u32);
integer!(u64, U64, u64, Int128, |x| i128::from(x) as u64);
