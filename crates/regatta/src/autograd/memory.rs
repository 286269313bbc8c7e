//! Tensors over memory that the engine owns, and the way back from a tensor to its numbers.

use burn::backend::{DType, Flex};
use burn::tensor::{Tensor, TensorData};
use cubecl_environment::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use memmap2::MmapMut;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

/// Alignment of every block: a cache line, and the widest vector register.
const ALIGN: usize = 64;

/// A block of f32 that tensors view while the engine writes it between steps: parameters live here, so that
/// the optimizer updates them in place and no copy goes back into the model. Its memory is the system's until it is
/// written, and again after [`release`](Self::release).
pub struct Memory {
    map: MmapMut,
    len: usize,
}

// SAFETY: a `Memory` is plain numbers; who may write when is the contract of `slice_mut`.
unsafe impl Sync for Memory {}

impl Memory {
    /// A zeroed block of `len` elements.
    ///
    /// # Panics
    /// When the system has no memory left to map.
    pub fn zeroed(len: usize) -> Arc<Self> {
        let map =
            MmapMut::map_anon((len * size_of::<f32>()).max(1)).expect("memory for a block of parameters");
        Arc::new(Self { map, len })
    }

    fn start(&self) -> *mut f32 {
        self.map.as_ptr().cast_mut().cast()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the block has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block's numbers.
    ///
    /// # Safety
    /// No [`slice_mut`](Self::slice_mut) of the same elements may be alive.
    pub unsafe fn slice(&self) -> &[f32] {
        // SAFETY: allocated with `len` initialised elements; aliasing is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    /// The block's numbers, to write.
    ///
    /// # Safety
    /// Nobody else may read or write these elements meanwhile: no tensor that views them may be in use by
    /// another thread, and no other slice of them may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [f32] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} is outside a block of {}",
            self.len
        );
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start().add(range.start), range.len()) }
    }

    /// Gives the memory back to the system; all elements are zero from now on. Where the system cannot take it back, it
    /// keeps its numbers.
    ///
    /// # Safety
    /// As for [`slice_mut`](Self::slice_mut) of all elements.
    pub unsafe fn release(&self) {
        #[cfg(target_os = "linux")]
        // SAFETY: private memory of no file, which nobody looks at now: what is lost is what is to be lost.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

/// Part of a [`Memory`] as Burn's byte storage.
struct Window {
    memory: Arc<Memory>,
    range: Range<usize>,
}

impl Window {
    fn bytes(&self) -> (*mut MaybeUninit<u8>, usize) {
        // SAFETY: `view` checked that the range lies in the block.
        (unsafe { self.memory.start().add(self.range.start) }.cast(), self.range.len() * size_of::<f32>())
    }
}

impl AllocationController for Window {
    fn alloc_align(&self) -> usize {
        ALIGN
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let (start, len) = self.bytes();
        // SAFETY: `&mut self` and the second handle that `view` returns keep kernels from getting here while
        // the engine holds the block.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, len) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let (start, len) = self.bytes();
        // SAFETY: initialised, in bounds, and written by the engine only between steps.
        Ok(unsafe { std::slice::from_raw_parts(start, len) })
    }
}

/// Keeps memory that tensors free for the tensors of the next step, instead of giving it back to the system:
/// a step allocates what the last one freed, and would otherwise take a page fault for every 4 KiB of it.
/// For a process that trains; does nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        const TRIM_THRESHOLD: std::ffi::c_int = -1;
        const MMAP_THRESHOLD: std::ffi::c_int = -3;
        const ARENA_MAX: std::ffi::c_int = -8;
        // SAFETY: `mallopt` may be called at any time and refuses what it does not know.
        unsafe {
            mallopt(TRIM_THRESHOLD, std::ffi::c_int::MAX);
            mallopt(MMAP_THRESHOLD, 1 << 30);
            // Memory freed by one thread serves the others too.
            mallopt(ARENA_MAX, 1);
        }
    }
}

/// A tensor of `shape` over the elements of `memory` from `offset` (a multiple of 16) on. No copy.
///
/// Keep a clone of the tensor for as long as the memory must stay untouched: Burn's in-place kernels write
/// through a handle that is the only one.
pub fn view<const D: usize>(memory: &Arc<Memory>, offset: usize, shape: [usize; D]) -> Tensor<D> {
    let len: usize = shape.iter().product();
    assert!(offset.is_multiple_of(ALIGN / size_of::<f32>()), "offset {offset} is not on a cache line");
    assert!(offset + len <= memory.len, "a view of {len} at {offset} is outside a block of {}", memory.len);
    let window = Window { memory: memory.clone(), range: offset..offset + len };
    // SAFETY: the controller serves exactly this many initialised bytes for as long as it lives.
    let bytes = unsafe { Bytes::from_controller(Box::new(window), len * size_of::<f32>()) };
    Tensor::from_data(TensorData::from_bytes(bytes, shape, DType::F32), &super::device())
}

/// The tensor's numbers in row-major order as f32, or nothing where a device fails.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Option<Vec<f32>> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    match tensor.clone().try_into_primitive::<Flex>() {
        Ok(primitive) if primitive.dtype() == DType::F32 => {
            primitive.to_contiguous().as_slice::<f32>().map(<[f32]>::to_vec)
        }
        _ => tensor.try_into_vec_as::<f32>().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_sees_what_the_engine_writes_and_kernels_do_not_write_through() {
        let memory = Memory::zeroed(32);
        // SAFETY: no tensor exists yet.
        unsafe { memory.slice_mut(16..22) }.copy_from_slice(&[1., 2., 3., 4., 5., 6.]);
        let tensor = view(&memory, 16, [2, 3]);
        let keep = tensor.clone();
        assert_eq!(to_vec(tensor.add_scalar(1.0)).unwrap(), [2., 3., 4., 5., 6., 7.]);
        // SAFETY: no kernel is running.
        assert_eq!(unsafe { memory.slice() }[16..22], [1., 2., 3., 4., 5., 6.]);
        // SAFETY: as above.
        unsafe { memory.slice_mut(16..17).fill(9.0) };
        assert_eq!(to_vec(keep.transpose()).unwrap(), [9., 4., 2., 5., 3., 6.]);
    }
}
