//! The types of numbers that ranks exchange, each as an [`Element`].

use super::element::{DType, Element, ReduceOp};
use super::float16;
use super::int128::Int128;
use half::{bf16, f16};

macro_rules! float {
    ($type:ty, $wide:ty, $dtype:ident, $widen:expr, $narrow:expr, $from:expr) => {
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
    ($type:ty, $dtype:ident, $exact:ty, $from_exact:expr) => {
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
                (a as i64 / ranks as i64) as $type
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
integer!(i32, I32, i64, |x| x as i32);
integer!(i64, I64, Int128, |x| i128::from(x) as i64);
integer!(u8, U8, i64, |x| x as u8);
integer!(i8, I8, i64, |x| x as i8);
