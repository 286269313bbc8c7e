//! What one training step communicates, told from the plan alone: every operation of every rank with its bytes.
//!
//! The formulas: gradients are all-reduced, 2(n-1)/n of their bytes per rank in a ring; under ZeRO 1 and 2 they are
//! reduce-scattered and parameters gathered, together as much; under ZeRO 3 parameters are gathered twice, 3/2 as much
//! (Rajbhandari et al. 2020, "ZeRO", section 7). A transformer layer that is split takes two all-reduces forward and two
//! backward (Shoeybi et al. 2019, "Megatron-LM", section 3). Stages hand on activations and their gradients.

mod gathers;
mod ring;

use super::config::Config;
use crate::layers::Placement;
use crate::models::{BlockCost, Border, Crossing};
use crate::parallel::{Carried, Purpose, Share, line};
use regatta_comm::{Kind, Volume};
use regatta_plan::{AXES, Direction, Plan, PlanError, Recompute, Task};
use std::collections::BTreeMap;
use std::ops::Range;

const F32: usize = size_of::<f32>();
const F64: usize = size_of::<f64>();

/// Operations of one step that are alike, as one rank sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collective {
    /// What they are for.
    pub purpose: Purpose,
    /// The axes whose ranks take part, as in `replica,data`.
    pub over: String,
    /// Ranks that take part.
    pub ranks: usize,
    /// The operation.
    pub kind: Kind,
    /// How many.
    pub count: usize,
    /// Bytes of each, of its larger side.
    pub bytes: usize,
    /// Bytes that this rank gives to others in each, where collective operations go around a ring.
    pub sent: usize,
    /// Where in the step, as in `layer 3: attention out, forward`.
    pub place: String,
}

impl Collective {
    /// All of them together.
    pub fn volume(&self) -> Volume {
        let all = |bytes: usize| (self.count * bytes) as u64;
        Volume { operations: self.count as u64, bytes: all(self.bytes), sent: all(self.sent) }
    }
}

/// Sums by purpose and kind, to hold against what the ranks have counted.
pub fn total(collectives: &[Collective]) -> Carried {
    let mut carried = Carried::default();
    collectives.iter().for_each(|one| carried.add(one.purpose, one.kind, one.volume()));
    carried
}

/// One rank's part of a plan on paper.
pub struct Outline<'a> {
    config: &'a Config,
    plan: &'a Plan,
    /// The rank.
    pub rank: usize,
    /// What it holds and when it works.
    pub share: Share,
    /// All blocks, and what they cost.
    pub blocks: Vec<BlockCost>,
    /// By block: numbers that it hands on for one micro-batch.
    handed_on: Vec<usize>,
}

impl<'a> Outline<'a> {
    /// That of `rank`, for a vocabulary of `vocab` tokens (or so many classes).
    ///
    /// # Errors
    /// A plan that the model cannot follow, as [`Config::check_plan`] says.
    pub fn new(config: &'a Config, plan: &'a Plan, vocab: usize, rank: usize) -> Result<Self, PlanError> {
        config.check_plan(plan, vocab)?;
        let costs = config.model.costs(vocab);
        let cut = plan.cut(&costs.iter().map(|cost| cost.flops).collect::<Vec<_>>())?;
        let stage = plan.mesh.coordinate(rank, "pipe");
        let placement = Placement {
            mesh: plan.mesh.clone(),
            layout: plan.layout.clone(),
            rank,
            tensor: None,
            sequence: plan.sequence,
        };
        let own: Vec<usize> = cut.iter().skip(stage).step_by(plan.stages()).cloned().flatten().collect();
        let mut made = config.model.describe(vocab, placement.clone());
        made.retain(|made| made.blocks.iter().any(|block| own.contains(block)));
        let shapes = config.model.handed_on(vocab, placement, plan.micro_batch());
        let numbers =
            |shapes: &Vec<Vec<usize>>| shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        Ok(Self {
            config,
            plan,
            rank,
            share: Share::new(made, plan, &cut, stage)?,
            blocks: costs,
            handed_on: shapes.iter().map(numbers).collect(),
        })
    }

