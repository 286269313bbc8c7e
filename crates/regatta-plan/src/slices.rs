//! Parts of tensors, and copying between tensors that are split in different ways.
//!
//! With any plan, the part of a tensor that a rank owns is a box (tensor parallelism), or one range of that box's
//! elements in row-major order (ZeRO). Both consist of runs of consecutive elements of the whole tensor, in ascending
//! order. So merging the runs of two pieces finds the elements that both have.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Part of a tensor: the elements `flat` of the box `ranges`. The box has one range per logical dimension in `dims`,
/// and `flat` counts its elements in row-major order. Tensor parallelism determines the box, and ZeRO the flat range.
///
/// ```
/// use regatta_plan::{Piece, copy_pieces};
/// // The last three elements of the right half of a 2 x 4 tensor.
/// let part = Piece::boxed(&[2, 4], &[0..2, 2..4]).narrow(1..4);
/// let mut whole = [0; 8];
/// assert_eq!(copy_pieces(&part, &[1, 2, 3], &Piece::whole(&[2, 4]), &mut whole), 3);
/// assert_eq!(whole, [0, 0, 0, 1, 0, 0, 2, 3]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Piece {
    /// Sizes of the tensor's logical dimensions. One stored dimension may be several of these (as heads within a
    /// width).
    pub dims: Vec<usize>,
    /// The box: one range per dimension.
    pub ranges: Vec<Range<usize>>,
    /// The elements of the box that belong to the piece, counted in row-major order.
    pub flat: Range<usize>,
}

/// Consecutive elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the first element in the whole tensor.
    pub global: usize,
    /// Index of the first element in the piece.
    pub local: usize,
    /// The number of elements.
    pub len: usize,
}

impl Run {
    /// Index in the whole tensor after the last element.
    pub fn end(&self) -> usize {
        self.global + self.len
    }
}

impl Piece {
    /// The whole tensor with these dimensions.
    pub fn whole(dims: &[usize]) -> Self {
        let ranges: Vec<_> = dims.iter().map(|&dim| 0..dim).collect();
        Self::boxed(dims, &ranges)
    }

    /// The box `ranges` of a tensor with the dimensions `dims`: one range per dimension.
    pub fn boxed(dims: &[usize], ranges: &[Range<usize>]) -> Self {
        let mut piece = Self { dims: dims.to_vec(), ranges: ranges.to_vec(), flat: 0..0 };
        piece.flat = 0..piece.box_len();
        piece
    }

    /// The same part of the `index`-th of `count` such tensors, one after the other.
    pub fn stacked(&self, count: usize, index: usize) -> Self {
        let prepend =
            |first: Range<usize>| std::iter::once(first).chain(self.ranges.iter().cloned()).collect();
        let dims = std::iter::once(count).chain(self.dims.iter().copied()).collect();
        Self { dims, ranges: prepend(index..index + 1), flat: self.flat.clone() }
    }

    /// The elements `flat` of this piece, counted from the piece's first element.
    pub fn narrow(&self, flat: Range<usize>) -> Self {
        let start = self.flat.start;
        Self { flat: start + flat.start..start + flat.end, ..self.clone() }
    }

    /// The number of elements of the piece.
    pub fn len(&self) -> usize {
        self.flat.len()
    }

    /// Whether the piece has no elements.
    pub fn is_empty(&self) -> bool {
        self.flat.is_empty()
    }

    /// The number of elements of the box.
    pub fn box_len(&self) -> usize {
        self.ranges.iter().map(Range::len).product()
    }

    /// The number of elements of the whole tensor.
    pub fn total(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether the box is within the tensor, the flat range is within the box, and the number of elements does not
    /// overflow. The other functions expect valid pieces, so check a piece that was read from a file.
    pub fn is_valid(&self) -> bool {
        let count = self.dims.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim.max(1)));
        let inside = |(range, &dim): (&Range<usize>, &usize)| range.start <= range.end && range.end <= dim;
        count.is_some()
            && self.dims.len() == self.ranges.len()
            && self.ranges.iter().zip(&self.dims).all(inside)
            && self.flat.start <= self.flat.end
            && self.flat.end <= self.box_len()
    }

    /// The piece as runs of consecutive elements, in ascending order and each as long as possible.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        // Dimensions from `inner` on are whole, so one run covers them and the range of the dimension before them.
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

    /// The number of elements that this piece and `other` both have.
    pub fn shared(&self, other: &Self) -> usize {
        let mut shared = 0;
        merge(self, other, |_, _, len| shared += len);
        shared
    }
}

/// Copies the elements that the pieces `from` and `to` both have, from `src` to `dst`. Returns how many were copied.
/// Both are pieces of the same tensor, but their logical dimensions may factor its shape differently.
///
/// # Panics
/// If `src` or `dst` is not as long as its piece.
pub fn copy<T: Copy>(from: &Piece, src: &[T], to: &Piece, dst: &mut [T]) -> usize {
    assert_eq!(src.len(), from.len(), "the source does not have the length of its piece");
    assert_eq!(dst.len(), to.len(), "the target does not have the length of its piece");
    let mut copied = 0;
    merge(from, to, |read, write, len| {
        dst[write..write + len].copy_from_slice(&src[read..read + len]);
        copied += len;
    });
    copied
}

/// Calls `each(index in a, index in b, length)` for every run of elements that both pieces have.
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

    /// The index of every element of `piece` in the whole tensor, computed element by element.
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
        // Often the whole dimension, because that merges dimensions into longer runs.
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
        fn runs_cover_the_elements_in_order_and_are_as_long_as_possible(piece in dims().prop_flat_map(piece)) {
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
        fn copies_agree_with_copying_element_by_element(
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
        fn finer_dimensions_describe_the_same_tensor(
            (rows, heads, width) in (1usize..5, 1usize..5, 1usize..5), parts in 1usize..4,
        ) {
            // [rows, 3 * heads * width], split by heads with the logical dimensions [rows, 3, heads, width].
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
        fn uneven_splits_are_copied_out_and_back(dims in dims(), box_parts in 1usize..4, flat_parts in 1usize..5) {
            let cut = |len: usize, part: usize, parts: usize| len * part / parts..len * (part + 1) / parts;
            let whole = Piece::whole(&dims);
            let src: Vec<usize> = (0..whole.len()).collect();
            let mut back = vec![usize::MAX; whole.len()];
            // Boxes along the last dimension, then flat ranges that may end within a row.
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
    fn runs_of_small_pieces() {
        let scalar = Piece::whole(&[]);
        assert_eq!(scalar.runs().collect::<Vec<_>>(), [Run { global: 0, local: 0, len: 1 }]);
        let piece = Piece::boxed(&[3, 4], &[1..3, 1..3]).narrow(1..4);
        let runs: Vec<_> = piece.runs().collect();
        assert_eq!(runs, [Run { global: 6, local: 0, len: 1 }, Run { global: 9, local: 1, len: 2 }]);
        assert_eq!((piece.len(), piece.box_len(), piece.total()), (3, 4, 12));
    }

    #[test]
    fn invalid_pieces_are_detected() {
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
