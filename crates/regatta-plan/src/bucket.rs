//! Where a gradient bucket ends (Li et al. 2020, "PyTorch Distributed", section 3.2.2).

use std::ops::Range;

/// The gradients of a model are divided into about this many buckets, so that the all-reduce of one bucket overlaps
/// with the backward pass of the layers before.
const BUCKETS: usize = 8;
/// Smallest bucket in bytes: for a smaller one, latency costs more than overlap saves.
const SMALLEST: usize = 256 << 10;

/// The target size of a bucket in bytes: `limit`, or less for a small model. If a model of `total_bytes` fitted in a
/// few buckets, there would be no backward pass left to overlap their all-reduce with.
pub fn bucket_cap(total_bytes: usize, limit: usize) -> usize {
    (total_bytes / BUCKETS).max(SMALLEST).min(limit)
}

/// Groups consecutive parameters of `sizes` bytes into buckets of at most `cap` bytes. Returns the ranges of
/// parameters.
///
/// A parameter is never split, so one that is larger than `cap` has a bucket of its own. Every parameter is in exactly
/// one range, and the ranges are in order.
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
    fn every_parameter_is_in_one_bucket_in_order_under_the_cap() {
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
    fn a_small_model_still_has_several_buckets() {
        assert_eq!(bucket_cap(19 << 20, 25 << 20), (19 << 20) / 8);
        assert_eq!(bucket_cap(1000, 25 << 20), 256 << 10);
        assert_eq!(bucket_cap(1 << 30, 25 << 20), 25 << 20);
    }
}
