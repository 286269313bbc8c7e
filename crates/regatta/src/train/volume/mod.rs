//! Computes from the plan alone what one training step communicates: every operation of every rank with its bytes.
//!
//! The plan's exchange defines what workers exchange. Without sharding, gradients are all-reduced: each rank sends
//! 2(n-1)/n of their bytes in a ring. Under ZeRO 1 and 2 they are reduce-scattered and parameters gathered, which is
//! as much in all. Under ZeRO 3 parameters are gathered twice, which is 3/2 as much (Rajbhandari et al. 2020, "ZeRO",
//! section 7). A split transformer layer takes two all-reduces forward and two backward (Shoeybi et al. 2019,
//! "Megatron-LM", section 3). Stages send activations and their gradients to each other.

mod gathers;
mod ring;

use crate::config::Config;
use crate::models::{BlockCost, Border, Crossing};
use crate::parallel::{Carried, Purpose, RankPlan, model_axes};
use crate::params::{PlacedParam, Placement};
use regatta_comm::{Kind, Volume};
use regatta_plan::{
    Axis, AxisSet, Content, Direction, Local, Operation, Plan, PlanError, Recompute, Task, UnitOperation,
    UnitUse,
};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();
/// Bytes of an f64.
const F64: usize = size_of::<f64>();
/// Values in the all-reduce at the end of a step: loss, stop, written, save, and targets that count.
const VALUES_AT_END: usize = 5;

/// Who takes part in what goes between a worker and the parameter servers.
pub(super) const SERVERS: &str = "servers";

/// Equal operations of one rank in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collective {
    /// Their purpose.
    pub purpose: Purpose,
    /// The axes whose ranks take part, as in `replica,data`.
    pub over: String,
    /// Number of ranks that take part.
    pub ranks: usize,
    /// The operation.
    pub kind: Kind,
    /// Number of operations.
    pub count: usize,
    /// Steps from one in which they take place to the next.
    pub every: u64,
    /// Bytes of each; of input and output, the larger one counts.
    pub bytes: usize,
    /// Bytes that this rank sends to others in each, if the algorithm is a ring, or pairwise for what goes from all to all.
    pub sent: usize,
    /// The place in the step, as in `layer 3: attention out, forward`.
    pub place: String,
}

impl Collective {
    /// The sums over all these operations, in a step in which they take place.
    pub fn volume(&self) -> Volume {
        let all = |bytes: usize| (self.count * bytes) as u64;
        Volume { operations: self.count as u64, bytes: all(self.bytes), sent: all(self.sent) }
    }
}

/// Sums by purpose and kind of a step in which everything takes place, to compare with the ranks' own counts.
pub fn total(collectives: &[Collective]) -> Carried {
    let mut carried = Carried::default();
    collectives.iter().for_each(|one| carried.add(one.purpose, one.kind, one.volume()));
    carried
}

/// A parameter as one rank holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldParam {
    /// Its name in checkpoints.
    pub path: String,
    /// Its shape in the whole model.
    pub shape: Vec<usize>,
    /// For each named dimension, the range that the rank holds.
    pub slice: Vec<(String, Range<usize>)>,
    /// The index of its unit; a unit's parameters are communicated together.
    pub unit: usize,
    /// The elements of that part that the rank owns and updates; none if other ranks own all of them.
    pub shard: Option<Range<usize>>,
}

/// One rank's part of a plan: what it holds and communicates, without running it.
pub struct Outline<'a> {
    config: &'a Config,
    plan: &'a Plan,
    /// The rank.
    pub rank: usize,
    rank_plan: RankPlan,
    /// The costs of all blocks.
    pub blocks: Vec<BlockCost>,
    /// By block: number of values that it returns for one micro-batch.
    outputs: Vec<usize>,
}

impl<'a> Outline<'a> {
    /// The part of `rank`, for `vocab` tokens or classes.
    ///
    /// # Errors
    /// The model does not support the plan, as [`Config::check_plan`] reports.
    pub fn new(config: &'a Config, plan: &'a Plan, vocab: usize, rank: usize) -> Result<Self, PlanError> {
        config.check_plan(plan, vocab)?;
        let costs = config.model.costs(vocab);
        let placement = Placement {
            mesh: plan.mesh.clone(),
            layout: plan.layout.clone(),
            rank,
            tensor: None,
            sequence: plan.sequence,
        };
        let model = |error: crate::error::Error| PlanError::Model(error.to_string());
        let params = config.model.describe(vocab, placement.clone()).map_err(model)?;
        let shapes = config.model.output_shapes(vocab, placement, plan.micro_batch()).map_err(model)?;
        let numbers =
            |shapes: &Vec<Vec<usize>>| shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        Ok(Self {
            config,
            plan,
            rank,
            rank_plan: RankPlan::new(params, plan, &costs, rank)?,
            blocks: costs,
            outputs: shapes.iter().map(numbers).collect(),
        })
    }

