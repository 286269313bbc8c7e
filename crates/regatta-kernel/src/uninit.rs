//! Results in memory that is not zeroed first, which saves one pass over it.

use std::mem::MaybeUninit;

/// A vector of `len` elements that `write` fills.
///
/// # Safety
/// `write` must initialise every element.
pub(crate) unsafe fn filled(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    write(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and the caller guarantees that all elements are initialised.
    unsafe { out.set_len(len) };
    out
}
