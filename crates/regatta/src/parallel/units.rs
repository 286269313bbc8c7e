//! Units: which parameters lie beside each other in memory and are communicated together, and the part of each that a
//! rank owns.

use crate::layers::Made;
use regatta_plan::{Piece, Plan};
use std::ops::Range;

/// Parameters start on a cache line, in elements.
const ALIGN: usize = 16;

/// Parameters in one run of memory: those of one block or of several small ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The parameters, as indices into [`Units::params`], with where each begins.
    pub params: Vec<(usize, usize)>,
    /// Elements, the padding between parameters and at the end included: each of the shards is as long.
    pub len: usize,
    /// The blocks that use it on this rank.
    pub blocks: Vec<usize>,
    /// The first elements, up to this one, have gradients that are summed over the tensor axis.
    pub partial: usize,
    /// The blocks that use it on any rank, where these are several that lie apart: a tied embedding.
    pub shared: Vec<usize>,
}

/// The parameters of one rank in units.
#[derive(Debug, Clone)]
pub struct Units {
    /// The parameters, in the order in which the model made them.
    pub params: Vec<Made>,
    /// The units, in the order of their first blocks.
    pub units: Vec<Unit>,
    /// Where each parameter lies: unit and first element.
    places: Vec<(usize, usize)>,
    /// Ranks that each unit is sharded over.
    pub shards: usize,
}

impl Units {
    /// Lays `params` out. Consecutive blocks of one of `chunks` go together as long as they have at most `cap` bytes, or
    /// each lies alone with a cap of 0; what several blocks share is a unit of its own.
    pub fn new(params: Vec<Made>, chunks: &[Range<usize>], cap: usize, shards: usize) -> Self {
        let held = |block: &usize| chunks.iter().any(|chunk| chunk.contains(block));
        let chunk_of = |block: usize| chunks.iter().position(|chunk| chunk.contains(&block));
        let bytes = |params: &[usize], all: &[Made]| -> usize {
            params.iter().map(|&index| len(&all[index]).next_multiple_of(ALIGN) * size_of::<f32>()).sum()
        };
        // By first block here, then by name of all blocks: parameters that the same blocks use are together.
        let mut groups: Vec<(Vec<usize>, Vec<usize>)> = vec![];
        for (index, made) in params.iter().enumerate() {
            match groups.iter_mut().find(|(blocks, _)| *blocks == made.blocks) {
                Some((_, members)) => members.push(index),
                None => groups.push((made.blocks.clone(), vec![index])),
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
            members.sort_by_key(|&index| !params[index].partial);
            let (mut end, mut partial) = (0, 0);
            let mut placed = vec![];
            for index in members {
                placed.push((index, end));
                places[index] = (units.len(), end);
                end += len(&params[index]).next_multiple_of(ALIGN);
                if params[index].partial {
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

    /// Lays the parameters of a rank that holds `chunks` out as `plan` says.
    pub fn of_plan(params: Vec<Made>, chunks: &[Range<usize>], plan: &Plan) -> Self {
        let bytes: usize = params.iter().map(|made| len(made) * size_of::<f32>()).sum();
        // What is gathered just before a block and dropped behind it is a unit for each block.
        let whole = plan.zero == 3 && plan.shards() > 1;
        let cap = if whole { 0 } else { regatta_plan::bucket_cap(bytes, plan.bucket_bytes) };
        Self::new(params, chunks, cap, plan.shards())
    }

    /// Where a parameter lies: its unit, and its elements there.
    pub fn place(&self, param: usize) -> (usize, Range<usize>) {
        let (unit, start) = self.places[param];
        (unit, start..start + len(&self.params[param]))
    }

    /// The units whose parameters `block` uses.
    pub fn of_block(&self, block: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.units.len()).filter(move |&unit| self.units[unit].blocks.contains(&block))
    }

    /// Elements of all units that each rank owns.
    pub fn owned(&self) -> usize {
        self.units.iter().map(|unit| unit.len / self.shards).sum()
    }

    /// The elements of a unit that the `shard`-th rank owns.
    pub fn shard(&self, unit: usize, shard: usize) -> Range<usize> {
        let each = self.units[unit].len / self.shards;
        each * shard..each * (shard + 1)
    }

    /// The parameters of a unit as far as they lie in `range` of it: index, elements of the range, elements of the
    /// parameter.
    pub fn segments(&self, unit: usize, range: Range<usize>) -> impl Iterator<Item = Segment> + '_ {
        self.units[unit].params.iter().filter_map(move |&(param, start)| {
            let end = start + len(&self.params[param]);
            let (from, to) = (start.max(range.start), end.min(range.end));
            let segment = || Segment {
                param,
                within: from - range.start..to - range.start,
                of: from - start..to - start,
            };
            (from < to).then(segment)
        })
    }

    /// What this rank holds of a parameter, all shards together.
    pub fn piece(&self, param: usize) -> Piece {
        let made = &self.params[param];
        let dims: Vec<usize> = made.spec.dims.iter().map(|dim| dim.size).collect();
        Piece::boxed(&dims, &made.ranges)
    }

    /// Elements of all parameters on this rank, all shards together and without padding.
    pub fn num_params(&self) -> usize {
        self.params.iter().map(len).sum()
    }
}

/// Part of a parameter in part of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The parameter.
    pub param: usize,
    /// Its elements in the part of the unit.
    pub within: Range<usize>,
    /// The same as elements of the parameter.
    pub of: Range<usize>,
}

/// Elements that a rank holds of a parameter.
pub(crate) fn len(made: &Made) -> usize {
    made.ranges.iter().map(Range::len).product()
}

#[cfg(test)]
mod tests {
    use super::*;
    use regatta_plan::{Dim, TensorSpec};

    fn made(path: &str, size: usize, blocks: &[usize], partial: bool) -> Made {
        let dims = vec![Dim { name: "embed".into(), size }];
        let spec = TensorSpec { path: path.into(), dims, shape: vec![size] };
        Made {
            spec,
            ranges: std::iter::once(0..size).collect(),
            blocks: blocks.to_vec(),
            partial,
            statistic: false,
        }
    }

    fn example(cap: usize, shards: usize) -> Units {
        let params = vec![
            made("tokens", 100, &[0, 3], false),
            made("positions", 20, &[0], true),
            made("a", 30, &[1], false),
            made("a.norm", 7, &[1], true),
            made("b", 30, &[2], false),
            made("norm", 9, &[3], true),
        ];
        Units::new(params, &[0..2, 2..4], cap, shards)
    }

    #[test]
    fn every_parameter_has_a_place_and_shards_cover_all() {
        for cap in [0, 200, 1 << 20] {
            for shards in [1, 2, 3] {
                let units = example(cap, shards);
                let mut seen = vec![0usize; units.params.len()];
                for unit in 0..units.units.len() {
                    let mut end = 0;
                    for &(param, start) in &units.units[unit].params {
                        assert!(start >= end && start.is_multiple_of(ALIGN));
                        end = start + len(&units.params[param]);
                        assert_eq!(units.place(param), (unit, start..end));
                    }
                    assert!(end <= units.units[unit].len);
                    for shard in 0..shards {
                        for segment in units.segments(unit, units.shard(unit, shard)) {
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
    fn blocks_merge_within_a_chunk_and_what_is_shared_lies_alone() {
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