    /// The rank's stage in the pipeline.
    pub fn stage(&self) -> usize {
        self.rank_plan.stage
    }

    /// Number of elements of all parameters on the rank, all shards together.
    pub fn num_params(&self) -> usize {
        self.rank_plan.units.num_params()
    }

    /// Number of these elements that the rank owns, including padding.
    pub fn owned(&self) -> usize {
        self.rank_plan.units.owned()
    }

    /// Every parameter that the rank holds.
    pub fn params(&self) -> Vec<HeldParam> {
        let units = &self.rank_plan.units;
        let shard = self.rank_plan.shard;
        let held = |(index, param): (usize, &PlacedParam)| {
            let (unit, _) = units.place(index);
            let dims = param.spec.dims.iter().zip(&param.ranges);
            let own = units.segments(unit, units.shard(unit, shard)).find(|segment| segment.param == index);
            HeldParam {
                path: param.spec.path.clone(),
                shape: param.spec.shape.clone(),
                slice: dims.map(|(dim, range)| (dim.name.clone(), range.clone())).collect(),
                unit,
                shard: own.map(|segment| segment.of),
            }
        };
        units.params.iter().enumerate().map(held).collect()
    }

    /// All operations of the rank in one training step, by purpose.
    pub fn collectives(&self) -> Vec<Collective> {
        let mut all = self.exchange();
        all.extend(self.layers());
        all.extend(self.messages());
        all.extend(self.agreement());
        all
    }

    /// `count` operations over the axes `over`. Of input and output, the larger one has `numbers` values of `width`
    /// bytes. None if no other rank takes part.
    fn collective(
        &self,
        (purpose, over): (Purpose, AxisSet),
        (kind, count, every): (Kind, usize, u64),
        (numbers, width): (usize, usize),
        place: String,
    ) -> Option<Collective> {
        let members = self.plan.mesh.ranks_over(self.rank, over);
        let ranks = members.len();
        let own = members.iter().position(|&rank| rank == self.rank)?;
        let (bytes, sent) = (numbers * width, ring::sent(kind, numbers, ranks, own) * width);
        let over = self.plan.mesh.longer_than_one(over).to_string();
        (ranks > 1 && count > 0).then_some(Collective {
            purpose,
            over,
            ranks,
            kind,
            count,
            every,
            bytes,
            sent,
            place,
        })
    }

    fn name(&self, block: usize) -> &str {
        &self.blocks[block].name
    }

    /// A name for a unit, from the names of its blocks.
    fn unit_name(&self, unit: usize) -> String {
        let unit = &self.rank_plan.units.units[unit];
        let blocks = if unit.shared.is_empty() { &unit.blocks } else { &unit.shared };
        match &blocks[..] {
            _ if !unit.shared.is_empty() => {
                let names: Vec<&str> = blocks.iter().map(|&block| self.name(block)).collect();
                format!("shared by {}", names.join(" and "))
            }
            [first, .., last] => format!("{} to {}", self.name(*first), self.name(*last)),
            [block] => self.name(*block).into(),
            [] => "no block".into(),
        }
    }

