//! Adasum (Maleki et al. 2021, "Scaling distributed training with adaptive summation", algorithm 1).
//!
//! Two vectors become (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b: the sum where they are orthogonal, the mean where they
//! are parallel. Ranks combine in pairs, pairs of pairs and so on, by recursive halving: a rank holds a part of the
//! vectors, so the three products are summed over the ranks that hold the other parts. Cost per rank for B bytes: as
//! [`halving_doubling`](super::halving_doubling), and log2^2 n short messages. Other numbers of ranks than powers of two
//! fold in pairs first.

use super::run::{Numbers, run};
use super::schedule::What;
use crate::algorithm::session::Session;
use crate::error::Result;
use crate::numbers::element::Element;
use std::ops::Range;

/// a.b, a.a and b.b.
fn products<T: Element>(a: &[T], b: &[T]) -> [f64; 3] {
    a.iter().zip(b).fold([0.0; 3], |[ab, aa, bb], (a, b)| {
        let (a, b) = (a.to_f64(), b.to_f64());
        [ab + a * b, aa + a * a, bb + b * b]
    })
}

/// Combines `from` into `into`; the products are of (into, from).
fn combine<T: Element>(into: &mut [T], from: &[T], [ab, aa, bb]: [f64; 3]) {
    // A vector of zeros adds nothing and takes nothing away.
    let factor = |square: f64| if square == 0.0 { 1.0 } else { 1.0 - ab / (2.0 * square) };
    let (of_into, of_from) = (factor(aa), factor(bb));
    for (a, b) in into.iter_mut().zip(from) {
        *a = T::from_f64(of_into * a.to_f64() + of_from * b.to_f64());
    }
}

/// Leaves the adaptive sum in everyone's `data`.
pub(crate) fn all_reduce<T: Element>(session: &mut Session<'_>, data: &mut [T]) -> Result<()> {
    let place = session.place::<T>();
    let (rank, size, len) = (place.rank, place.size, data.len());
    let players = 1usize << size.ilog2();
    let pairs = size - players;
    let rank_of = |own: usize| if own < pairs { 2 * own + 1 } else { own + pairs };
    let folded = rank < 2 * pairs;
    if folded && rank.is_multiple_of(2) {
        session.exchange(rank + 1, Some(data), None)?;
        return session.exchange(rank + 1, None, Some(data));
    }
    let own = if folded { rank / 2 } else { rank - pairs };
    let mut theirs = vec![T::zeroed(); if folded { len } else { len.div_ceil(2) }];
    if folded {
        session.exchange(rank - 1, None, Some(&mut theirs))?;
        let products = products(data, &theirs);
        combine(data, &theirs, products);
    }
    // The part that this rank holds, and what it held before each step.
    let mut held = 0..len;
    let mut steps: Vec<(usize, Range<usize>, Range<usize>)> = vec![];
    let mut distance = 1;
    while distance < players {
        let partner = rank_of(own ^ distance);
        let middle = held.start + held.len() / 2;
        let (kept, given) = match own & distance {
            0 => (held.start..middle, middle..held.end),
            _ => (middle..held.end, held.start..middle),
        };
        let theirs = &mut theirs[..kept.len()];
        session.exchange(partner, Some(&data[given.clone()]), Some(theirs))?;
        let mine = &mut data[kept.clone()];
        let lower = own & distance == 0;
        // Of (lower, higher), so that all ranks of the block sum the same three numbers.
        let mut sums = match products(mine, theirs) {
            products if lower => products,
            [ab, bb, aa] => [ab, aa, bb],
        };
        let mut step = 1;
        while step <= distance {
            let mut others = [0.0; 3];
            session.exchange(rank_of(own ^ step), Some(&sums), Some(&mut others))?;
            for (sum, other) in sums.iter_mut().zip(others) {
                *sum += other;
            }
            step *= 2;
        }
        let [ab, low, high] = sums;
        combine(mine, theirs, if lower { [ab, low, high] } else { [ab, high, low] });
        steps.push((partner, kept.clone(), given));
        held = kept;
        distance *= 2;
    }
    for (partner, kept, given) in steps.into_iter().rev() {
        let mut schedule = session.place::<T>().schedule();
        schedule.add(partner, What::Send, kept, None);
        schedule.add(partner, What::Copy, given, None);
        let numbers = Numbers { input: &[], working: &mut *data };
        run(session, &schedule, numbers)?;
    }
    match folded {
        true => session.exchange(rank - 1, Some(data), None),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonal_vectors_are_added_and_parallel_ones_averaged() {
        let mut a = [1.0f32, 0.0];
        combine(&mut a, &[0.0, 2.0], products(&[1.0f32, 0.0], &[0.0, 2.0]));
        assert_eq!(a, [1.0, 2.0]);
        let mut a = [3.0f64, 4.0];
        combine(&mut a, &[3.0, 4.0], products(&[3.0f64, 4.0], &[3.0, 4.0]));
        assert_eq!(a, [3.0, 4.0]);
        let mut a = [0.0f32; 2];
        combine(&mut a, &[5.0, 6.0], products(&[0.0f32; 2], &[5.0, 6.0]));
        assert_eq!(a, [5.0, 6.0]);
    }
}
