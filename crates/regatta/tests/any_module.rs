//! A Burn module that is no chain of blocks, with Burn's own layers: through the same trainer, on threads of this process.

use burn::module::{Module, Param};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::tensor::{Tensor, activation::relu};
use regatta::checkpoint::Which;
use regatta::comm::Group;
use regatta::config::OptimizerConfig;
use regatta::datasets::{Dataset, HostBatch};
use regatta::layers::{Context, Initializer, ParamBuilder, cross_entropy};
use regatta::models::{Activation, Batch as Samples, Model, ModelSpec, Samples as Kind, count_correct};
use regatta::plan::{Batch, Plan};
use regatta::random::Stream;
use regatta::train::{Resume, Summary, Trainer, read_losses};
use serde::{Deserialize, Serialize};
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BranchesConfig {
    width: usize,
    normalized: bool,
}

/// Two branches that are added, one of them twice: what flows through it is no chain.
#[derive(Module, Debug)]
struct Branches {
    left: Linear,
    right: Linear,
    head: Linear,
    norm: Option<BatchNorm>,
}

impl Model for Branches {
    fn num_blocks(&self) -> usize {
        1
    }

    fn forward_block(&self, _: usize, _: Activation, batch: &Samples, _: &Context) -> Activation {
        let x: Tensor<2> = batch.images().0.clone().reshape([batch.rows() as i32, -1]);
        let left = self.left.forward(x.clone());
        let right = relu(self.right.forward(x) + left.clone());
        let sum = relu(left) + right;
        let sum = self
            .norm
            .as_ref()
            .map_or(sum.clone(), |norm| norm.forward(sum.unsqueeze_dim::<3>(2)).squeeze_dim(2));
        Activation::Two(self.head.forward(sum))
    }

    fn loss(&self, output: Activation, batch: &Samples) -> Tensor<1> {
        cross_entropy(output.two(), batch.images().1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Samples) -> Option<usize> {
        Some(count_correct(&output.clone().two(), batch.images().1))
    }

    fn output_shapes(&self, _: usize, batch: &Samples) -> Vec<Vec<usize>> {
        vec![vec![batch.rows(), CLASSES]]
    }
}

const CLASSES: usize = 3;

impl ModelSpec for BranchesConfig {
    const KIND: &'static str = "branches";
    type Model = Branches;

    fn samples(&self) -> Kind {
        Kind::Images { height: 2, width: 2, channels: 2 }
    }

    fn build(&self, classes: usize, _: &ParamBuilder) -> Branches {
        let device = Default::default();
        Branches {
            left: LinearConfig::new(8, self.width).init(&device),
            right: LinearConfig::new(8, self.width).with_bias(false).init(&device),
            head: LinearConfig::new(self.width, classes).init(&device),
            norm: self.normalized.then(|| BatchNormConfig::new(self.width).init(&device)),
        }
    }
}

/// Clouds around a corner of a cube, one for each class.
struct Clouds;

impl Dataset for Clouds {
    fn len(&self) -> usize {
        240
    }