    /// The exchange of every unit between workers, and the sums of gradients of which ranks or stages have parts.
    fn exchange(&self) -> Vec<Collective> {
        let (rank, exchange) = (&self.rank_plan, self.plan.exchange());
        let gathers = if exchange.gathers_on_use() {
            gathers::gathers(rank, self.plan.prefetch, self.plan.recompute)
        } else {
            vec![0; rank.units.units.len()]
        };
        let (mut gradients, mut parameters) = (vec![], vec![]);
        for (index, unit) in rank.units.units.iter().enumerate() {
            let name = self.unit_name(index);
            let flushes = rank.flushes[index];
            if unit.partial > 0 {
                let count = if exchange.sends_each_micro_batch() { flushes } else { 1 };
                let place = format!("{name}: gradients of parts of the sequence");
                let over = (Purpose::Gradients, Axis::Tensor.into());
                gradients.extend(self.collective(
                    over,
                    (Kind::AllReduce, count, 1),
                    (unit.partial, F32),
                    place,
                ));
            }
            let shapes = rank.units.shapes(index);
            let matrices: Vec<[usize; 2]> = shapes.matrices.iter().map(|(_, shape)| *shape).collect();
            let vectors = shapes.vectors.iter().map(Range::len).sum();
            let unit_use =
                UnitUse { len: unit.len, flushes, gathers: gathers[index], matrices: &matrices, vectors };
            for one in exchange.operations(unit_use) {
                let (purpose, all) = match one.content {
                    Content::Gradients => (Purpose::Gradients, &mut gradients),
                    Content::Parameters => (Purpose::Parameters, &mut parameters),
                };
                let place = format!("{name}: {}", one.what);
                match one.operation {
                    Operation::Neighbours => all.extend(self.to_neighbours(&one, &place)),
                    Operation::ToServers | Operation::FromServers => {
                        all.push(self.with_servers(purpose, &one, place));
                    }
                    _ => {
                        let kind = (kind_of(one.operation), one.count, one.every);
                        all.extend(self.collective(
                            (purpose, one.over),
                            kind,
                            (one.numbers, one.width),
                            place,
                        ));
                    }
                }
            }
            gradients.extend(self.tie(index, unit.len / rank.units.shards));
        }
        [gradients, parameters].concat()
    }

    /// What islands send their neighbours, and receive from them.
    fn to_neighbours(&self, one: &UnitOperation, place: &str) -> [Collective; 2] {
        let (bytes, ranks) = (one.numbers * one.width, self.plan.mesh.axis(Axis::Replica));
        [("", bytes), (", received", 0)].map(|(way, sent)| Collective {
            purpose: Purpose::Parameters,
            over: Axis::Replica.to_string(),
            ranks,
            kind: Kind::Send,
            count: (ranks - 1).min(2) * one.count,
            every: one.every,
            bytes,
            sent,
            place: format!("{place}{way}"),
        })
    }

    /// What goes between this worker and the parameter servers, all of them together.
    fn with_servers(&self, purpose: Purpose, one: &UnitOperation, place: String) -> Collective {
        let bytes = one.numbers * one.width;
        Collective {
            purpose,
            over: SERVERS.into(),
            ranks: 1 + self.plan.servers.count,
            kind: Kind::Send,
            count: one.count,
            every: one.every,
            bytes,
            sent: if one.operation == Operation::ToServers { bytes } else { 0 },
            place,
        }
    }

    /// The sum of a unit's gradients over the stages that share it.
    fn tie(&self, unit: usize, numbers: usize) -> Option<Collective> {
        let stages = &self.rank_plan.ties[unit];
        let own = stages.iter().position(|&stage| stage == self.rank_plan.stage)?;
        Some(Collective {
            purpose: Purpose::Gradients,
            over: "pipe".into(),
            ranks: stages.len(),
            kind: Kind::AllReduce,
            count: 1,
            every: 1,
            bytes: numbers * F32,
            sent: ring::sent(Kind::AllReduce, numbers, stages.len(), own) * F32,
            place: format!("{}: gradients of all stages", self.unit_name(unit)),
        })
    }

    /// The operations of layers that are split over ranks.
    fn layers(&self) -> Vec<Collective> {
        let (plan, rank, mut all) = (self.plan, &self.rank_plan, vec![]);
        let micro_batches = plan.accumulate;
        for block in rank.chunks.iter().cloned().flatten() {
            let ends = rank.chunks.iter().any(|chunk| chunk.end == block + 1);
            let again = match plan.recompute {
                Recompute::None => 0,
                // The last block is not recomputed: backward uses its graph immediately.
                Recompute::Block => usize::from(block + 1 < self.blocks.len()),
                Recompute::All => 1 + usize::from(!ends),
            };
            for border in self.config.model.borders(block) {
                if plan.layout.axis(&plan.mesh, border.dim).is_none() {
                    continue;
                }
                let numbers = plan.micro_batch() * border.numbers;
                let mut add = |kind, times: usize, way: &str| {
                    let place = format!("{}: {}, {way}", self.name(block), border.what);
                    let over = (Purpose::Tensor, Axis::Tensor.into());
                    all.extend(self.collective(
                        over,
                        (kind, times * micro_batches, 1),
                        (numbers, F32),
                        place,
                    ));
                };
                let (forward, backward) = operations(&border, plan.sequence);
                if let Some(forward) = forward {
                    add(forward, 1, "forward");
                    if again > 0 {
                        add(forward, again, "forward again");
                    }
                }
                if let Some(backward) = backward {
                    add(backward, 1, "backward");
                }
            }
        }
        all
    }

