//! Units: groups of parameters that are adjacent in memory and communicated together, and the shard of each unit that a
//! rank owns.

use super::placed::PlacedParam;
use regatta_kernel::optimizer::sum_of_squares;
use regatta_plan::{AxisSet, Piece, Plan};
use std::ops::Range;

/// Alignment of parameters in elements: a cache line of 64 bytes.
const ALIGN: usize = 16;

/// The parameters of one block, or of several small blocks, in contiguous memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// For each parameter, its index in [`Units::params`] and its first element in the unit.
    pub params: Vec<(usize, usize)>,
    /// The number of elements, including padding between parameters and at the end, which makes all shards equally long.
    pub len: usize,
    /// The blocks on this rank that use the unit.
    pub blocks: Vec<usize>,
    /// The gradients of the elements before this one must be summed over the tensor axis.
    pub partial: usize,
    /// For parameters that several blocks share, such as a tied embedding: those blocks, on all ranks. Otherwise empty.
    pub shared: Vec<usize>,
}

/// The parameters of one rank, arranged in units.
#[derive(Debug, Clone)]
pub struct Units {
    /// The parameters, in the order in which the model created them.
    pub params: Vec<PlacedParam>,
    /// The units, in the order of their first blocks.
    pub units: Vec<Unit>,
    /// For each parameter, its unit and its first element there.
    places: Vec<(usize, usize)>,
    /// The number of ranks that each unit is sharded over.
    pub shards: usize,
}

/// Which elements of a unit are matrices, and which are not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitShapes {
    /// The elements of each parameter of two dimensions or more, with rows and columns: its last dimension has the columns.
    pub matrices: Vec<(Range<usize>, [usize; 2])>,
    /// The elements of the other parameters, without padding.
    pub vectors: Vec<Range<usize>>,
}

impl UnitShapes {
    /// The number of elements of all matrices.
    pub fn numbers(&self) -> usize {
        self.matrices.iter().map(|(range, _)| range.len()).sum()
    }
}

impl Units {
    /// Arranges `params` in units. Consecutive blocks of one chunk share a unit as long as it has at most `cap` bytes; with a
    /// cap of 0, each block has its own unit. Parameters that several blocks share have a unit of their own.
    pub fn new(params: Vec<PlacedParam>, chunks: &[Range<usize>], cap: usize, shards: usize) -> Self {
        let held = |block: &usize| chunks.iter().any(|chunk| chunk.contains(block));
        let chunk_of = |block: usize| chunks.iter().position(|chunk| chunk.contains(&block));
        let bytes = |params: &[usize], all: &[PlacedParam]| -> usize {
            params.iter().map(|&index| all[index].len().next_multiple_of(ALIGN) * size_of::<f32>()).sum()
        };
        // Parameters that are used by the same blocks form a group. Groups are ordered by their first block on this rank.
        let mut groups: Vec<(Vec<usize>, Vec<usize>)> = vec![];
        for (index, param) in params.iter().enumerate() {
            match groups.iter_mut().find(|(blocks, _)| *blocks == param.blocks) {
                Some((_, members)) => members.push(index),
                None => groups.push((param.blocks.clone(), vec![index])),
            }
        }
        groups.sort_by_key(|(blocks, _)| (blocks.iter().copied().find(held), blocks.len()));
        let mut drafts: Vec<(Vec<usize>, Vec<usize>)> = vec![];
        for (blocks, members) in groups {
            if let (Some(last), [block]) = (drafts.last_mut(), &blocks[..])
                && let [.., before] = last.0[..]
                && last.0.iter().all(|block| params[last.1[0]].blocks.len() == 1 && held(block))
                && chunk_of(before) == chunk_of(*block)
                && bytes(&last.1, &params) + bytes(&members, &params) <= cap
            {
                last.0.push(*block);
                last.1.extend(members);
                continue;
            }
            drafts.push((blocks, members));
        }
        let mut places = vec![(0, 0); params.len()];
        let mut units = vec![];
        for (blocks, mut members) in drafts {
            let shared = if params[members[0]].blocks.len() > 1 { blocks.clone() } else { vec![] };
            members.sort_by_key(|&index| params[index].partial_over == AxisSet::NONE);
            let (mut end, mut partial) = (0, 0);
            let mut placed = vec![];
            for index in members {
                placed.push((index, end));
                places[index] = (units.len(), end);
                end += params[index].len().next_multiple_of(ALIGN);
                if params[index].partial_over != AxisSet::NONE {
                    partial = end;
                }
            }
            units.push(Unit {
                params: placed,
                len: end.next_multiple_of(ALIGN * shards),
                blocks: blocks.into_iter().filter(held).collect(),
                partial,
                shared,
            });
        }
        Self { params, units, places, shards }
    }

