//! Checks whether a plan fits the stated memory of a rank, and finds the nearest plan that does.

use crate::config::{Config, OptimizerKind};
use crate::models::BlockCost;
use crate::params::{PlacedParam, Placement, Units};
use regatta_plan::{Axis, BlockLoad, Footprint, Load, Mesh, Plan, PlanError, Recompute, mebibytes};
use std::fmt;

/// Limit of the search for a plan that fits, in elementary steps; they take about a second. Plans of the given mesh
/// are tried first.
const MOST_WORK: usize = 50_000_000;
/// Passes over all parameters that the loads of a plan take, in addition to one per stage.
const PASSES_OVER_PARAMS: usize = 8;
/// Plans that are tried for a schedule: three kinds of recomputation, each with and without offloading.
const PLANS_OF_A_SCHEDULE: usize = 6;

/// A plan needs more memory than is stated.
#[derive(Debug, Clone, PartialEq)]
pub struct Misfit {
    /// The stage whose ranks need most memory, and a rank's memory by kind.
    pub fullest: (usize, Footprint),
    /// The stated memory of a rank in bytes.
    pub limit: usize,
    /// The plan that fits with the fewest changes, or else the one that needs the least memory.
    pub other: Option<Box<Change>>,
}

/// Another plan for the same training.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The plan.
    pub plan: Plan,
    /// The command-line flags that change the given plan to this one.
    pub flags: Vec<String>,
    /// Bytes of the rank that needs most.
    pub bytes: usize,
}

impl std::error::Error for Misfit {}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stage, footprint) = &self.fullest;
        write!(
            f,
            "the plan needs {} on a rank of stage {stage} ({footprint}), but parallel.memory_mib states {}; ",
            mebibytes(footprint.total()),
            mebibytes(self.limit)
        )?;
        match &self.other {
            Some(other) if other.bytes <= self.limit => {
                let (bytes, flags) = (mebibytes(other.bytes), other.flags.join(" "));
                write!(f, "the nearest plan that fits needs {bytes}: {flags}")
            }
            Some(other) => {
                let (bytes, flags) = (mebibytes(other.bytes), other.flags.join(" "));
                write!(
                    f,
                    "no plan for this number of ranks fits, the smallest needs {bytes}: {flags}; use more ranks, a smaller \
                     model or a smaller batch"
                )
            }
            None => write!(
                f,
                "found no plan for this number of ranks that needs less; use more ranks, a smaller model or a smaller batch"
            ),
        }
    }
}

impl Config {
    /// The memory of a rank of each stage under `plan`, for `vocab` tokens or classes.
    ///
    /// # Errors
    /// The model does not support the plan: see [`check_plan`](Self::check_plan).
    pub fn footprints(&self, plan: &Plan, vocab: usize) -> Result<Vec<Footprint>, PlanError> {
        let schedule = plan.pipeline()?;
        let loads = Parts::of(self, plan, vocab)?.loads(plan)?;
        let of = |(stage, load)| plan.footprint(&schedule, stage, load, self.moments());
        Ok(loads.iter().enumerate().map(of).collect())
    }

    /// Checks that every rank's part of `plan` fits `parallel.memory_mib`, if that is given. The memory that the
    /// program needs under any plan, some tens of MiB, is not counted.
    ///
    /// # Errors
    /// The plan does not fit; the error has the nearest plan that does.
    pub fn check_memory(&self, plan: &Plan, vocab: usize) -> Result<(), Misfit> {
        let Some(mib) = self.parallel.memory_mib else { return Ok(()) };
        let limit = (mib * f64::from(1 << 20)) as usize;
        // check_plan reports a plan that the model does not support.
        let Ok(footprints) = self.footprints(plan, vocab) else { return Ok(()) };
        let fullest = footprints.into_iter().enumerate().max_by_key(|(_, footprint)| footprint.total());
        match fullest {
            Some(fullest) if fullest.1.total() > limit => {
                let other = self.nearest(plan, vocab, limit, fullest.1.total());
                Err(Misfit { fullest, limit, other })
            }
            _ => Ok(()),
        }
    }