    /// The messages that this stage sends and receives.
    fn messages(&self) -> Vec<Collective> {
        let RankPlan { stage, schedule, chunks, .. } = &self.rank_plan;
        let before = |blocks: &Range<usize>| self.outputs[blocks.start - 1];
        let after = |blocks: &Range<usize>| self.outputs[blocks.end - 1];
        let mut found: BTreeMap<(Direction, bool, usize, usize), (usize, usize)> = BTreeMap::new();
        let mut add = |direction, sends, peer, chunk, numbers| {
            let entry = found.entry((direction, sends, peer, chunk)).or_insert((0, numbers));
            entry.0 += 1;
        };
        for task in &schedule.tasks[*stage] {
            let Some((direction, to, _)) = schedule.receiver(*stage, *task) else { continue };
            let blocks = &chunks[task.chunk()];
            let numbers = if matches!(task, Task::Forward { .. }) { after(blocks) } else { before(blocks) };
            if to != *stage {
                add(direction, true, to, task.chunk(), numbers);
            }
        }
        for (from, _, direction) in schedule.links().into_iter().filter(|(_, to, _)| to == stage) {
            for (chunk, _) in schedule.messages(from, *stage, direction) {
                let blocks = &chunks[chunk];
                let numbers = if direction == Direction::Activation { before(blocks) } else { after(blocks) };
                add(direction, false, from, chunk, numbers);
            }
        }
        let message = |((direction, sends, peer, chunk), (count, numbers)): ((_, _, _, usize), _)| {
            let what = if direction == Direction::Activation { "activations" } else { "their gradients" };
            let way = if sends { "sent to" } else { "received from" };
            let of = if chunks.len() > 1 { format!(" of chunk {chunk}") } else { String::new() };
            let bytes = self.plan.compress.message(numbers);
            Collective {
                purpose: Purpose::Pipeline,
                over: "pipe".into(),
                ranks: 2,
                kind: Kind::Send,
                count,
                every: 1,
                bytes,
                sent: if sends { bytes } else { 0 },
                place: format!("{what}{of}, {way} stage {peer}"),
            }
        };
        found.into_iter().map(message).collect()
    }

    /// The operations at the end of a step: the gradient's norm, and the values in [`VALUES_AT_END`].
    fn agreement(&self) -> Vec<Collective> {
        let model = model_axes(self.plan);
        let once = (Kind::AllReduce, 1, 1);
        if self.plan.servers.is_free() {
            return vec![];
        }
        let norm = self.collective((Purpose::Control, model), once, (1, F64), "norm of the gradient".into());
        let values = (VALUES_AT_END, F64);
        let distance = self.plan.local().map_or(1, Local::agreement);
        let all = (Kind::AllReduce, 1, distance);
        let loss = self.collective((Purpose::Control, AxisSet::ALL), all, values, "loss and end".into());
        let island = AxisSet::ALL.without(Axis::Replica.into());
        let loss_of_island = (distance > 1)
            .then(|| self.collective((Purpose::Control, island), once, values, "loss of the island".into()))
            .flatten();
        [norm, loss, loss_of_island].into_iter().flatten().collect()
    }
}

fn kind_of(operation: Operation) -> Kind {
    match operation {
        Operation::ReduceScatter => Kind::ReduceScatter,
        Operation::AllGather => Kind::AllGather,
        Operation::AllToAll => Kind::AllToAll,
        _ => Kind::AllReduce,
    }
}

/// The operations of a border in forward and in backward.
fn operations(border: &Border, sequence: bool) -> (Option<Kind>, Option<Kind>) {
    match (border.crossing, sequence) {
        (Crossing::Enter, false) => (None, Some(Kind::AllReduce)),
        (Crossing::Enter, true) => (Some(Kind::AllGather), Some(Kind::ReduceScatter)),
        (Crossing::Leave, false) | (Crossing::Reduce, _) => (Some(Kind::AllReduce), None),
        (Crossing::Leave, true) => (Some(Kind::ReduceScatter), Some(Kind::AllGather)),
    }
}
