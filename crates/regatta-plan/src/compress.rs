//! How gradients are encoded between workers, and how many bytes that takes.

use crate::exchange::{Content, ExchangePlan, Kept, Operation, UnitOperation, UnitUse};
use crate::{AxisSet, Load, Plan};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();
/// Bytes of a number and its place.
const PLACED: usize = 2 * F32;

/// An encoding of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CompressKind {
    /// As they are.
    #[default]
    None,
    /// 16 bits with the exponents of f32.
    Bf16,
    /// 16 bits with 10 bits of fraction; the largest number is 65504.
    F16,
    /// 8 bits with a scale for each 256 numbers, rounded at random (Alistarh et al. 2017, "QSGD").
    Int8,
    /// 4 bits, likewise.
    Int4,
    /// The sign, with the mean size of each 1024 numbers; what is lost is added to the next step's gradients (Seide et al.
    /// 2014, "1-Bit Stochastic Gradient Descent"; Tang et al. 2021, "1-bit Adam").
    Onebit,
    /// The largest part; the rest is added to the next step's gradients (Aji & Heafield 2017).
    Topk,
    /// A part at random, the same on all workers; the rest is added to the next step's gradients (Stich et al. 2018).
    Randomk,
    /// The largest part of what has added up with momentum (Lin et al. 2018, "Deep Gradient Compression").
    Dgc,
    /// The product of two thin matrices; what is lost is added to the next step's gradients (Vogels et al. 2019,
    /// "PowerSGD").
    Powersgd,
}

impl CompressKind {
    /// All encodings.
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::Bf16,
        Self::F16,
        Self::Int8,
        Self::Int4,
        Self::Onebit,
        Self::Topk,
        Self::Randomk,
        Self::Dgc,
        Self::Powersgd,
    ];

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Onebit => "onebit",
            Self::Topk => "topk",
            Self::Randomk => "randomk",
            Self::Dgc => "dgc",
            Self::Powersgd => "powersgd",
        }
    }

    /// Whether a part of the numbers is sent.
    pub fn is_sparse(self) -> bool {
        matches!(self, Self::Topk | Self::Randomk | Self::Dgc)
    }

    /// Whether it keeps what it has not sent, or what it begins with, from step to step: how many numbers for each of the
    /// gradient.
    pub fn kept(self) -> usize {
        match self {
            Self::None | Self::Bf16 | Self::F16 | Self::Int8 | Self::Int4 => 0,
            Self::Topk | Self::Randomk => 1,
            // The worker's and the owner's; momentum and sum; what is lost and a factor to begin with.
            Self::Onebit | Self::Dgc | Self::Powersgd => 2,
        }
    }
}

impl fmt::Display for CompressKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a plan encodes gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Compress {
    /// The encoding.
    pub kind: CompressKind,
    /// The part that is sent, in millionths, where a part is.
    pub millionths: u32,
    /// The rank of the matrices of `powersgd`.
    pub rank: usize,
    /// The momentum with which `dgc` adds gradients up before it sends them, in millionths.
    pub momentum: u32,
    /// Steps in which the part that `dgc` sends shrinks to what it is later, or in which `onebit` sends gradients as they are.
    pub warm_up: u64,
    /// The encoding of activations and their gradients from stage to stage: none, bf16 or int8.
    pub pipeline: CompressKind,
}

impl Default for Compress {
    fn default() -> Self {
        let (kind, pipeline) = (CompressKind::None, CompressKind::None);
        Self { kind, millionths: 10_000, rank: 4, momentum: 900_000, warm_up: 100, pipeline }
    }
}

impl Compress {
    /// How many of `len` numbers are sent: at least one, if there is one.
    pub fn count(self, len: usize) -> usize {
        let part = (len as u128 * u128::from(self.millionths)).div_ceil(1_000_000) as usize;
        part.clamp(len.min(1), len)
    }

    /// Whether a matrix of this shape takes fewer numbers as two thin ones.
    pub fn factors(self, [rows, columns]: [usize; 2]) -> bool {
        self.kind == CompressKind::Powersgd && self.rank * (rows + columns) < rows * columns
    }

    /// Bytes of a message of `len` activations, or of their gradients, from stage to stage.
    pub fn message(self, len: usize) -> usize {
        match self.pipeline {
            CompressKind::Bf16 => 2 * len,
            CompressKind::Int8 => Self { kind: CompressKind::Int8, ..self }.coded(len),
            _ => F32 * len,
        }
    }

    /// Numbers in a block of the encoding: parts of the whole are divided between blocks.
    pub fn block(self) -> usize {
        match self.kind {
            CompressKind::Onebit => 1024,
            CompressKind::Int8 | CompressKind::Int4 => 256,
            _ => 1,
        }
    }

    /// Bytes of `len` numbers in codes of a few bits.
    pub fn coded(self, len: usize) -> usize {
        let bits = match self.kind {
            CompressKind::Onebit => 1,
            CompressKind::Int4 => 4,
            _ => 8,
        };
        let of_block = |len: usize| F32 + (len * bits).div_ceil(8);
        let rest = len % self.block();
        len / self.block() * of_block(self.block()) + if rest == 0 { 0 } else { of_block(rest) }
    }