    /// Values of optimizer state per parameter.
    fn moments(&self) -> usize {
        match self.optimizer.kind {
            OptimizerKind::AdamW => 2,
            OptimizerKind::Sgd => usize::from(self.optimizer.momentum > 0.0),
        }
    }

    /// Searches all plans of the same number of ranks for the same batch. Returns the one within `limit` with the
    /// fewest changes, and of those the smallest. If there is none, returns the smallest plan if it needs less than
    /// `bytes`.
    fn nearest(&self, plan: &Plan, vocab: usize, limit: usize, bytes: usize) -> Option<Box<Change>> {
        // The best plan, with its measure: (false, changes, bytes) if it fits, else (true, bytes, changes).
        let mut best: Option<((bool, usize, usize), Plan)> = None;
        let mut work = 0usize;
        'search: for mesh in meshes(&plan.mesh) {
            let Ok(fresh) = Plan::new(mesh, self.batch(), plan.bucket_bytes) else { continue };
            if fresh.global_batch() != plan.global_batch() {
                continue;
            }
            let tensor = fresh.mesh.axis(Axis::Tensor);
            let on_mesh = Plan {
                mesh: fresh.mesh,
                batch_per_worker: fresh.batch_per_worker,
                sequence: self.parallel.sequence && tensor > 1,
                ..plan.clone()
            };
            if self.check_plan(&on_mesh, vocab).is_err() {
                continue;
            }
            let Ok(parts) = Parts::of(self, &on_mesh, vocab) else { continue };
            for zero in 0..=3 {
                work = work
                    .saturating_add(parts.params.len().saturating_mul(on_mesh.stages() + PASSES_OVER_PARAMS));
                if work > MOST_WORK {
                    break 'search;
                }
                let Ok(loads) = parts.loads(&Plan { zero, ..on_mesh.clone() }) else { continue };
                for accumulate in divisors(on_mesh.batch_per_worker) {
                    let cut = Plan { zero, accumulate, ..on_mesh.clone() };
                    let Ok(schedule) = cut.pipeline() else { continue };
                    let tasks: usize = schedule.tasks.iter().map(Vec::len).sum();
                    work = work.saturating_add(PLANS_OF_A_SCHEDULE * tasks);
                    if work > MOST_WORK {
                        break 'search;
                    }
                    for recompute in [Recompute::None, Recompute::Block, Recompute::All] {
                        for offload in [false, true] {
                            let one = Plan { recompute, offload, ..cut.clone() };
                            let of =
                                |(stage, load)| one.footprint(&schedule, stage, load, self.moments()).total();
                            let takes = loads.iter().enumerate().map(of).max().unwrap_or(0);
                            let changes = flags(plan, &one).len();
                            let measure =
                                if takes <= limit { (false, changes, takes) } else { (true, takes, changes) };
                            if best.as_ref().is_none_or(|(least, _)| measure < *least) {
                                best = Some((measure, one));
                            }
                        }
                    }
                }
            }
        }
        let ((too_large, first, second), other) = best?;
        let takes = if too_large { first } else { second };
        let change = Change { flags: flags(plan, &other), plan: other, bytes: takes };
        (takes < bytes && !change.flags.is_empty()).then(|| Box::new(change))
    }
}

/// The model's parameters and blocks on a mesh, before they are cut into stages.
struct Parts {
    params: Vec<PlacedParam>,
    flops: Vec<f64>,
    blocks: Vec<BlockLoad>,
}

impl Parts {
    fn of(config: &Config, plan: &Plan, vocab: usize) -> Result<Self, PlanError> {
        // The part of the first rank of a stage is as large as that of the others.
        let placement = Placement {
            mesh: plan.mesh.clone(),
            layout: plan.layout.clone(),
            sequence: plan.sequence,
            ..Placement::whole()
        };
        let model = |error: crate::error::Error| PlanError::Model(error.to_string());
        let costs = config.model.costs(vocab);
        let split = plan.mesh.axis(Axis::Tensor) as f64;
        let inputs = config.model.input_sizes(vocab).map_err(model)?;
        let block = |(index, cost): (usize, &BlockCost)| {
            let unsplit = if plan.sequence { 0.0 } else { cost.unsplit.min(cost.kept) };
            let input = inputs.get(index).copied().unwrap_or(0.0);
            BlockLoad {
                parameters: 0,
                kept: unsplit + (cost.kept - unsplit) / split,
                input: if plan.sequence { input / split } else { input },
            }
        };
        Ok(Self {
            params: config.model.describe(vocab, placement).map_err(model)?,
            flops: costs.iter().map(|cost| cost.flops).collect(),
            blocks: costs.iter().enumerate().map(block).collect(),
        })
    }