    /// Arranges the parameters of a rank that holds `chunks` for `plan`.
    pub fn of_plan(params: Vec<PlacedParam>, chunks: &[Range<usize>], plan: &Plan) -> Self {
        let bytes: usize = params.iter().map(|param| param.len() * size_of::<f32>()).sum();
        // Parameters that are gathered before a block and released after it need a unit for each block.
        let cap = if plan.exchange().gathers_on_use() {
            0
        } else {
            regatta_plan::bucket_cap(bytes, plan.bucket_bytes)
        };
        Self::new(params, chunks, cap, plan.shards())
    }

    /// The unit of a parameter, and its elements there.
    pub fn place(&self, param: usize) -> (usize, Range<usize>) {
        let (unit, start) = self.places[param];
        (unit, start..start + self.params[param].len())
    }

    /// The units whose parameters `block` uses.
    pub fn of_block(&self, block: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.units.len()).filter(move |&unit| self.units[unit].blocks.contains(&block))
    }

    /// The number of elements that each rank owns, in all units.
    pub fn owned(&self) -> usize {
        self.units.iter().map(|unit| unit.len / self.shards).sum()
    }

    /// The elements of a unit that the `shard`-th rank owns.
    pub fn shard(&self, unit: usize, shard: usize) -> Range<usize> {
        let each = self.units[unit].len / self.shards;
        each * shard..each * (shard + 1)
    }

    /// The same units, sharded over another number of ranks.
    #[must_use]
    pub fn sharded_over(&self, shards: usize) -> Self {
        let mut units = self.clone();
        units.shards = shards;
        for (index, unit) in units.units.iter_mut().enumerate() {
            unit.len = self.end(index).next_multiple_of(ALIGN * shards);
        }
        units
    }

    /// The end of a unit's last parameter, padded as where nothing is sharded.
    fn end(&self, unit: usize) -> usize {
        let ends = self.units[unit].params.iter().map(|&(param, start)| start + self.params[param].len());
        ends.max().unwrap_or(0).next_multiple_of(ALIGN)
    }

    /// The elements of a unit that the `shard`-th rank owns, without the padding that makes all shards equally long.
    pub fn within(&self, unit: usize, shard: usize) -> Range<usize> {
        let (owned, end) = (self.shard(unit, shard), self.end(unit));
        owned.start.min(end)..owned.end.min(end)
    }

    /// The sum of the squares of the gradients in `range` of a unit, without running statistics.
    pub fn squares(&self, unit: usize, range: Range<usize>, gradients: &[f32]) -> f64 {
        let segments = self.segments(unit, range);
        let trained = segments.filter(|segment| !self.params[segment.param].statistic);
        trained.map(|segment| sum_of_squares(&gradients[segment.within])).sum()
    }

    /// The parts of a unit's parameters that are within `range` of the unit.
    pub fn segments(&self, unit: usize, range: Range<usize>) -> impl Iterator<Item = Segment> + '_ {
        self.units[unit].params.iter().filter_map(move |&(param, start)| {
            let end = start + self.params[param].len();
            let (from, to) = (start.max(range.start), end.min(range.end));
            let segment = || Segment {
                param,
                within: from - range.start..to - range.start,
                of: from - start..to - start,
            };
            (from < to).then(segment)
        })
    }

    /// Which elements of a unit are matrices.
    pub fn shapes(&self, unit: usize) -> UnitShapes {
        let mut shapes = UnitShapes::default();
        for &(param, start) in &self.units[unit].params {
            let (placed, range) = (&self.params[param], start..start + self.params[param].len());
            match placed.rows().filter(|&rows| rows > 0 && !placed.statistic) {
                Some(rows) => shapes.matrices.push((range.clone(), [rows, range.len() / rows])),
                None => shapes.vectors.push(range),
            }
        }
        shapes
    }

    /// The part of a parameter that this rank holds, all shards together.
    pub fn piece(&self, param: usize) -> Piece {
        self.params[param].piece()
    }

    /// The number of elements of all parameters on this rank, all shards together and without padding.
    pub fn num_params(&self) -> usize {
        self.params.iter().map(PlacedParam::len).sum()
    }
}

