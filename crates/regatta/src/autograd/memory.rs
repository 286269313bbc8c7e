//! Tensors over memory that the engine owns, and access to the numbers of a tensor.

use burn::backend::{DType, Flex};
use burn::tensor::{Tensor, TensorData};
use cubecl_environment::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use memmap2::MmapMut;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

/// Alignment of every block in bytes: a cache line, and the widest vector register.
const ALIGN: usize = 64;

/// A block of f32 that tensors view and that the engine writes between steps. It holds parameters, so that the optimizer
/// updates them in place and the model needs no copy. The system provides the memory only when it is first written, and
/// takes it back at [`release`](Self::release).
pub struct Memory {
    map: MmapMut,
    len: usize,
}

// SAFETY: a `Memory` is plain numbers; the contract of `slice_mut` says who may write them and when.
unsafe impl Sync for Memory {}

impl Memory {
    /// A zeroed block of `len` elements.
    ///
    /// # Panics
    /// The system cannot map the memory.
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

    /// The block's numbers.
    ///
    /// # Safety
    /// No [`slice_mut`](Self::slice_mut) of the same elements may be alive.
    pub unsafe fn slice(&self) -> &[f32] {
        // SAFETY: allocated with `len` initialised elements; aliasing is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    /// The numbers of `range`, to write.
    ///
    /// # Safety
    /// Nothing else may read or write these elements while the slice is alive: no other thread may use a tensor that views
    /// them, and no other slice of them may be alive.
    ///
    /// # Panics
    /// `range` is not within the block.
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

    /// Returns the memory to the system; all elements are zero from now on. If the system cannot take it back, the elements
    /// keep their values.
    ///
    /// # Safety
    /// As for [`slice_mut`](Self::slice_mut) of all elements.
    pub unsafe fn release(&self) {
        #[cfg(target_os = "linux")]
        // SAFETY: the mapping is private and anonymous, and the caller promises that nothing reads it now.
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
        // SAFETY: the caller of `view` keeps a second handle to the tensor, so Burn's in-place kernels do not call this
        // while the engine uses the block.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, len) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let (start, len) = self.bytes();
        // SAFETY: the bytes are initialised and in bounds, and the engine writes them only between steps.
        Ok(unsafe { std::slice::from_raw_parts(start, len) })
    }
}

/// Makes the allocator keep the memory that tensors free, instead of returning it to the system. A step allocates what the
/// last one freed, and would otherwise take a page fault for every 4 KiB. Call it once in a process that trains. It has an
/// effect only with glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        // The parameters of `mallopt`, as in glibc's malloc.h.
        const TRIM_THRESHOLD: std::ffi::c_int = -1;
        const MMAP_THRESHOLD: std::ffi::c_int = -3;
        const ARENA_MAX: std::ffi::c_int = -8;
        /// Smaller allocations come from the heap, which keeps their memory.
        const LARGEST_KEPT_BYTES: std::ffi::c_int = 1 << 30;
        // SAFETY: `mallopt` may be called at any time and rejects parameters that it does not know.
        unsafe {
            mallopt(TRIM_THRESHOLD, std::ffi::c_int::MAX);
            mallopt(MMAP_THRESHOLD, LARGEST_KEPT_BYTES);
            // With one arena, memory that one thread frees can be reused by all threads.
            mallopt(ARENA_MAX, 1);
        }
    }
}

/// A tensor of `shape` over the elements of `memory` from element `offset` on, without a copy.
///
/// Keep a clone of the tensor for as long as kernels must not write the memory: Burn's in-place kernels write to a tensor
/// that has a single handle.
///
/// # Panics
/// `offset` is not a multiple of 16, or the tensor does not fit into the block.
pub fn view<const D: usize>(memory: &Arc<Memory>, offset: usize, shape: [usize; D]) -> Tensor<D> {
    let len: usize = shape.iter().product();
    assert!(offset.is_multiple_of(ALIGN / size_of::<f32>()), "offset {offset} is not on a cache line");
    assert!(offset + len <= memory.len, "a view of {len} at {offset} is outside a block of {}", memory.len);
    let window = Window { memory: memory.clone(), range: offset..offset + len };
    // SAFETY: the controller provides exactly this many initialised bytes for as long as it lives.
    let bytes = unsafe { Bytes::from_controller(Box::new(window), len * size_of::<f32>()) };
    Tensor::from_data(TensorData::from_bytes(bytes, shape, DType::F32), &super::device())
}

/// The tensor's numbers as f32 in row-major order; none if the device fails.
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
    fn a_view_shows_the_engines_writes_and_kernels_do_not_write_to_it() {
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