    /// The load of a rank of each stage.
    fn loads(&self, plan: &Plan) -> Result<Vec<Load>, PlanError> {
        let cut = plan.cut(&self.flops)?;
        let load = |stage: usize| {
            let chunks: Vec<_> = cut.iter().skip(stage).step_by(plan.stages()).cloned().collect();
            let held = |param: &&PlacedParam| {
                param.blocks.iter().any(|block| chunks.iter().any(|chunk| chunk.contains(block)))
            };
            let params: Vec<PlacedParam> = self.params.iter().filter(held).cloned().collect();
            let units = Units::of_plan(params, &chunks, plan);
            let len = |unit: usize| units.units[unit].len;
            let block = |block: usize| BlockLoad {
                parameters: units.of_block(block).map(len).sum(),
                ..self.blocks[block]
            };
            Load {
                chunks: chunks.iter().map(|chunk| chunk.clone().map(block).collect()).collect(),
                units: (0..units.units.len()).map(len).collect(),
            }
        };
        Ok((0..plan.stages()).map(load).collect())
    }
}

/// All divisors of `number`, ascending.
fn divisors(number: usize) -> Vec<usize> {
    let small: Vec<usize> = (1..=number.isqrt()).filter(|part| number.is_multiple_of(*part)).collect();
    let large = small.iter().rev().map(|part| number / part).filter(|part| part * part != number);
    small.iter().copied().chain(large).collect()
}

/// All meshes of the same size with the same replicas, the given one first.
fn meshes(given: &Mesh) -> Vec<Mesh> {
    let replica = given.axis(Axis::Replica);
    let rest = given.size() / replica;
    let mut meshes = vec![given.clone()];
    for data in divisors(rest) {
        for tensor in divisors(rest / data) {
            let axes = [
                (Axis::Replica, replica),
                (Axis::Data, data),
                (Axis::Tensor, tensor),
                (Axis::Pipe, rest / data / tensor),
            ];
            if axes.iter().all(|(axis, size)| given.axis(*axis) == *size) {
                continue;
            }
            let longer: Vec<_> = axes.into_iter().filter(|(_, size)| *size > 1).collect();
            meshes.extend(Mesh::new(&longer));
        }
    }
    meshes
}