/// The part of a parameter that is within a range of its unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The index of the parameter.
    pub param: usize,
    /// The elements, counted from the start of the range.
    pub within: Range<usize>,
    /// The same elements, counted from the start of the parameter.
    pub of: Range<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use regatta_plan::{Axis, Dim, TensorSpec};

    fn param(path: &str, size: usize, blocks: &[usize], partial: bool) -> PlacedParam {
        let dims = vec![Dim { name: "embed".into(), size }];
        PlacedParam {
            spec: TensorSpec { path: path.into(), dims, shape: vec![size] },
            ranges: std::iter::once(0..size).collect(),
            blocks: blocks.to_vec(),
            split_over: AxisSet::NONE,
            partial_over: if partial { Axis::Tensor.into() } else { AxisSet::NONE },
            statistic: false,
        }
    }

    fn example(cap: usize, shards: usize) -> Units {
        let params = vec![
            param("tokens", 100, &[0, 3], false),
            param("positions", 20, &[0], true),
            param("a", 30, &[1], false),
            param("a.norm", 7, &[1], true),
            param("b", 30, &[2], false),
            param("norm", 9, &[3], true),
        ];
        Units::new(params, &[0..2, 2..4], cap, shards)
    }

    #[test]
    fn parameters_do_not_overlap_and_shards_cover_them() {
        for cap in [0, 200, 1 << 20] {
            for shards in [1, 2, 3] {
                let units = example(cap, shards);
                let mut seen = vec![0usize; units.params.len()];
                for unit in 0..units.units.len() {
                    let mut end = 0;
                    for &(param, start) in &units.units[unit].params {
                        assert!(start >= end && start.is_multiple_of(ALIGN));
                        end = start + units.params[param].len();
                        assert_eq!(units.place(param), (unit, start..end));
                    }
                    assert!(end <= units.units[unit].len);
                    for shard in 0..shards {
                        assert_eq!(
                            units.within(unit, shard),
                            example(cap, 1).sharded_over(shards).within(unit, shard)
                        );
                        for segment in units.segments(unit, units.within(unit, shard)) {
                            assert_eq!(segment.within.len(), segment.of.len());
                            seen[segment.param] += segment.of.len();
                        }
                    }
                }
                assert_eq!(seen, [100, 20, 30, 7, 30, 9]);
            }
        }
    }

    #[test]
    fn blocks_of_a_chunk_share_a_unit_and_shared_parameters_have_their_own() {
        let names = |units: &Units| -> Vec<String> {
            let name = |unit: &Unit| {
                unit.params.iter().map(|(i, _)| units.params[*i].spec.path.as_str()).collect::<Vec<_>>()
            };
            units.units.iter().map(|unit| name(unit).join(" ")).collect()
        };
        assert_eq!(names(&example(0, 1)), ["positions", "tokens", "a.norm a", "b", "norm"]);
        let merged = example(1 << 20, 1);
        assert_eq!(
            merged.units.iter().find(|unit| !unit.shared.is_empty()).map(|unit| unit.shared.clone()),
            Some(vec![0, 3])
        );
        assert_eq!(merged.units.last().map(|unit| unit.blocks.clone()), Some(vec![2, 3]));
        assert_eq!(merged.units.last().map(|unit| unit.partial), Some(16));
    }
}
