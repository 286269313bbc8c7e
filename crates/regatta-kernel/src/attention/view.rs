//! Memory layouts of queries, keys and values, and of their gradients.

use super::Attention;
use std::mem::MaybeUninit;

/// Distances in elements in a tensor with the logical shape `[batch, heads, time, width]`. The elements of a row
/// (`width`) are consecutive.
#[derive(Debug, Clone, Copy)]
pub struct Strides {
    /// From one sequence to the next.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one time to the next.
    pub time: usize,
}

impl Strides {
    /// The strides of one of the parts of `[batch, time, parts * heads * width]`, the output of a fused projection.
    pub fn projected(time: usize, parts: usize, heads: usize, width: usize) -> Self {
        let row = parts * heads * width;
        Self { batch: time * row, head: width, time: row }
    }

    /// The strides of a contiguous `[batch, heads, time, width]`.
    pub fn apart(heads: usize, time: usize, width: usize) -> Self {
        Self { batch: heads * time * width, head: time * width, time: width }
    }
}

/// A tensor with the logical shape `[batch, heads, time, width]` and any strides.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    values: &'a [f32],
    strides: Strides,
}

/// Queries, keys and values of an [`Attention`].
#[derive(Debug, Clone, Copy)]
pub enum Operands<'a> {
    /// From one projection: `[batch, time, 3 * heads * width]`, with queries, keys and values in this order.
    Fused(&'a [f32]),
    /// From two projections: queries `[batch, time, heads * width]`, and keys and values `[batch, seen, 2 * heads *
    /// width]`.
    Cross(&'a [f32], &'a [f32]),
    /// Queries, keys and values in three views.
    Apart([View<'a>; 3]),
}

impl<'a> View<'a> {
    /// A tensor whose first element is the first of `values`.
    pub fn new(values: &'a [f32], strides: Strides) -> Self {
        Self { values, strides }
    }

    /// Returns the view after checking that all `time` rows of all heads are within the slice.
    pub(super) fn checked(self, sizes: &Attention<'_>, time: usize) -> Self {
        let Attention { batch, heads, width, .. } = *sizes;
        if batch * heads * time * width > 0 {
            let Strides { batch: by_batch, head, time: by_time } = self.strides;
            let last = (batch - 1) * by_batch + (heads - 1) * head + (time - 1) * by_time;
            assert!(last + width <= self.values.len(), "an operand of attention is too short for its sizes");
        }
        self
    }

    pub(super) fn rows(&self, batch: usize, head: usize) -> Rows<'a> {
        let begin = batch * self.strides.batch + head * self.strides.head;
        Rows { values: self.values.get(begin..).unwrap_or_default(), stride: self.strides.time }
    }
}

impl<'a> Operands<'a> {
    /// The views of queries, keys and values.
    pub(super) fn views(&self, sizes: &Attention<'_>) -> [View<'a>; 3] {
        let Attention { time, seen, heads, width, .. } = *sizes;
        let row = heads * width;
        let at = |values: &'a [f32], part: usize, strides| {
            View::new(values.get(part * row..).unwrap_or_default(), strides)
        };
        let [queries, keys, values] = match *self {
            Self::Fused(all) => {
                assert_eq!(time, seen, "with one projection there must be as many queries as keys");
                let strides = Strides::projected(time, 3, heads, width);
                [at(all, 0, strides), at(all, 1, strides), at(all, 2, strides)]
            }
            Self::Cross(queries, others) => {
                let strides = Strides::projected(seen, 2, heads, width);
                let queries = View::new(queries, Strides::projected(time, 1, heads, width));
                [queries, at(others, 0, strides), at(others, 1, strides)]
            }
            Self::Apart(views) => views,
        };
        [queries.checked(sizes, time), keys.checked(sizes, seen), values.checked(sizes, seen)]
    }

    /// Buffers for the gradients, and the places in them for those of queries, keys and values.
    pub(super) fn gradients(&self, sizes: &Attention<'_>) -> (Vec<UninitBuffer>, [Target; 3]) {
        let Attention { batch, time, seen, heads, width, .. } = *sizes;
        let row = heads * width;
        match self {
            Self::Fused(_) => {
                let mut all = UninitBuffer::new(batch * time * 3 * row);
                let strides = Strides::projected(time, 3, heads, width);
                let targets = [0, 1, 2].map(|part| Target::new(&mut all, part * row, strides, width));
                (vec![all], targets)
            }
            Self::Cross(..) => {
                let [mut queries, mut others] =
                    [batch * time * row, batch * seen * 2 * row].map(UninitBuffer::new);
                let strides = Strides::projected(seen, 2, heads, width);
                let [keys, values] = [0, 1].map(|part| Target::new(&mut others, part * row, strides, width));
                let strides = Strides::projected(time, 1, heads, width);
                let targets = [Target::new(&mut queries, 0, strides, width), keys, values];
                (vec![queries, others], targets)
            }
            Self::Apart(_) => {
                let mut buffers = [time, seen, seen].map(|time| UninitBuffer::new(batch * time * row));
                let mut i = 0;
                let targets = buffers.each_mut().map(|buffer| {
                    let time = if i == 0 { time } else { seen };
                    i += 1;
                    Target::new(buffer, 0, Strides::apart(heads, time, width), width)
                });
                (buffers.into(), targets)
            }
        }
    }
}

