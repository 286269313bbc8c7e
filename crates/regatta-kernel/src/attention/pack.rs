//! Memory that a thread uses again and again, and copies into it.

use super::view::Rows;
use std::cell::Cell;

/// A cache line, which is also the longest vector: no vector of memory made of them lies across two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(vec![]) };
}

/// This thread's memory, as long as it is used. (A guard: a closure would not be compiled for the vector unit of the
/// function that it is in.)
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    pub(super) fn take() -> Self {
        Self(SCRATCH.take())
    }

    /// Parts of these lengths, of whatever content.
    pub(super) fn parts<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let lines = &mut self.0;
        let wanted: usize = lens.iter().map(|len| len.div_ceil(16)).sum();
        if lines.len() < wanted {
            // Without the copy of a `resize`.
            *lines = vec![Line([0.0; 16]); wanted];
        }
        // SAFETY: a line is 16 numbers and nothing else.
        let mut rest =
            unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), 16 * lines.len()) };
        lens.map(|len| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(16));
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

/// Rows `begin..begin + count` times `factor`, each as `out` is wide for one; zeros to their right, and in the rows of
/// `out` behind.
#[inline(always)]
pub(super) fn copy(
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

/// Rows `begin..begin + count` as columns of panels that are `panel` columns wide, `[panels, width, panel]`; zeros behind
/// the last.
#[inline(always)]
pub(super) fn transpose(
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
        while column + SQUARE <= columns {
            let mut block: [&[f32]; SQUARE] = [&[]; SQUARE];
            for (i, row) in block.iter_mut().enumerate() {
                *row = rows.row(begin + first + column + i, width);
            }
            let mut d = 0;
            while d + SQUARE <= width {
                let mut square = [[0.0f32; SQUARE]; SQUARE];
                for (to, from) in square.iter_mut().zip(block) {
                    to.copy_from_slice(&from[d..d + SQUARE]);
                }
                for i in 0..SQUARE {
                    let mut turned = [0.0f32; SQUARE];
                    for (to, from) in turned.iter_mut().zip(&square) {
                        *to = from[i];
                    }
                    out[(d + i) * panel + column..][..SQUARE].copy_from_slice(&turned);
                }
                d += SQUARE;
            }
            for d in d..width {
                for (i, row) in block.iter().enumerate() {
                    out[d * panel + column + i] = row[d];
                }
            }
            column += SQUARE;
        }
        for column in column..columns {
            for (d, from) in rows.row(begin + first + column, width).iter().enumerate() {
                out[d * panel + column] = *from;
            }
        }
    }
}

/// Edge of the squares that are transposed in registers.
const SQUARE: usize = 8;
