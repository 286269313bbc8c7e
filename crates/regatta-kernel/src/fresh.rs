//! Results in memory that is not set to zero first: a pass over memory less.

use std::mem::MaybeUninit;

/// `len` numbers that `write` writes.
///
/// # Safety
/// `write` writes every element.
pub(crate) unsafe fn fresh(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    write(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: there is room for them, and the caller promises that they are written.
    unsafe { out.set_len(len) };
    out
}
