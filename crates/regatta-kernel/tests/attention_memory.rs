//! Attention over 4,096 tokens needs memory for its operands, but not for the 4,096 x 4,096 scores.

use regatta_kernel::attention::{Attention, Operands};
use regatta_kernel::random::Stream;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system allocator, with a count of the bytes that are allocated now and of the peak.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    let now = ALLOCATED.fetch_add(size, Ordering::Relaxed) + size;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: all memory comes from the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn memory_is_linear_in_the_sequence() {
    let (heads, time, width) = (2, 4096, 64);
    let attention =
        Attention { batch: 1, heads, time, seen: time, width, past: Some(0), hidden: None, dropout: None };
    let all = Stream::new(1).normal(time * 3 * heads * width, 1.0);
    let gradient = Stream::new(2).normal(time * heads * width, 1.0);
    let before = ALLOCATED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let (output, sums) = attention.forward(&Operands::Fused(&all));
    let gradients = attention.backward(&Operands::Fused(&all), [&output, &sums, &gradient]);
    let peak = PEAK.load(Ordering::Relaxed) - before;
    // The last query sees all keys, so its output is a mean of many values.
    assert!(output[(time - 1) * heads * width..].iter().all(|x| x.abs() < 1.0));
    assert_eq!(gradients[0].len(), all.len());
    // Output and gradients take 8 MiB, and copies of one head on each of two threads 5 MiB. The scores of one head
    // would take 64 MiB.
    assert!((8 << 20..24 << 20).contains(&peak), "{peak} bytes");
}
