//! How a sequence of blocks is divided into stages: the linear partition problem (Skiena, "The Algorithm Design
//! Manual"), which PipeDream also solves for its stages (Narayanan et al. 2019, section 3.1).

use crate::PlanError;
use std::ops::Range;

/// Sums whose relative difference is below this are equal except for rounding.
const ROUNDING: f64 = 1e-12;

/// Divides blocks with these `costs` (in any unit) into `parts` consecutive ranges, none empty, so that the largest
/// sum of costs is as small as possible.
///
/// The largest sum is minimised because the slowest stage limits the speed of a pipeline. Among such partitions the
/// function takes one with the smallest sum of squares, so that the other parts are even too. If parts can be swapped
/// without loss, the later ones are the longer ones, because early stages hold more micro-batches.
///
/// # Errors
/// [`PlanError::Zero`] for no parts, [`PlanError::TooFewBlocks`] for more parts than blocks, and [`PlanError::Cost`]
/// for a cost that is negative, infinite or NaN.
pub fn balance(costs: &[f64], parts: usize) -> Result<Vec<Range<usize>>, PlanError> {
    if parts == 0 {
        return Err(PlanError::Zero("the number of pipeline stages"));
    }
    if parts > costs.len() {
        return Err(PlanError::TooFewBlocks { blocks: costs.len(), parts });
    }
    if let Some(block) = costs.iter().position(|cost| !cost.is_finite() || *cost < 0.0) {
        return Err(PlanError::Cost(block));
    }
    // Two passes, because dynamic programming over both measures at once is wrong: a prefix with a smaller maximum
    // but a larger sum of squares is not better if a later part is the largest anyway.
    let (largest, _) = partition(costs, parts, f64::max, |sum| sum);
    let limit = largest * (1.0 + ROUNDING);
    let square = |sum: f64| if sum <= limit { sum * sum } else { f64::INFINITY };
    Ok(partition(costs, parts, |all, part| all + part, square).1)
}

/// The cheapest partition, by dynamic programming. A part costs `price(sum of its costs)`, and `join` combines the
/// cost of the parts before with that of the next part.
fn partition(
    costs: &[f64],
    parts: usize,
    join: impl Fn(f64, f64) -> f64,
    price: impl Fn(f64) -> f64,
) -> (f64, Vec<Range<usize>>) {
    let blocks = costs.len();
    // best[end]: the least cost of the first `end` blocks, divided into `part` parts after round `part`. Before the
    // first round there are no parts, so only `end` 0 is possible.
    let mut best = vec![f64::INFINITY; blocks + 1];
    best[0] = 0.0;
    let mut starts = Vec::with_capacity(parts);
    for part in 1..=parts {
        let mut next = vec![f64::INFINITY; blocks + 1];
        let mut start_of = vec![part - 1; blocks + 1];
        for end in part..=blocks {
            let mut sum = 0.0;
            // From the shortest last part to the longest. If two cost the same, the longest is taken.
            for start in (part - 1..end).rev() {
                sum += costs[start];
                let alone = price(sum);
                if alone.is_infinite() || alone > next[end] * (1.0 + ROUNDING) {
                    // A longer last part costs at least as much, whatever the parts before it cost.
                    break;
                }
                let value = join(best[start], alone);
                if value < next[end] || value <= next[end] * (1.0 + ROUNDING) && value.is_finite() {
                    next[end] = value.min(next[end]);
                    start_of[end] = start;
                }
            }
        }
        best = next;
        starts.push(start_of);
    }

    let mut end = blocks;
    let mut ranges: Vec<_> = starts
        .iter()
        .rev()
        .map(|start_of| {
            let range = start_of[end]..end;
            end = range.start;
            range
        })
        .collect();
    ranges.reverse();
    (best[blocks], ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every way to divide `blocks` into `parts`.
    fn cuts(blocks: usize, parts: usize) -> Vec<Vec<Range<usize>>> {
        if parts == 1 {
            return if blocks > 0 { vec![vec![0..blocks]] } else { Vec::new() };
        }
        (1..blocks)
            .flat_map(|start| {
                cuts(start, parts - 1).into_iter().map(move |mut cut| {
                    cut.push(start..blocks);
                    cut
                })
            })
            .collect()
    }

    /// The largest sum of a part, and the sum of squares.
    fn measure(costs: &[f64], cut: &[Range<usize>]) -> (f64, f64) {
        let sums = cut.iter().map(|range| costs[range.clone()].iter().sum::<f64>());
        sums.fold((0.0, 0.0), |(most, squares), sum| (sum.max(most), squares + sum * sum))
    }

    proptest! {
        #[test]
        fn the_result_is_the_best_of_all_partitions(
            costs in prop::collection::vec(0u8..20, 1..11), parts in 1usize..6,
        ) {
            let costs: Vec<f64> = costs.into_iter().map(f64::from).collect();
            prop_assume!(parts <= costs.len());
            let cut = balance(&costs, parts).unwrap();
            prop_assert_eq!(cut.len(), parts);
            prop_assert!(cut.iter().all(|range| !range.is_empty()));
            let blocks: Vec<usize> = cut.iter().cloned().flatten().collect();
            prop_assert_eq!(blocks, (0..costs.len()).collect::<Vec<_>>());
            let all = cuts(costs.len(), parts);
            let measures = all.iter().map(|cut| measure(&costs, cut));
            let best = measures.min_by(|a, b| a.partial_cmp(b).unwrap());
            prop_assert_eq!(Some(measure(&costs, &cut)), best);
        }
    }

    #[test]
    fn parts_beside_the_largest_are_even_and_later_ones_longer() {
        assert_eq!(balance(&[9.0, 1.0, 1.0, 1.0, 1.0], 3), Ok(vec![0..1, 1..3, 3..5]));
        assert_eq!(balance(&[0.1; 5], 2), Ok(vec![0..2, 2..5]));
        assert_eq!(balance(&[0.0; 3], 3), Ok(vec![0..1, 1..2, 2..3]));
    }

    #[test]
    fn impossible_partitions_are_errors() {
        let error = balance(&[1.0; 4], 5).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model has 4 blocks, so it can be cut into at most 4 stages, not 5"
        );
        assert_eq!(balance(&[1.0], 0), Err(PlanError::Zero("the number of pipeline stages")));
        assert_eq!(balance(&[1.0, f64::NAN], 2), Err(PlanError::Cost(1)));
    }
}
