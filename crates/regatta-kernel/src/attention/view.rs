//! Where queries, keys and values lie, and where their gradients go.

use super::Attention;
use std::mem::MaybeUninit;

/// Distances in a tensor `[batch, heads, time, width]`, in numbers. Those of a row (`width`) are side by side.
#[derive(Debug, Clone, Copy)]
pub struct Strides {
    /// From a sequence to the next.
    pub batch: usize,
    /// From a head to the next.
    pub head: usize,
    /// From a time to the next.
    pub time: usize,
}

impl Strides {
    /// Of one of the parts of `[batch, time, parts * heads * width]`, as a projection leaves them.
    pub fn projected(time: usize, parts: usize, heads: usize, width: usize) -> Self {
        let row = parts * heads * width;
        Self { batch: time * row, head: width, time: row }
    }

    /// Of `[batch, heads, time, width]`.
    pub fn apart(heads: usize, time: usize, width: usize) -> Self {
        Self { batch: heads * time * width, head: time * width, time: width }
    }
}

/// A tensor `[batch, heads, time, width]` in whatever order.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    values: &'a [f32],
    strides: Strides,
}

/// Queries, keys and values of an [`Attention`].
#[derive(Debug, Clone, Copy)]
pub enum Operands<'a> {
    /// Of one projection: `[batch, time, 3 * heads * width]`.
    Fused(&'a [f32]),
    /// Of two: queries `[batch, time, heads * width]`, keys and values `[batch, seen, 2 * heads * width]`.
    Cross(&'a [f32], &'a [f32]),
    /// Each by itself.
    Apart([View<'a>; 3]),
}

impl<'a> View<'a> {
    /// The tensor that begins where `values` begins.
    pub fn new(values: &'a [f32], strides: Strides) -> Self {
        Self { values, strides }
    }

    /// Itself, if all `time` rows of all heads lie within.
    pub(super) fn checked(self, sizes: &Attention<'_>, time: usize) -> Self {
        let Attention { batch, heads, width, .. } = *sizes;
        if batch * heads * time * width > 0 {
            let Strides { batch: by_batch, head, time: by_time } = self.strides;
            let last = (batch - 1) * by_batch + (heads - 1) * head + (time - 1) * by_time;
            assert!(last + width <= self.values.len(), "an operand of attention is too short");
        }
        self
    }

    pub(super) fn rows(&self, batch: usize, head: usize) -> Rows<'a> {
        let begin = batch * self.strides.batch + head * self.strides.head;
        Rows { values: self.values.get(begin..).unwrap_or_default(), stride: self.strides.time }
    }
}

impl<'a> Operands<'a> {
    /// Queries, keys and values.
    pub(super) fn views(&self, sizes: &Attention<'_>) -> [View<'a>; 3] {
        let Attention { time, seen, heads, width, .. } = *sizes;
        let row = heads * width;
        let at = |values: &'a [f32], part: usize, strides| {
            View::new(values.get(part * row..).unwrap_or_default(), strides)
        };
        let [queries, keys, values] = match *self {
            Self::Fused(all) => {
                assert_eq!(time, seen, "queries and keys of one projection are as many");
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

    /// Room for gradients, and where those of queries, keys and values go in it.
    pub(super) fn gradients(&self, sizes: &Attention<'_>) -> (Vec<Room>, [Target; 3]) {
        let Attention { batch, time, seen, heads, width, .. } = *sizes;
        let row = heads * width;
        match self {
            Self::Fused(_) => {
                let mut all = Room::new(batch * time * 3 * row);
                let strides = Strides::projected(time, 3, heads, width);
                let targets = [0, 1, 2].map(|part| Target::new(&mut all, part * row, strides, width));
                (vec![all], targets)
            }
            Self::Cross(..) => {
                let [mut queries, mut others] = [batch * time * row, batch * seen * 2 * row].map(Room::new);
                let strides = Strides::projected(seen, 2, heads, width);
                let [keys, values] = [0, 1].map(|part| Target::new(&mut others, part * row, strides, width));
                let strides = Strides::projected(time, 1, heads, width);
                let targets = [Target::new(&mut queries, 0, strides, width), keys, values];
                (vec![queries, others], targets)
            }
            Self::Apart(_) => {
                let mut rooms = [time, seen, seen].map(|time| Room::new(batch * time * row));
                let mut i = 0;
                let targets = rooms.each_mut().map(|room| {
                    let time = if i == 0 { time } else { seen };
                    i += 1;
                    Target::new(room, 0, Strides::apart(heads, time, width), width)
                });
                (rooms.into(), targets)
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
    /// Row `i`, of which `width` numbers are wanted.
    #[inline(always)]
    pub(super) fn row(&self, i: usize, width: usize) -> &'a [f32] {
        &self.values[i * self.stride..][..width]
    }
}

/// Memory for `len` numbers that have yet to be written: what is written once need not be zeroed before.
pub(super) struct Room {
    values: Vec<f32>,
    len: usize,
}

impl Room {
    pub(super) fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len }
    }

    /// The numbers.
    ///
    /// # Safety
    /// All `len` have been written.
    pub(super) unsafe fn written(mut self) -> Vec<f32> {
        // SAFETY: the vector was made with this capacity, and the caller says that they are written.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// A tensor `[batch, heads, time, width]` in a [`Room`], that threads may write head by head.
pub(super) struct Target {
    first: *mut f32,
    strides: Strides,
    width: usize,
}

// SAFETY: a pointer that is only followed in `rows`, whose callers answer for it.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// From number `begin` of the room on.
    pub(super) fn new(room: &mut Room, begin: usize, strides: Strides, width: usize) -> Self {
        // The parts of an empty tensor begin nowhere; none is written.
        Self { first: room.values.as_mut_ptr().wrapping_add(begin), strides, width }
    }

    /// The rows of a head.
    ///
    /// # Safety
    /// Batch, head and the rows that are written exist in the room, which outlives the result; nobody has the same rows
    /// of the same room at the same time.
    pub(super) unsafe fn rows(&self, batch: usize, head: usize) -> RowsMut {
        let begin = batch * self.strides.batch + head * self.strides.head;
        RowsMut { first: self.first.wrapping_add(begin), stride: self.strides.time, width: self.width }
    }
}

/// Rows to be written, of one head of one sequence.
pub(super) struct RowsMut {
    first: *mut f32,
    stride: usize,
    width: usize,
}

impl RowsMut {
    /// Writes `values` times `factor` into row `i`.
    ///
    /// # Safety
    /// The row exists.
    #[inline(always)]
    pub(super) unsafe fn write(&mut self, i: usize, values: &[f32], factor: f32) {
        // SAFETY: the row exists, and whoever made this says that nobody else has it.
        let row = unsafe {
            let first = self.first.add(i * self.stride).cast::<MaybeUninit<f32>>();
            std::slice::from_raw_parts_mut(first, self.width)
        };
        for (to, from) in row.iter_mut().zip(&values[..self.width]) {
            to.write(from * factor);
        }
    }
}