    /// Everything that the rank communicates in one training step, by purpose.
    pub fn collectives(&self) -> Vec<Collective> {
        let mut all = self.gradients();
        all.extend(self.parameters());
        all.extend(self.layers());
        all.extend(self.messages());
        all.extend(self.agreement());
        all
    }

    /// `count` operations on `numbers` (of the larger side) over `axes`; none where there is nobody to talk to.
    fn collective(
        &self,
        (purpose, axes): (Purpose, &[&str]),
        (kind, count): (Kind, usize),
        (numbers, width): (usize, usize),
        place: String,
    ) -> Option<Collective> {
        let members = line(&self.plan.mesh, self.rank, axes);
        let ranks = members.len();
        let own = members.iter().position(|&rank| rank == self.rank)?;
        let several: Vec<&str> = axes.iter().filter(|axis| self.plan.mesh.axis(axis) > 1).copied().collect();
        let (bytes, sent) = (numbers * width, ring::sent(kind, numbers, ranks, own) * width);
        let over = several.join(",");
        (ranks > 1 && count > 0).then_some(Collective {
            purpose,
            over,
            ranks,
            kind,
            count,
            bytes,
            sent,
            place,
        })
    }

    fn name(&self, block: usize) -> &str {
        &self.blocks[block].name
    }

