//! Memory that a thread keeps from call to call.

use std::cell::RefCell;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(vec![]) };
}

/// Numbers of a cache line.
const LINE: usize = 16;

/// Runs `body` with `len` numbers of any value that begin on a cache line.
pub(super) fn with<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut numbers = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
    if numbers.len() < len + LINE {
        numbers.resize(len + LINE, 0.0);
    }
    let start = numbers.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let result = body(&mut numbers[start..start + len]);
    KEPT.with_borrow_mut(|kept| kept.push(numbers));
    result
}
