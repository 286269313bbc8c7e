//! How numbers go from stage to stage: as they are, or in fewer bytes.

use crate::error::Result;
use regatta_comm::{Buffer, Group, Pending};
use regatta_kernel::compress::blocks::{Width, decode, encode};
use regatta_kernel::compress::half::{from_bf16, to_bf16};
use regatta_plan::CompressKind;
use std::ops::Deref;

/// A message under way.
pub(super) enum Pass {
    Plain(Pending<Buffer<f32>>),
    Coded(Pending<Buffer<u8>>),
}

/// A message that has come.
pub(crate) enum Numbers {
    Plain(Buffer<f32>),
    Decoded(Vec<f32>),
}

impl Deref for Numbers {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Plain(buffer) => buffer,
            Self::Decoded(numbers) => numbers,
        }
    }
}

impl Pass {
    /// Begins to send `data` to `to`, the other one of two. `seed` decides how numbers are rounded.
    pub(super) fn send(
        group: &Group,
        to: usize,
        kind: CompressKind,
        data: Vec<f32>,
        seed: u64,
    ) -> Result<Self> {
        let code = |bytes: usize, encode: &dyn Fn(&mut [u8])| -> Result<Self> {
            let mut coded = group.buffer::<u8>(bytes)?;
            encode(&mut coded);
            Ok(Self::Coded(group.send_async(coded, to)))
        };
        match kind {
            CompressKind::Bf16 => code(2 * data.len(), &|coded| {
                // Buffers of bytes need not be where numbers of two bytes may be.
                let mut bits = vec![0u16; data.len()];
                to_bf16(&data, &mut bits);
                coded.copy_from_slice(bytemuck::cast_slice(&bits));
            }),
            CompressKind::Int8 => code(Width::Eight.bytes(data.len()), &|coded| {
                encode(Width::Eight, &data, seed, coded);
            }),
            _ => Ok(Self::Plain(group.send_async(data.into(), to))),
        }
    }

    /// Begins to receive `len` numbers from `from`, the other one of two.
    pub(super) fn receive(group: &Group, from: usize, kind: CompressKind, len: usize) -> Result<Self> {
        let coded = |bytes: usize| Ok(Self::Coded(group.recv_async(group.buffer::<u8>(bytes)?, from)));
        match kind {
            CompressKind::Bf16 => coded(2 * len),
            CompressKind::Int8 => coded(Width::Eight.bytes(len)),
            _ => Ok(Self::Plain(group.recv_async(group.buffer(len)?, from))),
        }
    }

    /// Whether [`wait`](Self::wait) would not wait.
    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Plain(pending) => pending.is_done(),
            Self::Coded(pending) => pending.is_done(),
        }
    }

    /// Waits until it has been sent.
    pub(super) fn sent(self) -> Result<()> {
        match self {
            Self::Plain(pending) => pending.wait().map(drop)?,
            Self::Coded(pending) => pending.wait().map(drop)?,
        }
        Ok(())
    }

    /// Waits until it has come: `len` numbers.
    pub(super) fn received(self, kind: CompressKind, len: usize) -> Result<Numbers> {
        let coded = match self {
            Self::Plain(pending) => return Ok(Numbers::Plain(pending.wait()?)),
            Self::Coded(pending) => pending.wait()?,
        };
        let mut numbers = vec![0.0; len];
        if kind == CompressKind::Bf16 {
            let mut bits = vec![0u16; len];
            bytemuck::cast_slice_mut(&mut bits).copy_from_slice(&coded);
            from_bf16(&bits, &mut numbers);
        } else {
            decode(Width::Eight, &coded, 1.0, false, &mut numbers);
        }
        Ok(Numbers::Decoded(numbers))
    }
}