/// The rows of one head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// The first `width` elements of row `i`.
    #[inline(always)]
    pub(super) fn row(&self, i: usize, width: usize) -> &'a [f32] {
        &self.values[i * self.stride..][..width]
    }
}

/// Memory for `len` elements that are not initialised: zeroing it first would be a pass over memory more.
pub(super) struct UninitBuffer {
    values: Vec<f32>,
    len: usize,
}

impl UninitBuffer {
    pub(super) fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len }
    }

    /// The elements.
    ///
    /// # Safety
    /// All `len` elements have been written.
    pub(super) unsafe fn assume_init(mut self) -> Vec<f32> {
        // SAFETY: the vector has this capacity, and the caller guarantees that all elements are written.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// A tensor `[batch, heads, time, width]` in a [`UninitBuffer`], to which threads may write head by head.
pub(super) struct Target {
    first: *mut f32,
    strides: Strides,
    width: usize,
}

// SAFETY: the pointer is dereferenced only through `rows`, whose callers guarantee that no other thread uses the same
// rows.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The tensor that starts at element `begin` of the buffer.
    pub(super) fn new(buffer: &mut UninitBuffer, begin: usize, strides: Strides, width: usize) -> Self {
        // In an empty tensor the pointer may be outside of the buffer; then it is never dereferenced.
        Self { first: buffer.values.as_mut_ptr().wrapping_add(begin), strides, width }
    }

    /// The rows of a head.
    ///
    /// # Safety
    /// The batch, the head and the rows that are written exist in the buffer. The buffer outlives the result, and
    /// nothing else accesses the same rows.
    pub(super) unsafe fn rows(&self, batch: usize, head: usize) -> RowsMut {
        let begin = batch * self.strides.batch + head * self.strides.head;
        RowsMut { first: self.first.wrapping_add(begin), stride: self.strides.time, width: self.width }
    }
}

/// The rows of one head of one sequence, for writing.
pub(super) struct RowsMut {
    first: *mut f32,
    stride: usize,
    width: usize,
}

impl RowsMut {
    /// Writes `values` times `factor` to row `i`.
    ///
    /// # Safety
    /// The row exists.
    #[inline(always)]
    pub(super) unsafe fn write(&mut self, i: usize, values: &[f32], factor: f32) {
        // SAFETY: the row exists, and the caller of `Target::rows` guarantees that nothing else accesses it.
        let row = unsafe {
            let first = self.first.add(i * self.stride).cast::<MaybeUninit<f32>>();
            std::slice::from_raw_parts_mut(first, self.width)
        };
        for (to, from) in row.iter_mut().zip(&values[..self.width]) {
            to.write(from * factor);
        }
    }
}
