//! Double binary tree (Sanders, Speck & Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and
//! scan").
//!
//! Each of two binary trees carries half of the data in chunks; a rank that is a leaf in one is an inner node in the
//! other, so all links are busy. Cost per rank for B bytes: about 2 log2 n steps and at most B bytes sent each way in
//! a broadcast or a reduction, twice that in an all-reduce. Few steps for many ranks: for middling sizes.

use super::schedule::{Schedule, What, part};
use crate::algorithm::session::Place;
use std::ops::Range;

/// A rank's neighbours in one tree.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    parent: Option<usize>,
    children: Vec<usize>,
}

/// The neighbours of position `at` in the binary search tree over positions `1..=count`, under position 0.
fn search_tree(at: usize, count: usize) -> Node {
    let middle = |range: &Range<usize>| (!range.is_empty()).then(|| range.start + range.len() / 2);
    let mut range = 1..count + 1;
    let Some(top) = middle(&range) else { return Node { parent: None, children: vec![] } };
    if at == 0 {
        return Node { parent: None, children: vec![top] };
    }
    let (mut parent, mut node) = (0, top);
    while node != at {
        range = if at < node { range.start..node } else { node + 1..range.end };
        parent = node;
        node = range.start + range.len() / 2;
    }
    let children = [range.start..node, node + 1..range.end].iter().filter_map(middle).collect();
    Node { parent: Some(parent), children }
}

/// The neighbours of `rank` in the first or second tree under `root`.
fn node(rank: usize, size: usize, root: usize, second: bool) -> Node {
    // The second tree is the first with its positions moved by one, so that leaves become inner nodes.
    let count = size - 1;
    let forth = |position: usize| match (second, position) {
        (false, _) | (_, 0) => position,
        _ => position % count + 1,
    };
    let back = |position: usize| match (second, position) {
        (false, _) | (_, 0) => position,
        _ => (position + count - 2) % count + 1,
    };
    let node = search_tree(forth((rank + size - root) % size), count);
    let rank_at = |position: usize| (back(position) + root) % size;
    Node { parent: node.parent.map(rank_at), children: node.children.into_iter().map(rank_at).collect() }
}

fn both(place: Place, root: usize, len: usize, up: bool, down: bool) -> Schedule {
    let mut schedule = place.schedule();
    let halves = [0, 1].map(|tree| part(len, 2, tree));
    let nodes = [false, true].map(|second| node(place.rank, place.size, root, second));
    let mut reduced = [None, None];
    // Up in both trees before down in any: where two ranks are neighbours in both, neither tree waits for the other.
    for tree in (0..2).filter(|_| up) {
        let (node, half, last) = (&nodes[tree], &halves[tree], &mut reduced[tree]);
        for (index, &child) in node.children.iter().enumerate() {
            let complete = node.parent.is_none() && index + 1 == node.children.len();
            let what = if complete { What::Finish } else { What::Reduce };
            *last = Some(schedule.add(child, what, half.clone(), last.as_ref()));
        }
        if let Some(parent) = node.parent {
            schedule.add(parent, What::Send, half.clone(), last.as_ref());
        }
    }
    for tree in (0..2).filter(|_| down) {
        let (node, half) = (&nodes[tree], &halves[tree]);
        let came = node.parent.map(|parent| schedule.add(parent, What::Copy, half.clone(), None));
        let there = came.or(reduced[tree].take());
        for &child in &node.children {
            schedule.add(child, What::Send, half.clone(), there.as_ref());
        }
    }
    schedule
}

/// Up both trees, and down again.
pub(crate) fn all_reduce(place: Place, len: usize) -> Schedule {
    both(place, 0, len, true, true)
}

/// Down both trees.
pub(crate) fn broadcast(place: Place, root: usize, len: usize) -> Schedule {
    both(place, root, len, false, true)
}

/// Up both trees.
pub(crate) fn reduce(place: Place, root: usize, len: usize) -> Schedule {
    both(place, root, len, true, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_trees_and_share_the_work() {
        for size in 2..40 {
            for root in [0, size / 2, size - 1] {
                let mut inner = vec![0; size];
                for second in [false, true] {
                    let nodes: Vec<Node> = (0..size).map(|rank| node(rank, size, root, second)).collect();
                    assert_eq!(nodes[root].parent, None);
                    assert!(nodes.iter().filter(|node| node.parent.is_none()).count() == 1);
                    for (rank, node) in nodes.iter().enumerate() {
                        for &child in &node.children {
                            assert_eq!(nodes[child].parent, Some(rank), "{size} {root} {second}");
                        }
                        // Logarithmic depth.
                        let mut depth = 0;
                        let mut at = rank;
                        while let Some(parent) = nodes[at].parent {
                            at = parent;
                            depth += 1;
                        }
                        assert!(depth <= 2 + size.ilog2());
                        inner[rank] += usize::from(node.children.len() == 2);
                    }
                    assert_eq!(nodes.iter().map(|node| node.children.len()).sum::<usize>(), size - 1);
                }
                // Full inner nodes of both trees at once are rare: where the numbers do not come out even.
                assert!(inner.iter().filter(|&&both| both == 2).count() <= 1 + size / 8, "{size}: {inner:?}");
            }
        }
    }
}