/// The command-line flags that change `plan` to `other`.
fn flags(plan: &Plan, other: &Plan) -> Vec<String> {
    let mut flags = vec![];
    if plan.mesh != other.mesh {
        flags.push(format!("--mesh {}", other.mesh));
    }
    if plan.zero != other.zero {
        flags.push(format!("--zero {}", other.zero));
    }
    if plan.accumulate != other.accumulate {
        flags.push(format!("--micro-batches {}", other.accumulate));
    }
    if plan.recompute != other.recompute {
        let name = match other.recompute {
            Recompute::None => "none",
            Recompute::Block => "block",
            Recompute::All => "all",
        };
        flags.push(format!("--set parallel.recompute={name}"));
    }
    if plan.offload != other.offload {
        flags.push(format!("--set parallel.offload={}", other.offload));
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> Config {
        let text = "[model]\nkind = \"gpt\"\nlayers = 4\nheads = 4\nembed = 64\nblock = 32\n[data]\npath = \"x\"\n\
                    [train]\nbatch = 16\naccumulate = 2\n";
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Config::parse(text, "test", &sets).unwrap()
    }

    fn plan(config: &Config, mesh: &str) -> Plan {
        let mesh: Mesh = mesh.parse().unwrap();
        let mut config = config.clone();
        config.parallel.mesh = Some(mesh.to_string());
        config.plan(mesh.size()).unwrap()
    }

    fn fullest(config: &Config, plan: &Plan) -> usize {
        config.footprints(plan, 100).unwrap().iter().map(Footprint::total).max().unwrap()
    }

    #[test]
    fn stages_and_splits_hold_their_part_of_the_parameters() {
        let config = config(&[]);
        let of = |mesh: &str| config.footprints(&plan(&config, mesh), 100).unwrap();
        let whole: usize = config
            .model
            .describe(100, Placement::whole())
            .unwrap()
            .iter()
            .map(|param| param.spec.len())
            .sum();
        let one = of("data=1");
        // Units are padded to a cache line.
        assert!(one[0].parameters >= 4 * whole && one[0].parameters < 4 * whole + 4096, "{one:?}");
        assert_eq!(one[0].optimizer, 2 * one[0].parameters);
        let two = of("pipe=2");
        assert_eq!(two.len(), 2);
        // Both stages have the token embedding, which the last stage also uses as the head.
        let table = 4 * 100 * 64;
        let together = two[0].parameters + two[1].parameters - table;
        assert!(together >= one[0].parameters && together < one[0].parameters + 4096);
        let split = of("tensor=2");
        assert!(split[0].parameters < one[0].parameters * 11 / 20, "{split:?}");
        assert!(split[0].activations > one[0].activations / 2 && split[0].activations < one[0].activations);
        let sequence = self::config(&["parallel.sequence=true"]);
        let sequence = sequence.footprints(&plan(&sequence, "tensor=2"), 100).unwrap();
        assert_eq!(sequence[0].activations, one[0].activations / 2);
    }

    #[test]
    fn every_block_has_an_input() {
        for text in [
            "kind = \"gpt\"",
            "kind = \"encoder-decoder\"",
            "kind = \"cnn\"",
            "kind = \"mlp\"",
            "kind = \"resnet\"",
        ] {
            let kind = match text {
                _ if text.contains("cnn") || text.contains("mlp") => "mnist",
                _ if text.contains("resnet") => "synthetic",
                _ => "text",
            };
            let path = if kind == "synthetic" { "" } else { "path = \"x\"\n" };
            let text = format!("[model]\n{text}\n[data]\nkind = \"{kind}\"\n{path}[train]\nbatch = 1\n");
            let config = Config::parse(&text, "test", &[]).unwrap();
            assert_eq!(config.model.input_sizes(10).unwrap().len(), config.model.costs(10).len(), "{text}");
        }
    }

    #[test]
    fn the_nearest_plan_that_fits_is_named_and_fits() {
        let free = config(&[]);
        let given = plan(&free, "data=2");
        let bytes = fullest(&free, &given);
        let limited = |bytes: usize| {
            let mib = format!("parallel.memory_mib={}", bytes as f64 / f64::from(1 << 20));
            config(&[&mib])
        };
        assert_eq!(limited(bytes + 1).check_memory(&given, 100), Ok(()));
        // The plan is slightly too large: one change is enough.
        let short = limited(bytes - 1000);
        let misfit = short.check_memory(&given, 100).unwrap_err();
        let change = misfit.other.clone().unwrap();
        assert_eq!((misfit.fullest.1.total(), change.flags.len()), (bytes, 1), "{misfit}");
        assert!(change.bytes <= misfit.limit && fullest(&short, &change.plan) == change.bytes);
        assert_eq!(short.check_memory(&change.plan, 100), Ok(()));
        assert!(misfit.to_string().contains("the nearest plan that fits needs"), "{misfit}");
        // Of all single changes the one with the least memory is chosen.
        for zero in 0..4 {
            assert!(fullest(&free, &Plan { zero, ..given.clone() }) >= change.bytes);
        }
        let nothing = limited(1 << 20).check_memory(&plan(&free, "data=1"), 100).unwrap_err();
        assert!(nothing.to_string().contains("the smallest needs"), "{nothing}");
    }

    #[test]
    fn meshes_are_all_of_the_same_size() {
        let names: Vec<String> = meshes(&"data=4".parse().unwrap()).iter().map(Mesh::to_string).collect();
        assert_eq!(
            names,
            ["data=4", "pipe=4", "pipe=2,tensor=2", "tensor=4", "pipe=2,data=2", "data=2,tensor=2"]
        );
        assert_eq!(meshes(&"replica=2,data=2".parse().unwrap()).len(), 3);
        assert_eq!(meshes(&Mesh::data(1)), [Mesh::data(1)]);
    }
}
