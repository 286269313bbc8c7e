//! Memory whose type of numbers is known only when the program runs.

use crate::api::buffer::Buffer;
use crate::error::{Error, Result};
use crate::numbers::element::{DType, Element, Typed};
use crate::numbers::memory::{Input, OnDevice, Output, Space};
use std::any::Any;
use std::fmt;

/// Numbers of a type that is known only when the program runs, one after the other, with what owns their memory: for
/// [`Group::run`](crate::Group::run). It never becomes a slice where the memory is a device's.
///
/// ```
/// use regatta_comm::{DType, Group, Operation, RawBuffer, ReduceOp};
///
/// let group = Group::solo();
/// let mut data = RawBuffer::from(vec![1.0f32, 2.0]);
/// group.run(&Operation::all_reduce(ReduceOp::Sum), None, Some(&mut data))?;
/// assert_eq!((data.dtype(), data.as_slice::<f32>()), (DType::F32, Some(&[1.0, 2.0][..])));
/// # Ok::<(), regatta_comm::Error>(())
/// ```
pub struct RawBuffer {
    owner: Box<dyn Any + Send>,
    start: *mut u8,
    len: usize,
    dtype: DType,
    space: Space,
}

// SAFETY: the buffer has its memory to itself, and its owner may move between threads.
unsafe impl Send for RawBuffer {}

impl RawBuffer {
    /// `len` numbers of the type `dtype` at `start`, an address in `space`, which `owner` keeps until it is dropped.
    ///
    /// # Errors
    /// An address that no such numbers can have: null, or not aligned for them in the host's memory.
    ///
    /// # Safety
    /// Until `owner` is dropped, the memory from `start` on must hold `len` numbers (on the host: initialised ones), and
    /// nothing but this buffer may read or write it. Dropping `owner` on another thread must be sound.
    pub unsafe fn from_parts(
        owner: Box<dyn Any + Send>,
        start: *mut u8,
        len: usize,
        dtype: DType,
        space: Space,
    ) -> Result<Self> {
        let refuse = |why: &str| Err(Error::Usage(format!("memory for {len} numbers of {dtype} {why}")));
        if len.checked_mul(dtype.bytes()).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return refuse("is longer than any memory");
        }
        let align = dtype.with(Align);
        if len == 0 {
            // Nothing is read from there, but a slice needs an aligned address.
            let start = std::ptr::without_provenance_mut(align);
            return Ok(Self { owner, start, len, dtype, space });
        }
        if start.is_null() {
            return refuse("is at address 0");
        }
        if space == Space::Host && !start.addr().is_multiple_of(align) {
            return refuse(&format!("is at {start:p}, not at a multiple of {align}"));
        }
        Ok(Self { owner, start, len, dtype, space })
    }

    /// Their type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// Where they are.
    pub fn space(&self) -> Space {
        self.space
    }

    /// Their address, in their space.
    pub fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// The numbers, where they are of this type and in the host's memory.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        match self.input() {
            Input::Host(bytes) if self.dtype == T::DTYPE => Some(bytemuck::cast_slice(bytes)),
            _ => None,
        }
    }

    /// As [`as_slice`](Self::as_slice), to write.
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        let dtype = self.dtype;
        match self.output() {
            Output::Host(bytes) if dtype == T::DTYPE => Some(bytemuck::cast_slice_mut(bytes)),
            _ => None,
        }
    }

    /// What owns the memory: a `Vec<T>` or a [`Buffer<T>`](Buffer) where this was made of one.
    pub fn into_owner(self) -> Box<dyn Any + Send> {
        self.owner
    }

    fn on_device(&self, number: u32) -> OnDevice {
        OnDevice { number, start: self.start, bytes: self.bytes() }
    }

    pub(crate) fn input(&self) -> Input<'_> {
        match self.space {
            // SAFETY: the owner keeps so many initialised bytes there, and nobody writes them meanwhile.
            Space::Host => Input::Host(unsafe { std::slice::from_raw_parts(self.start, self.bytes()) }),
            Space::Device(number) => Input::Device(self.on_device(number)),
        }
    }

    pub(crate) fn output(&mut self) -> Output<'_> {
        let bytes = self.bytes();
        match self.space {
            // SAFETY: as in `input`, and `&mut self` excludes other slices.
            Space::Host => Output::Host(unsafe { std::slice::from_raw_parts_mut(self.start, bytes) }),
            Space::Device(number) => Output::Device(self.on_device(number)),
        }
    }

    fn of<T: Element>(start: *mut T, len: usize, owner: Box<dyn Any + Send>) -> Self {
        Self { owner, start: start.cast(), len, dtype: T::DTYPE, space: Space::Host }
    }
}

impl<T: Element> From<Vec<T>> for RawBuffer {
    fn from(mut vec: Vec<T>) -> Self {
        Self::of(vec.as_mut_ptr(), vec.len(), Box::new(vec))
    }
}

impl<T: Element> From<Buffer<T>> for RawBuffer {
    fn from(mut buffer: Buffer<T>) -> Self {
        Self::of(buffer.as_mut_ptr(), buffer.len(), Box::new(buffer))
    }
}

impl fmt::Debug for RawBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RawBuffer({}[{}] on {})", self.dtype, self.len, self.space)
    }
}

struct Align;

impl Typed for Align {
    type Output = usize;

    fn call<T: Element>(self) -> usize {
        align_of::<T>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_hold_the_numbers_is_refused() {
        let mut words = vec![0u64; 4];
        let start = words.as_mut_ptr().cast::<u8>();
        let of = |start: *mut u8, len, dtype, space| {
            // SAFETY: what is not refused lies in `words`, or on a device that nobody reaches.
            unsafe { RawBuffer::from_parts(Box::new(()), start, len, dtype, space) }
        };
        let odd = start.wrapping_add(2);
        for (start, len, why) in [
            (odd, 3, "not at a multiple of 4"),
            (std::ptr::null_mut(), 3, "address 0"),
            (start, usize::MAX / 2, "any memory"),
        ] {
            let error = of(start, len, DType::F32, Space::Host).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(of(odd, 3, DType::F32, Space::Device(0)).unwrap().as_slice::<f32>().is_none());
        assert!(of(odd, 3, DType::F16, Space::Host).is_ok());
        let empty = of(std::ptr::null_mut(), 0, DType::F64, Space::Host).unwrap();
        assert_eq!((empty.as_slice::<f64>(), empty.as_slice::<f32>()), (Some(&[][..]), None));
    }

    #[test]
    fn what_owns_the_memory_comes_back() {
        let mut raw = RawBuffer::from(vec![1i16 as i32, 2]);
        raw.as_mut_slice::<i32>().unwrap()[0] = 5;
        assert!(raw.as_mut_slice::<f32>().is_none());
        assert_eq!(*raw.into_owner().downcast::<Vec<i32>>().unwrap(), [5, 2]);
    }
}
