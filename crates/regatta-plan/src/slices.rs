//! Parts of tensors, and copying between tensors that are cut in different ways.
//!
//! Whatever the plan, what a rank owns of a tensor is a box of it (tensor parallelism), and of that box, read row
//! by row, one range of elements (ZeRO). Both are runs of consecutive elements of the whole tensor, in ascending
//! order, so what two cuts share is found by a merge of their runs.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Part of a tensor: of its box `ranges` (one range per logical dimension `dims`), the elements `flat` in row-major
/// order of the box. Tensor parallelism makes the box, ZeRO the flat range.
///
/// ```
/// use regatta_plan::{Piece, copy_pieces};
/// // The right half of a 2 x 4 tensor, and of that the last three elements.
/// let part = Piece::boxed(&[2, 4], &[0..2, 2..4]).narrow(1..4);
/// let mut whole = [0; 8];
/// assert_eq!(copy_pieces(&part, &[1, 2, 3], &Piece::whole(&[2, 4]), &mut whole), 3);
/// assert_eq!(whole, [0, 0, 0, 1, 0, 0, 2, 3]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Piece {
    /// Sizes of the tensor's logical dimensions. They may be finer than its stored shape (heads within a width).
    pub dims: Vec<usize>,
    /// The box: one range per dimension.
    pub ranges: Vec<Range<usize>>,
    /// Elements of the box, counted in row-major order.
    pub flat: Range<usize>,
}

/// Consecutive elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Place of the first one in the whole tensor.
    pub global: usize,
    /// Place of the first one in the piece.
    pub local: usize,
    /// How many.
    pub len: usize,
}

impl Run {
    /// Place in the whole tensor behind the last one.
    pub fn end(&self) -> usize {
        self.global + self.len
    }
}

impl Piece {
    /// All of a tensor.
    pub fn whole(dims: &[usize]) -> Self {
        let ranges: Vec<_> = dims.iter().map(|&dim| 0..dim).collect();
        Self::boxed(dims, &ranges)
    }

    /// A box of a tensor.
    pub fn boxed(dims: &[usize], ranges: &[Range<usize>]) -> Self {
        let mut piece = Self { dims: dims.to_vec(), ranges: ranges.to_vec(), flat: 0..0 };
        piece.flat = 0..piece.box_len();
        piece
    }

    /// The elements `flat` of this piece, counted from its first one.
    pub fn narrow(&self, flat: Range<usize>) -> Self {
        let start = self.flat.start;
        Self { flat: start + flat.start..start + flat.end, ..self.clone() }
    }

    /// Elements of the piece.
    pub fn len(&self) -> usize {
        self.flat.len()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.flat.is_empty()
    }

    /// Elements of the box.
    pub fn box_len(&self) -> usize {
        self.ranges.iter().map(Range::len).product()
    }

    /// Elements of the whole tensor.
    pub fn total(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether the box lies in the tensor and the flat range in the box, and all can be counted. Everything else
    /// here takes valid pieces; check those that come from a file.
    pub fn is_valid(&self) -> bool {
        let count = self.dims.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim.max(1)));
        let inside = |(range, &dim): (&Range<usize>, &usize)| range.start <= range.end && range.end <= dim;
        count.is_some()
            && self.dims.len() == self.ranges.len()
            && self.ranges.iter().zip(&self.dims).all(inside)
            && self.flat.start <= self.flat.end
            && self.flat.end <= self.box_len()
    }

    /// The piece as runs of consecutive elements, ascending, each as long as can be.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        // Dimensions from `inner` on are there wholly, so one run goes through them and the range before them.
        let whole = |&i: &usize| self.ranges[i].len() == self.dims[i];
        let inner = (0..self.dims.len()).rev().take_while(whole).last().unwrap_or(self.dims.len());
        let cut = inner.saturating_sub(1);
        let stride: usize = self.dims[inner..].iter().product();
        let longest: usize = self.ranges[cut..].iter().map(Range::len).product();
        let mut local = self.flat.start;
        std::iter::from_fn(move || {
            if local >= self.flat.end {
                return None;
            }
            let (mut row, within) = (local / longest, local % longest);
            let (mut global, mut step) = (within, stride);
            if inner > 0 {
                global += self.ranges[cut].start * step;
                step *= self.dims[cut];
            }
            for i in (0..cut).rev() {
                let range = &self.ranges[i];
                global += (range.start + row % range.len()) * step;
                row /= range.len();
                step *= self.dims[i];
            }
            let len = (longest - within).min(self.flat.end - local);
            let run = Run { global, local: local - self.flat.start, len };
            local += len;
            Some(run)
        })
    }

    /// How many elements it shares with `other`.
    pub fn shared(&self, other: &Self) -> usize {
        let mut shared = 0;
        merge(self, other, |_, _, len| shared += len);
        shared
    }
}

