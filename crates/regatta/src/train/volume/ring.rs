//! Volumes of ring algorithms (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
//! workstations").

use regatta_comm::Kind;
use regatta_plan::part;

/// Number of values that the rank at `place` in a ring of `ranks` sends in an operation whose larger side has
/// `numbers` values: 2(n-1)/n of them in an all-reduce, (n-1)/n in a reduce-scatter or an all-gather. If they do not
/// divide by n, the sizes of segments differ by one, and ranks send different segments.
pub(super) fn sent(kind: Kind, numbers: usize, ranks: usize, place: usize) -> usize {
    let segment = |ahead: usize| part(numbers, ranks, (place + ahead) % ranks).len();
    match kind {
        // All segments twice, without the last one of each round.
        Kind::AllReduce => 2 * numbers - segment(1) - segment(2),
        // All segments or blocks except its own, which ends here.
        Kind::ReduceScatter | Kind::AllToAll => numbers - segment(0),
        // All segments except the right neighbour's, which began there.
        Kind::AllGather => numbers - segment(1),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_send_the_least_there_is() {
        for ranks in 2..6 {
            for numbers in 0..50 {
                let all = |kind| (0..ranks).map(|place| sent(kind, numbers, ranks, place)).sum::<usize>();
                assert_eq!(all(Kind::AllReduce), 2 * (ranks - 1) * numbers);
                assert_eq!(all(Kind::ReduceScatter), (ranks - 1) * numbers);
                assert_eq!(all(Kind::AllGather), (ranks - 1) * numbers);
                let even = numbers * ranks;
                assert_eq!(sent(Kind::AllReduce, even, ranks, 1), 2 * (ranks - 1) * even / ranks);
            }
        }
    }
}
