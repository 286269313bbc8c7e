//! Checks whether pieces cover a tensor.

use regatta_plan::{Piece, Run};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Checks that `pieces` hold each of a tensor's `total` elements exactly once.
///
/// # Errors
/// The message says which elements are missing or occur twice.
pub(super) fn exactly_once(total: usize, pieces: &[&Piece]) -> Result<(), String> {
    // Merges the runs of all pieces in order; at most one run of each piece is in memory.
    let mut runs: Vec<_> = pieces.iter().map(|piece| piece.runs()).collect();
    let entry = |index: usize, run: Run| Reverse((run.global, run.end(), index));
    let mut next: BinaryHeap<_> =
        runs.iter_mut().enumerate().filter_map(|(index, runs)| Some(entry(index, runs.next()?))).collect();
    let mut covered = 0;
    while let Some(Reverse((start, end, index))) = next.pop() {
        if start > covered {
            return Err(format!("elements {covered}..{start} of {total} are missing"));
        }
        if start < covered {
            return Err(format!("elements {start}..{} occur twice", end.min(covered)));
        }
        covered = end;
        next.extend(runs[index].next().map(|run| entry(index, run)));
    }
    if covered < total {
        return Err(format!("elements {covered}..{total} of {total} are missing"));
    }
    Ok(())
}

/// Whether one shape results from the other by merging neighbouring dimensions, as `[8, 24]` from `[8, 3, 2, 4]`. Then
/// an element has the same flat index in both.
pub(super) fn same_tensor(a: &[usize], b: &[usize]) -> bool {
    merges_to(b, a) || merges_to(a, b)
}

/// Whether merging neighbouring dimensions of `fine` gives `coarse`.
fn merges_to(fine: &[usize], coarse: &[usize]) -> bool {
    // Dimensions of size 1 do not matter.
    let mut fine = fine.iter().filter(|&&dim| dim != 1);
    for &dim in coarse.iter().filter(|&&dim| dim != 1) {
        let mut product = 1usize;
        loop {
            let Some(&factor) = fine.next() else { return false };
            product = product.saturating_mul(factor);
            if product == dim {
                break;
            }
            if product > dim || product == 0 {
                return false;
            }
        }
    }
    fine.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_overlaps_are_reported() {
        let half = |range| Piece::boxed(&[3, 4], &[0..3, range]);
        let (left, right) = (half(0..2), half(2..4));
        assert_eq!(exactly_once(12, &[&right, &left]), Ok(()));
        assert_eq!(exactly_once(12, &[&left]), Err("elements 2..4 of 12 are missing".into()));
        assert_eq!(exactly_once(12, &[&right]), Err("elements 0..2 of 12 are missing".into()));
        let short = right.narrow(0..5);
        assert_eq!(exactly_once(12, &[&left, &short]), Err("elements 11..12 of 12 are missing".into()));
        assert_eq!(exactly_once(12, &[&left, &half(1..4)]), Err("elements 1..2 occur twice".into()));
        assert_eq!(exactly_once(12, &[]), Err("elements 0..12 of 12 are missing".into()));
        assert_eq!(exactly_once(0, &[&Piece::whole(&[0])]), Ok(()));
    }

    #[test]
    fn shapes_may_be_factored_but_not_changed() {
        for (a, b) in [
            (&[8, 24][..], &[8, 3, 2, 4][..]),
            (&[24], &[2, 12]),
            (&[8, 1, 3], &[8, 3]),
            (&[], &[1, 1]),
            (&[0, 4], &[0, 4]),
        ] {
            assert!(same_tensor(a, b) && same_tensor(b, a), "{a:?} {b:?}");
        }
        for (a, b) in [(&[6, 4][..], &[4, 6][..]), (&[8], &[9]), (&[2, 12], &[8, 3]), (&[8], &[4])] {
            assert!(!same_tensor(a, b) && !same_tensor(b, a), "{a:?} {b:?}");
        }
    }
}