    /// Numbers of the part that each of `workers` sums, of `len` numbers in all; the last parts may have fewer.
    pub fn part(self, len: usize, workers: usize) -> usize {
        len.div_ceil(workers.max(1)).next_multiple_of(self.block())
    }
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        match self.kind {
            kind if kind.is_sparse() => write!(f, " {} %", f64::from(self.millionths) / 1e4),
            CompressKind::Powersgd => write!(f, " rank {}", self.rank),
            _ => Ok(()),
        }
    }
}

/// Every worker keeps everything, as under [`Mean`](crate::Mean), and gradients travel encoded. Vectors - biases, norms, running
/// statistics - travel as they are: they are few, and need their precision.
#[derive(Debug, Clone, Copy)]
pub struct Compressed {
    /// The encoding.
    pub compress: Compress,
    /// The number of workers.
    pub workers: usize,
}

impl ExchangePlan for Compressed {
    fn operations(&self, unit: UnitUse<'_>) -> Vec<UnitOperation> {
        let Self { compress, workers } = *self;
        let one = |operation, numbers, width, what| UnitOperation {
            content: Content::Gradients,
            over: AxisSet::WORKERS,
            operation,
            count: usize::from(numbers > 0),
            every: 1,
            numbers,
            width,
            what,
        };
        let (coded, whole): (Vec<[usize; 2]>, Vec<[usize; 2]>) = match compress.kind {
            CompressKind::Powersgd => unit.matrices.iter().partition(|&&shape| compress.factors(shape)),
            _ => (unit.matrices.to_vec(), vec![]),
        };
        let sum = |of: fn(&[usize; 2]) -> usize| coded.iter().map(of).sum::<usize>();
        let numbers = sum(|[rows, columns]| rows * columns);
        let as_they_are = unit.vectors + whole.iter().map(|[rows, columns]| rows * columns).sum::<usize>();
        let mut all = vec![one(Operation::AllReduce, as_they_are, F32, "gradients as they are")];
        match compress.kind {
            CompressKind::None => all.push(one(Operation::AllReduce, numbers, F32, "gradients")),
            CompressKind::Bf16 | CompressKind::F16 => {
                all.push(one(Operation::AllReduce, numbers, 2, "gradients in 16 bits"));
            }
            CompressKind::Int8 | CompressKind::Int4 | CompressKind::Onebit => {
                let bytes =
                    if numbers == 0 { 0 } else { workers * compress.coded(compress.part(numbers, workers)) };
                all.push(one(Operation::AllToAll, bytes, 1, "codes, to the owner of a part"));
                all.push(one(Operation::AllGather, bytes, 1, "codes of the mean"));
            }
            CompressKind::Topk | CompressKind::Dgc => {
                let bytes = workers * compress.count(numbers) * PLACED;
                all.push(one(Operation::AllGather, bytes, 1, "the largest gradients"));
            }
            CompressKind::Randomk => {
                all.push(one(Operation::AllReduce, compress.count(numbers), F32, "some gradients"));
            }
            CompressKind::Powersgd => {
                let [p, q] =
                    [sum(|shape| shape[0]), sum(|shape| shape[1])].map(|lines| lines * compress.rank);
                all.push(one(Operation::AllReduce, p, F32, "left factors"));
                all.push(one(Operation::AllReduce, q, F32, "right factors"));
            }
        }
        all
    }

    fn kept(&self, numbers: usize) -> Kept {
        let gradients = numbers.saturating_mul(1 + self.compress.kind.kept());
        Kept { parameters: numbers, gradients, updated: numbers }
    }

    fn buffers(&self, _: &Plan, load: &Load) -> usize {
        // One unit at a time: what is to be sent, and as much again in codes or sums.
        2 * load.units.iter().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(kind: CompressKind, millionths: u32) -> usize {
        let compress = Compress { kind, millionths, ..Compress::default() };
        let unit =
            UnitUse { len: 0, flushes: 1, gathers: 0, matrices: &[[1024, 1024], [2, 3]], vectors: 100 };
        let operations = Compressed { compress, workers: 4 }.operations(unit);
        operations.iter().map(|one| one.count * one.numbers * one.width).sum()
    }

    #[test]
    fn bytes_of_every_encoding() {
        let (matrices, vectors) = (1024 * 1024 + 6, 400);
        assert_eq!(bytes(CompressKind::None, 0), 4 * matrices + vectors);
        assert_eq!(bytes(CompressKind::Bf16, 0), 2 * matrices + vectors);
        // Parts of 262,400 numbers: 1025 blocks of 256 bytes and a scale each, twice.
        assert_eq!(bytes(CompressKind::Int8, 0), 2 * 4 * 1025 * 260 + vectors);
        assert_eq!(bytes(CompressKind::Int4, 0), 2 * 4 * 1025 * 132 + vectors);
        assert_eq!(bytes(CompressKind::Onebit, 0), 2 * 4 * 257 * 132 + vectors);
        assert_eq!(bytes(CompressKind::Topk, 10_000), 4 * 8 * 10_486 + vectors);
        assert_eq!(bytes(CompressKind::Randomk, 1000), 4 * 1049 + vectors);
        // The small matrix goes as it is.
        assert_eq!(bytes(CompressKind::Powersgd, 0), 2 * 4 * 4 * 1024 + vectors + 24);
    }

    #[test]
    fn a_part_has_at_least_one_number() {
        let compress = Compress { kind: CompressKind::Topk, millionths: 1000, ..Compress::default() };
        assert_eq!([0, 1, 999, 1001, 2000].map(|len| compress.count(len)), [0, 1, 1, 2, 2]);
    }
}
