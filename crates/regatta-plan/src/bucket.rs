//! Where a gradient bucket ends (Li et al. 2020, "PyTorch Distributed", section 3.2.2).

use std::ops::Range;

/// A model is cut into about this many buckets, so that the all-reduce of one hides behind the backward of the next.
const BUCKETS: usize = 8;
/// Below this a bucket costs more in latency than it hides, in bytes.
const SMALLEST: usize = 256 << 10;

/// The bucket size to aim at, in bytes: the limit the user gave, less where the whole model would fit in a
/// few buckets and nothing would be left to overlap with.
pub fn bucket_cap(total_bytes: usize, limit: usize) -> usize {
    (total_bytes / BUCKETS).max(SMALLEST).min(limit)
}

/// Cuts consecutive parameters of `sizes` bytes into buckets of at most `cap` bytes.
///
/// A parameter is never split, so one larger than `cap` has a bucket to itself. Every parameter is in exactly
/// one range and the ranges are in order.
pub fn buckets(sizes: &[usize], cap: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, &size) in sizes.iter().enumerate() {
        if i > start && bytes + size > cap {
            ranges.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    if start < sizes.len() {
        ranges.push(start..sizes.len());
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_once_in_order_and_under_the_cap() {
        let sizes = [5, 1, 1, 9, 30, 2, 2, 2, 0, 4];
        for cap in 0..40 {
            let cut = buckets(&sizes, cap);
            assert_eq!(
                cut.iter().cloned().flatten().collect::<Vec<_>>(),
                (0..sizes.len()).collect::<Vec<_>>()
            );
            for range in cut {
                let bytes: usize = sizes[range.clone()].iter().sum();
                assert!(
                    bytes <= cap || range.len() == 1 || sizes[range.start] > cap,
                    "{range:?} of {bytes} > {cap}"
                );
            }
        }
        assert!(buckets(&[], 10).is_empty());
    }

    #[test]
    fn a_small_model_is_still_cut_for_overlap() {
        assert_eq!(bucket_cap(19 << 20, 25 << 20), (19 << 20) / 8);
        assert_eq!(bucket_cap(1000, 25 << 20), 256 << 10);
        assert_eq!(bucket_cap(1 << 30, 25 << 20), 25 << 20);
    }
}