    fn batch(&self, _: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
        let pixel = |index: usize, place: usize| {
            let corner = if place % CLASSES == index % CLASSES { 1.0 } else { 0.0 };
            corner + 0.3 * Stream::new(5).at(index as u64).uniform(place as u64)
        };
        let pixels = indices.iter().flat_map(|&index| (0..8).map(move |place| pixel(index, place)));
        Ok(HostBatch::Images {
            pixels: pixels.collect(),
            labels: indices.iter().map(|index| (index % CLASSES) as i64).collect(),
            shape: [2, 2, 2],
        })
    }
}

/// Trains on a thread for each rank, on from the checkpoint of an earlier call.
fn fit(folder: &Path, plan: &Plan, steps: usize) -> regatta::Result<(Vec<f64>, Summary)> {
    fit_spec(folder, plan, steps, BranchesConfig { width: 10, normalized: false })
}

fn fit_spec<S: ModelSpec>(
    folder: &Path,
    plan: &Plan,
    steps: usize,
    spec: S,
) -> regatta::Result<(Vec<f64>, Summary)> {
    let groups = Group::threads(plan.world());
    let summary = std::thread::scope(|scope| {
        let rank = |group: Group| {
            let (plan, spec) = (plan.clone(), spec.clone());
            scope.spawn(move || {
                Trainer::new(plan)
                    .group(group)
                    .model(spec)
                    .data(Clouds, Clouds, CLASSES)
                    .optimizer(OptimizerConfig { lr: 0.01, ..OptimizerConfig::default() })
                    .settings(|train| train.checkpoint_every = 5)
                    .steps(steps)
                    .out(folder)
                    .resume(Resume { from: Which::Last, or_begin: true, other_data: false })
                    .fit()
            })
        };
        let ranks: Vec<_> = groups.into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>().remove(0)
    })?;
    Ok((read_losses(folder)?, summary))
}

fn plan(mesh: &str, micro_batches: usize, zero: u8) -> Plan {
    Plan { zero, ..Plan::new(mesh.parse().unwrap(), Batch::global(12, micro_batches), 1 << 20).unwrap() }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_module_without_blocks_trains_by_data_and_with_zero_1() {
    let place = tempfile::tempdir().unwrap();
    let start = place.path().join("start");
    let (first, _) = fit(&start, &plan("data=1", 1, 0), 5).unwrap();
    // Its parameters begin at random, so all runs go on from one start.
    let run = |mesh: &str, micro_batches: usize, zero: u8| {
        let folder = place.path().join(format!("{mesh} {micro_batches} {zero}"));
        copy(&start, &folder);
        fit(&folder, &plan(mesh, micro_batches, zero), 30).unwrap()
    };
    let (one, _) = run("data=1", 1, 0);
    assert_eq!(one.len(), 30);
    // Of several steps: a batch of 12 samples has losses that differ much from step to step.
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (before, after) = (mean(&first), mean(&one[25..]));
    assert!(after < 0.9 * before, "nothing is learnt: {one:?}");
    for (mesh, micro_batches, zero) in
        [("data=2", 1, 0), ("data=2", 2, 1), ("data=3", 2, 1), ("replica=2,data=2", 1, 2)]
    {
        let (losses, summary) = run(mesh, micro_batches, zero);
        for (step, (a, b)) in losses.iter().zip(&one).enumerate() {
            assert!(((a - b) / b).abs() < 1e-4, "{mesh}, zero {zero}, step {step}: {a} and {b}");
        }
        assert!(summary.val_loss.unwrap().is_finite());
    }
}

#[test]
fn ranks_of_a_module_without_blocks_begin_with_the_same_numbers() {
    let place = tempfile::tempdir().unwrap();
    // With ranks that differ, the mean of their losses would not be one worker's over all samples.
    let folder = place.path().join("run");
    let (losses, _) = fit(&folder, &plan("data=3", 1, 0), 5).unwrap();
    let one = place.path().join("one");
    copy(&folder, &one);
    let (again, _) = fit(&one, &plan("data=1", 1, 0), 8).unwrap();
    let (three, _) = fit(&folder, &plan("data=3", 1, 0), 8).unwrap();
    assert_eq!(losses[..5], again[..5]);
    for (a, b) in again[5..].iter().zip(&three[5..]) {
        assert!(((a - b) / b).abs() < 1e-4, "{again:?} {three:?}");
    }
}

#[test]
fn a_plan_that_needs_blocks_is_refused() {
    let place = tempfile::tempdir().unwrap();
    for (mesh, zero, message) in [
        ("data=2", 3, "parallel.zero = 3 needs a model whose parameters the ParamBuilder creates"),
        ("tensor=2", 0, "cannot be split over the axis tensor"),
        ("pipe=2", 0, "1 block"),
    ] {
        let error = fit(&place.path().join("run"), &plan(mesh, 1, zero), 5).unwrap_err().to_string();
        assert!(error.contains(message), "{mesh} zero {zero}: {error}");
    }
}

#[test]
fn what_nothing_would_keep_equal_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let normalized = BranchesConfig { width: 10, normalized: true };
    let error =
        fit_spec(&place.path().join("run"), &plan("data=2", 1, 0), 5, normalized).unwrap_err().to_string();
    assert!(
        error.contains("norm.running_mean was not created by the ParamBuilder and is not trained"),
        "{error}"
    );
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TemperedConfig {}

/// One layer, and a loss with a parameter of its own.
#[derive(Module, Debug)]
struct Tempered {
    weight: Param<Tensor<2>>,
    temperature: Param<Tensor<1>>,
}

impl Model for Tempered {
    fn num_blocks(&self) -> usize {
        1
    }

    fn forward_block(&self, _: usize, _: Activation, batch: &Samples, _: &Context) -> Activation {
        let x: Tensor<2> = batch.images().0.clone().reshape([batch.rows() as i32, -1]);
        Activation::Two(x.matmul(self.weight.val()))
    }

    fn loss(&self, output: Activation, batch: &Samples) -> Tensor<1> {
        let scaled = output.two() * self.temperature.val().unsqueeze();
        cross_entropy(scaled, batch.images().1.clone())
    }

    fn output_shapes(&self, _: usize, batch: &Samples) -> Vec<Vec<usize>> {
        vec![vec![batch.rows(), CLASSES]]
    }
}

impl ModelSpec for TemperedConfig {
    const KIND: &'static str = "tempered";
    type Model = Tempered;

    fn samples(&self) -> Kind {
        Kind::Images { height: 2, width: 2, channels: 2 }
    }

    fn build(&self, classes: usize, params: &ParamBuilder) -> Tempered {
        let params = params.of_blocks(&[0]).expect("every rank has the only block");
        Tempered {
            weight: params.param(
                "weight",
                [&[("inputs", 8)], &[("outputs", classes)]],
                Initializer::Normal(0.3),
            ),
            temperature: params.param("temperature", [&[("one", 1)]], Initializer::Constant(2.0)),
        }
    }
}

#[test]
fn a_loss_with_a_parameter_is_evaluated_under_zero_3() {
    let place = tempfile::tempdir().unwrap();
    let run = |mesh: &str, zero: u8| {
        fit_spec(&place.path().join(mesh), &plan(mesh, 1, zero), 20, TemperedConfig {}).unwrap()
    };
    let ((one, of_one), (three, of_three)) = (run("data=1", 0), run("data=3", 3));
    assert!(one[19] < one[0], "nothing is learnt: {one:?}");
    let validation = |summary: &Summary| summary.val_loss.unwrap();
    let pairs = one.iter().zip(&three).map(|(a, b)| (*a, *b));
    for (a, b) in pairs.chain([(validation(&of_one), validation(&of_three))]) {
        assert!(((a - b) / a).abs() < 1e-4, "{a} and {b}");
    }
}
