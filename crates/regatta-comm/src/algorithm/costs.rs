//! What algorithms over streams cost, for numbers of ranks that nobody has measured.
//!
//! The model is Hockney's (1994, "The communication challenge for MPP: Intel Paragon and Meiko CS-2"): a message takes a time
//! for itself and one for each byte. The formulas are those of Thakur, Rabenseifner & Gropp (2005, "Optimization of
//! collective communication operations in MPICH", section 4), with a time for each byte that is reduced; of chains and double
//! trees, which go in chunks, those of Sanders, Speck & Träff (2009, "Two-tree algorithms for full bandwidth broadcast,
//! reduction and scan"). The unit is the time of a byte on its way.
//!
//! The constants make the model change algorithms where the table that ships does at its largest numbers of ranks: each
//! is solved from the crossover that is named with it.

use super::Algorithm;
use super::backend::Wanted;
use super::halving_doubling;
use crate::member::call::Kind;

/// A step: what the lines of 16 ranks and more were made with.
const STEP: f64 = (32 << 10) as f64;
/// A byte that is reduced: from doubling to halving, all-reduce of 32 KiB on 128 ranks.
const REDUCED: f64 = 0.345;
/// A byte that halving or doubling sends after its first step, beyond its time on the way: such a step waits for the whole of
/// the one before, where a ring passes chunks on. From halving to the ring, all-reduce of 32 MiB on 128 ranks.
const WHOLE: f64 = 0.135;
/// A byte of a double tree, likewise: its ranks have three neighbours in each tree. From trees to chains, broadcast and
/// reduce of 4 MiB on 16 ranks.
const BRANCHED: f64 = 0.65;
/// A byte that is copied within a rank: from Bruck's algorithm to pairs, all-to-all of 256 KiB on 16 ranks.
const COPIED: f64 = 0.055;
/// Bytes that go on together.
const CHUNK: f64 = (256 << 10) as f64;
/// Bytes that are halved and doubled together in an all-reduce.
const BLOCK: f64 = CHUNK * halving_doubling::BLOCK as f64;

/// The cheapest algorithm for what is wanted; `line` where that is as cheap, or of unknown cost.
pub(super) fn cheapest(line: Algorithm, wanted: &Wanted, ranks: usize, bytes: usize) -> Algorithm {
    let cost = |algorithm| cost(algorithm, wanted.kind, ranks, bytes);
    let Some(of_line) = cost(line) else { return line };
    let mut best = (of_line, line);
    for &algorithm in Algorithm::ALL.iter().filter(|algorithm| algorithm.suits(wanted)) {
        if let Some(cost) = cost(algorithm).filter(|&cost| cost < best.0) {
            best = (cost, algorithm);
        }
    }
    best.1
}

/// What `algorithm` costs on so many ranks, with so many bytes on each; none where it is not modelled, as it has no rival.
fn cost(algorithm: Algorithm, kind: Kind, ranks: usize, bytes: usize) -> Option<f64> {
    use Kind::{AllGather, AllReduce, AllToAll, Broadcast, Reduce, ReduceScatter};
    let ranks = ranks.max(2);
    let (n, b) = (ranks as f64, bytes as f64);
    let steps = |count: f64| count * STEP;
    // Ranks beyond a power of two give theirs to a neighbour first, and wait.
    let doublings = f64::from(ranks.ilog2());
    let folds = if ranks.is_power_of_two() { 0.0 } else { 1.0 };
    let up = doublings + folds;
    // Of a whole that is scattered or gathered: around the ring, and by players who halve or double.
    let around = (n - 1.0) / n * b;
    let players = 2f64.powi(ranks.ilog2() as i32);
    let halved = (players - 1.0) / players * b;
    let late = (halved - 0.5 * b) * WHOLE;
    let reduced = if matches!(kind, AllReduce | Reduce | ReduceScatter) { REDUCED } else { 0.0 };
    Some(match (algorithm, kind) {
        (Algorithm::Ring, AllReduce) => steps(2.0 * (n - 1.0)) + around * (2.0 + reduced),
        (Algorithm::Ring, ReduceScatter | AllGather) => steps(n - 1.0) + around * (1.0 + reduced),
        (Algorithm::Ring, Broadcast | Reduce) => chain(n, b, reduced),
        (Algorithm::Tree, Broadcast | Reduce) => tree(up, b, reduced),
        (Algorithm::Tree, AllReduce) => tree(up, b, reduced) + tree(up, b, 0.0),
        (Algorithm::Doubling, AllReduce) => {
            steps(doublings + 2.0 * folds) + b * (doublings * (1.0 + reduced) + folds * (2.0 + reduced))
        }
        (Algorithm::HalvingDoubling, AllReduce) => {
            let blocks = (b / BLOCK).ceil().max(1.0);
            steps(blocks * 2.0 * (doublings + folds))
                + halved * (2.0 + reduced)
                + 2.0 * late
                + folds * b * (2.0 + reduced)
        }
        (Algorithm::HalvingDoubling, ReduceScatter | AllGather) => {
            let part = b / n;
            steps(doublings + 2.0 * folds)
                + halved * (1.0 + reduced)
                + late
                + folds * (b * (1.0 + reduced) + part)
        }
        (Algorithm::Pairwise, AllToAll) => steps(n - 1.0) + around,
        (Algorithm::Bruck, AllToAll) => steps(up) + up * b / 2.0 + (up + 2.0) * b * COPIED,
        _ => return None,
    })
}

