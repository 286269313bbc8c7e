//! Numbers in memory that a transport may reduce in place.

use crate::error::{Error, Result};
use crate::numbers::element::Element;
use crate::numbers::memory::Space;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

#[cfg(target_os = "linux")]
use crate::transport::shm::Piece;

/// Numbers owned by one rank: from [`Group::buffer`](crate::Group::buffer) in memory that peers reduce in place
/// where the transport has such, or from any vector. Dropping it frees the memory for the next buffer.
///
/// It is always memory of the host, so it can be a slice; a device's memory is a [`RawBuffer`](crate::RawBuffer).
pub struct Buffer<T> {
    memory: Memory<T>,
    len: usize,
    _numbers: PhantomData<T>,
}

enum Memory<T> {
    Vec(Vec<T>),
    /// Begins at a cache line, so that no vector load crosses two.
    Lines(Vec<Line>),
    #[cfg(target_os = "linux")]
    Registered(Piece),
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: a buffer owns its memory alone, and numbers may move between threads.
unsafe impl<T: Element> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Element> Sync for Buffer<T> {}

impl<T: Element> Buffer<T> {
    /// `len` zeros on the heap.
    pub(crate) fn heap(len: usize) -> Result<Self> {
        let fail = |reason: &dyn fmt::Display| Error::System {
            action: format!("allocate a buffer of {len} numbers of {} bytes", size_of::<T>()),
            reason: reason.to_string(),
        };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| fail(&"no machine has so much memory"))?;
        let lines = bytes.div_ceil(size_of::<Line>());
        let mut memory = vec![];
        memory.try_reserve_exact(lines).map_err(|error| fail(&error))?;
        memory.resize(lines, Line([0; 64]));
        Ok(Self { memory: Memory::Lines(memory), len, _numbers: PhantomData })
    }

    /// `len` zeros in `piece`, which is large enough and zeroed.
    #[cfg(target_os = "linux")]
    pub(crate) fn registered(piece: Piece, len: usize) -> Self {
        Self { memory: Memory::Registered(piece), len, _numbers: PhantomData }
    }

    /// Where it is: on the host.
    pub fn space(&self) -> Space {
        Space::Host
    }

    /// Whether peers can reduce the buffer in place.
    pub fn is_registered(&self) -> bool {
        !matches!(self.memory, Memory::Vec(_) | Memory::Lines(_))
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(vec: Vec<T>) -> Self {
        Self { len: vec.len(), memory: Memory::Vec(vec), _numbers: PhantomData }
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Vec(vec) => vec,
            Memory::Lines(lines) => &bytemuck::cast_slice(lines)[..self.len],
            // SAFETY: the piece is page-aligned, holds `len` initialised numbers and is this buffer's alone.
            #[cfg(target_os = "linux")]
            Memory::Registered(piece) => unsafe {
                std::slice::from_raw_parts(piece.start().cast(), self.len)
            },
        }
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Vec(vec) => vec,
            Memory::Lines(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            // SAFETY: as for `deref`; `&mut self` excludes other slices.
            #[cfg(target_os = "linux")]
            Memory::Registered(piece) => unsafe {
                std::slice::from_raw_parts_mut(piece.start().cast(), self.len)
            },
        }
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Buffer({}[{}]{})",
            T::DTYPE,
            self.len,
            if self.is_registered() { ", registered" } else { "" }
        )
    }
}