/// Copies what `from` and `to` share, by a merge of their runs; returns how many elements were copied. Both are of
/// one tensor, though they may factor its shape differently.
///
/// # Panics
/// When `src` or `dst` is not as long as its piece.
pub fn copy<T: Copy>(from: &Piece, src: &[T], to: &Piece, dst: &mut [T]) -> usize {
    assert_eq!(src.len(), from.len(), "the source is not as long as its piece");
    assert_eq!(dst.len(), to.len(), "the target is not as long as its piece");
    let mut copied = 0;
    merge(from, to, |read, write, len| {
        dst[write..write + len].copy_from_slice(&src[read..read + len]);
        copied += len;
    });
    copied
}

/// Calls `each(place in a, place in b, length)` for every run that both have.
fn merge(a: &Piece, b: &Piece, mut each: impl FnMut(usize, usize, usize)) {
    let (mut left, mut right) = (a.runs(), b.runs());
    let (mut x, mut y) = (left.next(), right.next());
    while let (Some(p), Some(q)) = (x, y) {
        let (start, end) = (p.global.max(q.global), p.end().min(q.end()));
        if start < end {
            each(p.local + start - p.global, q.local + start - q.global, end - start);
        }
        if p.end() <= q.end() {
            x = left.next();
        } else {
            y = right.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Where each element of `piece` is in the whole tensor, element by element.
    fn places(piece: &Piece) -> Vec<usize> {
        let mut places = vec![];
        for global in 0..piece.total() {
            let mut rest = global;
            let mut inside = true;
            for (dim, range) in piece.dims.iter().zip(&piece.ranges).rev() {
                inside &= range.contains(&(rest % dim));
                rest /= dim;
            }
            if inside {
                places.push(global);
            }
        }
        places[piece.flat.clone()].to_vec()
    }

    fn sub_range(dim: usize) -> impl Strategy<Value = Range<usize>> {
        // Whole ones often: they merge dimensions into longer runs.
        prop_oneof![Just(0..dim), (0..=dim, 0..=dim).prop_map(|(a, b)| a.min(b)..a.max(b))]
    }

    fn piece(dims: Vec<usize>) -> impl Strategy<Value = Piece> {
        let ranges: Vec<_> = dims.iter().map(|&dim| sub_range(dim)).collect();
        (Just(dims), ranges).prop_flat_map(|(dims, ranges)| {
            let whole = Piece::boxed(&dims, &ranges);
            sub_range(whole.len()).prop_map(move |flat| whole.narrow(flat))
        })
    }

    fn dims() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(1usize..6, 0..=4)
    }

    proptest! {
        #[test]
        fn runs_are_the_elements_in_order_and_as_long_as_can_be(piece in dims().prop_flat_map(piece)) {
            prop_assert!(piece.is_valid());
            let runs: Vec<_> = piece.runs().collect();
            let all: Vec<usize> = runs.iter().flat_map(|run| run.global..run.end()).collect();
            prop_assert_eq!(&all, &places(&piece));
            let mut local = 0;
            for run in &runs {
                prop_assert!(run.len > 0);
                prop_assert_eq!(run.local, local);
                local += run.len;
            }
            prop_assert_eq!(local, piece.len());
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end() < pair[1].global);
            }
        }

        #[test]
        fn copies_agree_with_one_element_at_a_time(
            (from, to) in dims().prop_flat_map(|dims| (piece(dims.clone()), piece(dims))),
        ) {
            let src: Vec<usize> = places(&from);
            let mut dst = vec![usize::MAX; to.len()];
            let copied = copy(&from, &src, &to, &mut dst);
            let mut expected = 0;
            for (place, found) in places(&to).into_iter().zip(&dst) {
                let there = src.contains(&place);
                expected += usize::from(there);
                prop_assert_eq!(*found, if there { place } else { usize::MAX });
            }
            prop_assert_eq!(copied, expected);
            prop_assert_eq!(from.shared(&to), expected);
        }

        #[test]
        fn finer_dimensions_are_the_same_tensor(
            (rows, heads, width) in (1usize..5, 1usize..5, 1usize..5), parts in 1usize..4,
        ) {
            // [rows, 3 * heads * width], cut by heads and stored as [rows, 3, heads, width].
            let coarse = Piece::whole(&[rows, 3 * heads * width]);
            let dims = [rows, 3, heads, width];
            let src: Vec<usize> = (0..coarse.len()).collect();
            let mut back = vec![usize::MAX; coarse.len()];
            for part in 0..parts {
                let mine = heads * part / parts..heads * (part + 1) / parts;
                let fine = Piece::boxed(&dims, &[0..rows, 0..3, mine, 0..width]);
                let mut held = vec![usize::MAX; fine.len()];
                prop_assert_eq!(copy(&coarse, &src, &fine, &mut held), fine.len());
                prop_assert_eq!(copy(&fine, &held, &coarse, &mut back), fine.len());
            }
            prop_assert_eq!(back, src);
        }

        #[test]
        fn uneven_cuts_go_there_and_back(dims in dims(), box_parts in 1usize..4, flat_parts in 1usize..5) {
            let cut = |len: usize, part: usize, parts: usize| len * part / parts..len * (part + 1) / parts;
            let whole = Piece::whole(&dims);
            let src: Vec<usize> = (0..whole.len()).collect();
            let mut back = vec![usize::MAX; whole.len()];
            // Along the last dimension, then flat ranges that cut rows.
            let box_parts = if dims.is_empty() { 1 } else { box_parts };
            for part in 0..box_parts {
                let mut ranges = whole.ranges.clone();
                if let Some(last) = ranges.last_mut() {
                    *last = cut(last.end, part, box_parts);
                }
                let boxed = Piece::boxed(&dims, &ranges);
                for shard in 0..flat_parts {
                    let piece = boxed.narrow(cut(boxed.len(), shard, flat_parts));
                    let mut held = vec![0; piece.len()];
                    prop_assert_eq!(copy(&whole, &src, &piece, &mut held), piece.len());
                    copy(&piece, &held, &whole, &mut back);
                }
            }
            prop_assert_eq!(back, src);
        }
    }

    #[test]
    fn by_hand() {
        let scalar = Piece::whole(&[]);
        assert_eq!(scalar.runs().collect::<Vec<_>>(), [Run { global: 0, local: 0, len: 1 }]);
        let piece = Piece::boxed(&[3, 4], &[1..3, 1..3]).narrow(1..4);
        let runs: Vec<_> = piece.runs().collect();
        assert_eq!(runs, [Run { global: 6, local: 0, len: 1 }, Run { global: 9, local: 1, len: 2 }]);
        assert_eq!((piece.len(), piece.box_len(), piece.total()), (3, 4, 12));
    }

    #[test]
    fn foreign_pieces_are_told() {
        let good = Piece::boxed(&[3, 4], &[1..3, 1..3]);
        assert!(good.is_valid());
        let bad = [
            Piece { dims: vec![3], ..good.clone() },
            Piece { ranges: vec![1..3, 1..5], ..good.clone() },
            #[allow(clippy::reversed_empty_ranges)]
            Piece { ranges: vec![1..3, 3..1], ..good.clone() },
            Piece { flat: 0..5, ..good.clone() },
            #[allow(clippy::reversed_empty_ranges)]
            Piece { flat: 2..1, ..good.clone() },
            Piece { dims: vec![usize::MAX, 3], ranges: vec![0..0, 0..0], flat: 0..0 },
        ];
        for piece in bad {
            assert!(!piece.is_valid(), "{piece:?}");
        }
    }
}