/// Chunks along a chain of `n` ranks.
fn chain(n: f64, bytes: f64, reduced: f64) -> f64 {
    let chunks = (bytes / CHUNK).ceil().max(1.0);
    (n - 2.0 + chunks) * (STEP + bytes / chunks * (1.0 + reduced))
}

/// Chunks of both halves along two trees of this `depth`, to two children each.
fn tree(depth: f64, bytes: f64, reduced: f64) -> f64 {
    let chunks = (bytes / 2.0 / CHUNK).ceil().max(1.0);
    let turn = STEP + bytes / 2.0 / chunks * (1.0 + reduced);
    2.0 * (depth - 1.0 + chunks) * turn + bytes * BRANCHED
}

#[cfg(test)]
mod tests {
    use super::super::select::Table;
    use super::*;
    use crate::transport::TransportKind;

    const KINDS: [Kind; 6] = [
        Kind::AllReduce,
        Kind::Reduce,
        Kind::ReduceScatter,
        Kind::AllGather,
        Kind::Broadcast,
        Kind::AllToAll,
    ];

    fn wanted(kind: Kind) -> Wanted {
        Wanted::plain(kind, TransportKind::Tcp)
    }

    #[test]
    fn the_model_agrees_with_the_table_where_that_ends() {
        let table = Table::default();
        for kind in KINDS {
            let ranks = if kind == Kind::AllReduce { 128 } else { 16 };
            let agrees = |size: &u32| {
                let line = table.choose(&wanted(kind), ranks, 1 << size).unwrap();
                // From another line the model has to find the way itself.
                let other = Algorithm::ALL
                    .iter()
                    .find(|&&other| other != line && cost(other, kind, ranks, 1).is_some());
                cheapest(*other.unwrap(), &wanted(kind), ranks, 1 << size) == line
            };
            // A crossover of the table is one of many sizes; the model may be off by one of these powers of two.
            let same = (0..31).filter(agrees).count();
            assert!(same >= 30, "{kind:?}: {same} of 31");
        }
    }

    #[test]
    fn many_ranks_take_few_steps_for_little_data() {
        let table = Table::default();
        for ranks in [97, 128, 200, 512, 1000, 1024] {
            for kind in KINDS {
                let tiny = table.choose(&wanted(kind), ranks, 8).unwrap();
                let steps = cost(tiny, kind, ranks, 0).unwrap() / STEP;
                assert!(steps <= 2.0 * f64::from(ranks.ilog2() + 1), "{kind:?} {ranks} {tiny}: {steps}");
            }
            let all_reduce = |bytes| table.choose(&wanted(Kind::AllReduce), ranks, bytes).unwrap();
            assert_eq!(all_reduce(4 << 10), Algorithm::Doubling, "{ranks}");
            assert_eq!(all_reduce(1 << 20), Algorithm::HalvingDoubling, "{ranks}");
            assert_eq!(all_reduce(16 << 30), Algorithm::Ring, "{ranks}");
        }
    }

    #[test]
    fn folding_costs_bytes() {
        // The ring pays sooner where ranks are no power of two.
        let all_reduce = |ranks, bytes| cheapest(Algorithm::Ring, &wanted(Kind::AllReduce), ranks, bytes);
        assert_eq!(all_reduce(512, 64 << 20), Algorithm::HalvingDoubling);
        assert_ne!(all_reduce(511, 64 << 20), Algorithm::HalvingDoubling);
    }
}
