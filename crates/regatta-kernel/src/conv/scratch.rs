//! Memory that a thread reuses from call to call.

use std::cell::RefCell;

thread_local! {
    /// Buffers of the thread that are not in use.
    static UNUSED: RefCell<Vec<Vec<f32>>> = const { RefCell::new(vec![]) };
}

/// Elements of a cache line.
const LINE: usize = 16;

/// Runs `body` with `len` elements of arbitrary values. The slice starts at a cache line.
pub(super) fn with<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut numbers = UNUSED.with_borrow_mut(Vec::pop).unwrap_or_default();
    if numbers.len() < len + LINE {
        numbers.resize(len + LINE, 0.0);
    }
    let start = numbers.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let result = body(&mut numbers[start..start + len]);
    UNUSED.with_borrow_mut(|unused| unused.push(numbers));
    result
}