    /// The blocks of a unit by name.
    fn unit_name(&self, unit: usize) -> String {
        let unit = &self.share.units.units[unit];
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

    /// Of every unit: the average over the workers, and the sums where ranks or stages have parts of a gradient.
    fn gradients(&self) -> Vec<Collective> {
        let (share, mut all) = (&self.share, vec![]);
        for (index, unit) in share.units.units.iter().enumerate() {
            let own = unit.len / share.units.shards;
            // From ZeRO 2 on nothing but a shard is kept, so every micro-batch's gradients go there.
            let count = if share.zero >= 2 { share.flushes[index] } else { 1 };
            let mut add = |axes: &[&str], kind, count, numbers, what: &str| {
                let place = format!("{}: {what}", self.unit_name(index));
                all.extend(self.collective((Purpose::Gradients, axes), (kind, count), (numbers, F32), place));
            };
            if unit.partial > 0 {
                add(&["tensor"], Kind::AllReduce, count, unit.partial, "gradients of parts of the sequence");
            }
            if share.zero == 0 {
                add(&["replica", "data"], Kind::AllReduce, count, unit.len, "gradients");
            } else {
                add(&["data"], Kind::ReduceScatter, count, unit.len, "gradients");
                add(&["replica"], Kind::AllReduce, 1, own, "gradients of this rank's shard");
            }
            all.extend(self.tie(index, own));
        }
        all
    }

    /// The sum of a unit's gradients over the stages that share it.
    fn tie(&self, unit: usize, numbers: usize) -> Option<Collective> {
        let stages = &self.share.ties[unit];
        let own = stages.iter().position(|&stage| stage == self.share.stage)?;
        Some(Collective {
            purpose: Purpose::Gradients,
            over: "pipe".into(),
            ranks: stages.len(),
            kind: Kind::AllReduce,
            count: 1,
            bytes: numbers * F32,
            sent: ring::sent(Kind::AllReduce, numbers, stages.len(), own) * F32,
            place: format!("{}: gradients of all stages", self.unit_name(unit)),
        })
    }

    /// The gathering of sharded parameters.
    fn parameters(&self) -> Vec<Collective> {
        let share = &self.share;
        let (counts, what) = match share.zero {
            0 => return vec![],
            3 => (gathers::gathers(share, self.plan.prefetch, self.plan.recompute), "for its use"),
            _ => (vec![1; share.units.units.len()], "after the update"),
        };
        let gather = |(index, count): (usize, usize)| {
            let place = format!("{}: parameters, {what}", self.unit_name(index));
            let numbers = share.units.units[index].len;
            self.collective((Purpose::Parameters, &["data"]), (Kind::AllGather, count), (numbers, F32), place)
        };
        counts.into_iter().enumerate().filter_map(gather).collect()
    }

    /// What layers that are split over ranks exchange.
    fn layers(&self) -> Vec<Collective> {
        let (plan, share, mut all) = (self.plan, &self.share, vec![]);
        let micros = plan.accumulate;
        for block in share.chunks.iter().cloned().flatten() {
            let ends = share.chunks.iter().any(|chunk| chunk.end == block + 1);
            let again = match plan.recompute {
                Recompute::None => 0,
                // The graph of the block before the loss is used at once.
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
                    let over: (_, &[&str]) = (Purpose::Tensor, &["tensor"]);
                    all.extend(self.collective(over, (kind, times * micros), (numbers, F32), place));
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

    /// What this stage sends to others and receives from them.
    fn messages(&self) -> Vec<Collective> {
        let Share { stage, schedule, chunks, .. } = &self.share;
        let before = |blocks: &Range<usize>| self.handed_on[blocks.start - 1];
        let behind = |blocks: &Range<usize>| self.handed_on[blocks.end - 1];
        let mut found: BTreeMap<(Direction, bool, usize, usize), (usize, usize)> = BTreeMap::new();
        let mut add = |direction, sends, peer, chunk, numbers| {
            let entry = found.entry((direction, sends, peer, chunk)).or_insert((0, numbers));
            entry.0 += 1;
        };
        for task in &schedule.tasks[*stage] {
            let Some((direction, to, _)) = schedule.receiver(*stage, *task) else { continue };
            let blocks = &chunks[task.chunk()];
            let numbers = if matches!(task, Task::Forward { .. }) { behind(blocks) } else { before(blocks) };
            if to != *stage {
                add(direction, true, to, task.chunk(), numbers);
            }
        }
        for (from, _, direction) in schedule.links().into_iter().filter(|(_, to, _)| to == stage) {
            for (chunk, _) in schedule.messages(from, *stage, direction) {
                let blocks = &chunks[chunk];
                let numbers =
                    if direction == Direction::Activation { before(blocks) } else { behind(blocks) };
                add(direction, false, from, chunk, numbers);
            }
        }
        let message = |((direction, sends, peer, chunk), (count, numbers)): ((_, _, _, usize), _)| {
            let what = if direction == Direction::Activation { "activations" } else { "their gradients" };
            let way = if sends { "sent to" } else { "received from" };
            let of = if chunks.len() > 1 { format!(" of chunk {chunk}") } else { String::new() };
            let bytes = numbers * F32;
            Collective {
                purpose: Purpose::Pipeline,
                over: "pipe".into(),
                ranks: 2,
                kind: Kind::Send,
                count,
                bytes,
                sent: if sends { bytes } else { 0 },
                place: format!("{what}{of}, {way} stage {peer}"),
            }
        };
        found.into_iter().map(message).collect()
    }

    /// The end of a step: the gradient's norm; and the loss, whether to stop, whether a checkpoint is written, whether one
    /// is due.
    fn agreement(&self) -> Vec<Collective> {
        let model = crate::parallel::Axes::model_axes(self.plan.shards() > 1);
        let once = (Kind::AllReduce, 1);
        let norm = self.collective((Purpose::Control, model), once, (1, F64), "norm of the gradient".into());
        let loss = self.collective((Purpose::Control, &AXES), once, (4, F64), "loss and end".into());
        norm.into_iter().chain(loss).collect()
    }
}

/// What a border takes forward and backward.
fn operations(border: &Border, sequence: bool) -> (Option<Kind>, Option<Kind>) {
    match (border.crossing, sequence) {
        (Crossing::Enter, false) => (None, Some(Kind::AllReduce)),
        (Crossing::Enter, true) => (Some(Kind::AllGather), Some(Kind::ReduceScatter)),
        (Crossing::Leave, false) | (Crossing::Reduce, _) => (Some(Kind::AllReduce), None),
        (Crossing::Leave, true) => (Some(Kind::ReduceScatter), Some(Kind::AllGather)),
    }
}
