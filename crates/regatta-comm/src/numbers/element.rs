//! The numbers that are communicated, and what is done with them.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A type of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
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
    /// [`Bool`](crate::Bool): a byte, where 0 is false.
    Bool,
    /// 16-bit signed integer.
    I16,
    /// 16-bit unsigned integer.
    U16,
    /// 32-bit unsigned integer.
    U32,
    /// 64-bit unsigned integer.
    U64,
    /// [`Complex`](crate::Complex) number of two 32-bit floats.
    C64,
    /// [`Complex`](crate::Complex) number of two 64-bit floats.
    C128,
}

impl DType {
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| *dtype as u8 == code)
    }

    /// All types.
    pub const ALL: &'static [Self] = &[
        Self::F32,
        Self::F64,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::I64,
        Self::U8,
        Self::I8,
        Self::Bool,
        Self::I16,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::C64,
        Self::C128,
    ];

    /// Whether it is a type of floating-point numbers; complex numbers are not, they are two of them.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::F16 | Self::BF16)
    }

    /// Whether it is a type of complex numbers.
    pub fn is_complex(self) -> bool {
        matches!(self, Self::C64 | Self::C128)
    }

    /// Whether it is a type of integers, with a sign or without.
    pub fn is_integer(self) -> bool {
        !self.is_float() && !self.is_complex() && self != Self::Bool
    }

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 | Self::C64 => 8,
            Self::C128 => 16,
        }
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
#[non_exhaustive]
pub enum ReduceOp {
    /// Their sum; integers wrap around.
    Sum = 1,
    /// Their sum divided by the number of ranks. Of integers it is their exact sum, which never wraps around, divided
    /// once and rounded towards zero.
    Mean,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// Their product; integers wrap around.
    Product,
    /// Bitwise and of integers; of truth values, whether all are true.
    And,
    /// Bitwise or of integers; of truth values, whether one is true.
    Or,
    /// Adasum: adds what is orthogonal and averages what is parallel, pair by pair of ranks (Maleki et al. 2021,
    /// "Scaling distributed training with adaptive summation"); floats only, all_reduce only.
    Adasum,
}

impl ReduceOp {
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|op| *op as u8 == code)
    }

    /// All reductions.
    pub const ALL: &'static [Self] =
        &[Self::Sum, Self::Mean, Self::Min, Self::Max, Self::Product, Self::And, Self::Or, Self::Adasum];

    /// Whether numbers of this type can be reduced so. Complex numbers have no order, and truth values no sum.
    pub fn suits(self, dtype: DType) -> bool {
        match self {
            Self::Sum | Self::Mean | Self::Product => dtype != DType::Bool,
            Self::Min | Self::Max => !dtype.is_complex(),
            Self::And | Self::Or => dtype.is_integer() || dtype == DType::Bool,
            Self::Adasum => dtype.is_float(),
        }
    }

    /// The reduction of numbers multiplied by `factor` on this rank. The factor may differ from rank to rank, as
    /// weights do.
    pub fn scaled_before(self, factor: f64) -> Reduction {
        Reduction { before: factor, ..self.into() }
    }

    /// The reduction, multiplied by `factor` in the end: the same one on all ranks.
    pub fn scaled_after(self, factor: f64) -> Reduction {
        Reduction { after: factor, ..self.into() }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

/// A reduction with factors before and after it, as Horovod's `prescale_factor` and `postscale_factor`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reduction {
    /// How values of several ranks become one.
    pub op: ReduceOp,
    /// This rank's numbers are multiplied by it first, and rounded to their type.
    pub before: f64,
    /// The result is multiplied by it; the same on all ranks.
    pub after: f64,
}

impl From<ReduceOp> for Reduction {
    fn from(op: ReduceOp) -> Self {
        Self { op, before: 1.0, after: 1.0 }
    }
}

impl FromStr for ReduceOp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|op| op.to_string() == text)
            .ok_or_else(|| Error::Usage(format!("unknown reduction `{text}`")))
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.to_string() == text)
            .ok_or_else(|| Error::Usage(format!("unknown type of number `{text}`")))
    }
}

/// Work on numbers of any type, for [`DType::with`].
pub trait Typed {
    /// What comes of it.
    type Output;

    /// Does the work on numbers of the type `T`.
    fn call<T: Element>(self) -> Self::Output;
}

/// A number that ranks can exchange and reduce.
///
/// Only the types of [`DType`] are elements, so nobody else can implement it.
pub trait Element: sealed::Sealed + bytemuck::Pod + PartialEq + Send + Sync + fmt::Debug + 'static {
    /// Its type, as peers see it.
    const DTYPE: DType;
    /// The type that it is accumulated in: itself, or f32 for the 16-bit floats.
    type Wide: Element;
    /// The type that a mean is summed in, where no sum of integers wraps around.
    type Exact: Element<Wide = Self::Exact>;
    #[doc(hidden)]
    fn to_exact(self) -> Self::Exact;
    /// The number of the type; a mean is always one.
    #[doc(hidden)]
    fn from_exact(exact: Self::Exact) -> Self;
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
    #[doc(hidden)]
    fn and(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    #[doc(hidden)]
    fn or(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The number multiplied by a factor, rounded to its type.
    #[doc(hidden)]
    fn scale(self, factor: f64) -> Self {
        Self::from_f64(self.to_f64() * factor)
    }
    /// Of a complex number the real part.
    #[doc(hidden)]
    fn to_f64(self) -> f64;
    /// The nearest number of the type; integers are rounded towards zero and kept in range.
    #[doc(hidden)]
    fn from_f64(value: f64) -> Self;
    /// The number that changes no reduction by `op`.
    #[doc(hidden)]
    fn neutral(op: ReduceOp) -> Self;
}

/// What others cannot name, they cannot implement.
pub(super) mod sealed {
    pub trait Sealed {}
}
