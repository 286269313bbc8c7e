//! Attention of 4,096 tokens takes memory for its operands and not for their 4,096 x 4,096 scores.

use regatta_kernel::attention::{Attention, Operands};
use regatta_kernel::random::Stream;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, and how many bytes are out, and were at most.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    let now = NOW.fetch_add(size, Ordering::Relaxed) + size;
    MOST.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: all memory is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
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
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let (output, sums) = attention.forward(&Operands::Fused(&all));
    let gradients = attention.backward(&Operands::Fused(&all), [&output, &sums, &gradient]);
    let most = MOST.load(Ordering::Relaxed) - before;
    // The last query saw everything; its weights sum up to 1.
    assert!(output[(time - 1) * heads * width..].iter().all(|x| x.abs() < 1.0));
    assert_eq!(gradients[0].len(), all.len());
    // Output and gradients are 8 MiB, and each of two threads has copies of one head: 5 MiB. Scores would be 64 MiB a head.
    assert!((8 << 20..24 << 20).contains(&most), "{most} bytes");
}
