//! A few numbers of many, with their places: the largest (Aji & Heafield 2017, "Sparse Communication for Distributed Gradient
//! Descent"), or some at random (Stich et al. 2018, "Sparsified SGD with Memory").

use crate::random::Stream;
use crate::simd::vectorized;

/// Bytes of a number and its place.
pub const BYTES: usize = size_of::<u32>() + size_of::<f32>();

/// Buckets of sizes, by the upper bits of a float without its sign.
const BUCKETS: usize = 1 << 12;
/// Bits of a float below those of its bucket.
const BELOW: u32 = 31 - 12;

/// Without the sign, the order of floats is that of their bits, and what is not finite comes last.
fn size(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// The places of the `k` largest numbers by absolute value, in order; of equal ones, the first. All where there are fewer.
/// What is not finite counts as larger than anything.
///
/// # Panics
/// If there are more than 2^32 numbers.
pub fn largest(values: &[f32], k: usize) -> Vec<u32> {
    assert!(u32::try_from(values.len()).is_ok(), "places are numbers of 32 bits");
    if k >= values.len() {
        return (0..values.len() as u32).collect();
    }
    if k == 0 {
        return vec![];
    }
    let mut counts = vec![0u32; BUCKETS];
    for &x in values {
        counts[(size(x) >> BELOW) as usize] += 1;
    }
    // The bucket in which the k-th largest is, and how many of it are among the k.
    let (mut bucket, mut left) = (BUCKETS - 1, k);
    while (counts[bucket] as usize) < left {
        left -= counts[bucket] as usize;
        bucket -= 1;
    }
    let low = (bucket as u32) << BELOW;
    let candidates = at_least(values, low, k - left + counts[bucket] as usize);
    // Of the candidates in the bucket itself, those that are large enough.
    let mut sizes: Vec<u32> = candidates
        .iter()
        .map(|&place| size(values[place as usize]))
        .filter(|size| size >> BELOW == bucket as u32)
        .collect();
    let count = sizes.len();
    let (_, &mut least, above) = sizes.select_nth_unstable(count - left);
    let above = above.iter().filter(|&&size| size > least).count();
    // As many that are equal to the least one as there is room for.
    let mut equal = left - above;
    let mut places = candidates;
    places.retain(|&place| {
        let size = size(values[place as usize]);
        let fits = size > least || size == least && equal > 0;
        equal -= usize::from(fits && size == least);
        fits
    });
    places
}

/// The places of numbers whose absolute value has at least the bits `low`; there are `count` of them.
fn at_least(values: &[f32], low: u32, count: usize) -> Vec<u32> {
    let mut places = Vec::with_capacity(count);
    const CHUNK: usize = 64;
    for (index, chunk) in values.chunks(CHUNK).enumerate() {
        // Most chunks have none.
        if any_at_least(chunk, low) {
            let first = (index * CHUNK) as u32;
            let found = (first..).zip(chunk).filter(|(_, x)| size(**x) >= low);
            places.extend(found.map(|(place, _)| place));
        }
    }
    places
}

vectorized! {
    fn any_at_least(values: &[f32], low: u32) -> bool {
        let mut most = 0;
        for x in values {
            most = most.max(x.to_bits() & 0x7fff_ffff);
        }
        most >= low
    }
}

/// `k` places of `len`, in order: one of each of `k` parts of about the same length, at random. So every place has about the
/// same probability, and the places of a stream are the same on all ranks. All places where there are fewer.
///
/// # Panics
/// If there are more than 2^32 numbers.
pub fn random(len: usize, k: usize, stream: Stream) -> Vec<u32> {
    assert!(u32::try_from(len).is_ok(), "places are numbers of 32 bits");
    if k >= len {
        return (0..len as u32).collect();
    }
    let start = |part: usize| (part as u64 * len as u64 / k as u64) as u32;
    let place = |part: usize| {
        let (from, to) = (start(part), start(part + 1));
        from + (stream.bits(part as u64) % u64::from(to - from)) as u32
    };
    (0..k).map(place).collect()
}

/// Writes the numbers at `places` to `out`, the places first, and sets them to 0 in `values`.
///
/// # Panics
/// If `out` does not have [`BYTES`] for each place, or a place is none of `values`.
pub fn take(values: &mut [f32], places: &[u32], out: &mut [u8]) {
    assert_eq!(out.len(), BYTES * places.len(), "the length of encoded numbers");
    let (heads, numbers) = out.split_at_mut(size_of_val(places));
    let out = heads.as_chunks_mut().0.iter_mut().zip(numbers.as_chunks_mut().0);
    for ((head, number), &place) in out.zip(places) {
        *head = place.to_le_bytes();
        *number = std::mem::take(&mut values[place as usize]).to_le_bytes();
    }
}

/// Adds encoded numbers, multiplied by `factor`, to `out`. Places that `out` does not have are left out.
pub fn add(encoded: &[u8], factor: f32, out: &mut [f32]) {
    let (heads, numbers) = encoded.split_at(encoded.len() / BYTES * size_of::<u32>());
    for (&head, &number) in heads.as_chunks().0.iter().zip(numbers.as_chunks().0) {
        if let Some(x) = out.get_mut(u32::from_le_bytes(head) as usize) {
            *x += f32::from_le_bytes(number) * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use proptest::prelude::*;

    fn plain(values: &[f32], k: usize) -> Vec<u32> {
        let mut places: Vec<u32> = (0..values.len() as u32).collect();
        // Stable: the first of equal ones stays first.
        places.sort_by_key(|&place| std::cmp::Reverse(size(values[place as usize])));
        places.truncate(k);
        places.sort_unstable();
        places
    }

    proptest! {
        #[test]
        fn the_largest_are_those_of_a_plain_sort(len in 0usize..500, k in 0usize..600, seed: u64, coarse: bool) {
            let mut numbers = values(seed, len, 1.0);
            if coarse {
                // Many equal ones.
                numbers.iter_mut().for_each(|x| *x = x.round());
            }
            prop_assert_eq!(largest(&numbers, k), plain(&numbers, k));
        }

        #[test]
        fn random_places_are_in_order_and_in_range(len in 0usize..500, k in 0usize..600, seed: u64) {
            let places = random(len, k, Stream::new(seed));
            prop_assert_eq!(places.len(), k.min(len));
            prop_assert!(places.is_sorted_by(|a, b| a < b) && places.last().is_none_or(|&last| (last as usize) < len));
        }

        #[test]
        fn what_is_taken_and_what_stays_are_the_whole(len in 1usize..300, k in 0usize..300, seed: u64) {
            let numbers = values(seed, len, 1.0);
            let places = largest(&numbers, k);
            let (mut rest, mut encoded) = (numbers.clone(), vec![0; BYTES * places.len()]);
            take(&mut rest, &places, &mut encoded);
            prop_assert!(places.iter().all(|&place| rest[place as usize] == 0.0));
            add(&encoded, 1.0, &mut rest);
            prop_assert_eq!(&rest, &numbers);
            // Its square is at most what it was, by (1 - k/n): top-k is a contraction (Stich et al., definition 2.1).
            let mut error = numbers.clone();
            take(&mut error, &places, &mut encoded);
            let square = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            let kept = 1.0 - places.len() as f64 / len as f64;
            prop_assert!(square(&error) <= kept * square(&numbers) + 1e-9);
        }

        #[test]
        fn any_bytes_are_added_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            add(&bytes, 1.0, &mut [0.0; 5]);
        }
    }

    #[test]
    fn what_is_not_finite_is_among_the_largest() {
        assert_eq!(largest(&[1.0, f32::NAN, 1e30, f32::NEG_INFINITY], 2), [1, 3]);
    }

    #[test]
    fn all_places_come_up_alike() {
        let mut counts = [0; 10];
        for step in 0..10_000 {
            for place in random(10, 3, Stream::new(1).at(step)) {
                counts[place as usize] += 1;
            }
        }
        assert!(counts.iter().all(|&count| (2300..3700).contains(&count)), "{counts:?}");
    }
}
