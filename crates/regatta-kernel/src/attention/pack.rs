//! Memory that a thread reuses from call to call, and packing of operands into it.

use super::view::Rows;
use std::cell::Cell;

/// A cache line, which is also the longest vector. In memory made of them, no aligned vector crosses a line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Elements of a cache line.
const LINE: usize = 16;

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(vec![]) };
}

/// The thread's memory, while it is in use. This is a guard and not a function that takes a closure, because the
/// closure would not be compiled for the vector unit of the function around it.
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    pub(super) fn take() -> Self {
        Self(SCRATCH.take())
    }

    /// Slices of these lengths. Their content is arbitrary.
    pub(super) fn parts<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let lines = &mut self.0;
        let needed: usize = lens.iter().map(|len| len.div_ceil(LINE)).sum();
        if lines.len() < needed {
            // Not `resize`, which would copy the old content.
            *lines = vec![Line([0.0; LINE]); needed];
        }
        // SAFETY: a line consists of `LINE` elements without padding.
        let mut rest =
            unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), LINE * lines.len()) };
        lens.map(|len| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(LINE));
            rest = others;
            &mut part[..len]
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.0));
    }
}

/// Copies the rows `begin..begin + count` of `width` elements times `factor` to `out`, whose rows have `row`
/// elements. The rest of each row and the rows after them are filled with zeros.
#[inline(always)]
pub(super) fn copy_rows(
    rows: Rows<'_>,
    begin: usize,
    count: usize,
    width: usize,
    factor: f32,
    out: &mut [f32],
    row: usize,
) {
    let (copied, rest) = out.split_at_mut(count * row);
    for (i, out) in copied.chunks_exact_mut(row).enumerate() {
        let (numbers, padding) = out.split_at_mut(width);
        for (to, from) in numbers.iter_mut().zip(rows.row(begin + i, width)) {
            *to = from * factor;
        }
        padding.fill(0.0);
    }
    rest.fill(0.0);
}

/// Copies the rows `begin..begin + count` to the columns of panels that are `panel` columns wide, `[panels, width,
/// panel]`. Columns after the last are filled with zeros.
#[inline(always)]
pub(super) fn copy_as_columns(
    rows: Rows<'_>,
    begin: usize,
    count: usize,
    width: usize,
    out: &mut [f32],
    panel: usize,
) {
    for (at, out) in out.chunks_exact_mut(width * panel).enumerate() {
        let first = (at * panel).min(count);
        let columns = (count - first).min(panel);
        if columns < panel {
            out.fill(0.0);
        }
        let mut column = 0;
        while column + 4 <= columns {
            let at = begin + first + column;
            let [a, b] = [rows.row(at, width).as_chunks::<4>(), rows.row(at + 1, width).as_chunks::<4>()];
            let [c, d] = [rows.row(at + 2, width).as_chunks::<4>(), rows.row(at + 3, width).as_chunks::<4>()];
            let mut to = column;
            for (((a, b), c), d) in a.0.iter().zip(b.0).zip(c.0).zip(d.0) {
                let [a, b, c, d] = transpose_4x4([*a, *b, *c, *d]);
                out[to..to + 4].copy_from_slice(&a);
                out[to + panel..][..4].copy_from_slice(&b);
                out[to + 2 * panel..][..4].copy_from_slice(&c);
                out[to + 3 * panel..][..4].copy_from_slice(&d);
                to += 4 * panel;
            }
            for (((a, b), c), d) in a.1.iter().zip(b.1).zip(c.1).zip(d.1) {
                out[to..to + 4].copy_from_slice(&[*a, *b, *c, *d]);
                to += panel;
            }
            column += 4;
        }
        for column in column..columns {
            for (d, from) in rows.row(begin + first + column, width).iter().enumerate() {
                out[d * panel + column] = *from;
            }
        }
    }
}

/// Transposes a square.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_4x4(square: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use pulp::bytemuck::cast;
    use std::arch::x86_64::{_mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
    let [a, b, c, d] = [cast(square[0]), cast(square[1]), cast(square[2]), cast(square[3])];
    // The compiler does not find these instructions by itself: it would move single elements.
    // SAFETY: SSE is part of x86-64.
    let [a, b, c, d] = unsafe {
        let (low, high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (low2, high2) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        [
            _mm_movelh_ps(low, low2),
            _mm_movehl_ps(low2, low),
            _mm_movelh_ps(high, high2),
            _mm_movehl_ps(high2, high),
        ]
    };
    [cast(a), cast(b), cast(c), cast(d)]
}

/// Transposes a square.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose_4x4(square: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    let mut transposed = square;
    for i in 0..4 {
        for j in 0..4 {
            transposed[i][j] = square[j][i];
        }
    }
    transposed
}
