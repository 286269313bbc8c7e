//! The Horovod-shaped API where no hook sees gradients: 16-bit numbers, gradient checkpointing, a model that was not hooked,
//! and, with the feature `wgpu`, another backend. Two ranks with half a batch each must do what one does with the whole.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsAccumulator, GradientsParams, SgdConfig};
use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use regatta::DistributedOptimizer;
use regatta::comm::Group;

/// The numbers of a tensor.
fn to_vec<const D: usize>(tensor: Tensor<D>) -> Option<Vec<f32>> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.try_into_vec_as::<f32>().ok()
}

const WIDTH: usize = 8;
const STEPS: usize = 4;

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    /// Used twice.
    tied: Linear,
    /// Used by rank 0 alone.
    sometimes: Linear,
    /// Never used.
    unused: Linear,
}

/// Where a model is, and of what numbers.
#[derive(Clone)]
struct Place {
    device: Device,
    dtype: DType,
}

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 37 + seed * 101) % 23) as f32 - 11.0) / 23.0).collect()
}

impl Place {
    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(
            TensorData::new(values, shape).convert_dtype(self.dtype),
            (&self.device, self.dtype),
        )
    }

    fn linear(&self, seed: usize) -> Linear {
        let mut linear = LinearConfig::new(WIDTH, WIDTH).init(&self.device);
        linear.weight = Param::from_tensor(self.tensor(numbers(WIDTH * WIDTH, seed), [WIDTH, WIDTH]));
        linear.bias = Some(Param::from_tensor(self.tensor(numbers(WIDTH, seed), [WIDTH])));
        linear
    }

    fn net(&self) -> Net {
        Net { first: self.linear(0), tied: self.linear(1), sometimes: self.linear(2), unused: self.linear(3) }
    }

    fn rows(&self, step: usize, from: usize, to: usize) -> Tensor<2> {
        let all = numbers(8 * WIDTH, step)[from * WIDTH..to * WIDTH].to_vec();
        self.tensor(all, [to - from, WIDTH])
    }
}

impl Net {
    fn loss(&self, x: Tensor<2>, sometimes: bool) -> Tensor<1> {
        let ones = x.ones_like();
        let x = self.tied.forward(burn::tensor::activation::gelu(self.tied.forward(self.first.forward(x))));
        let loss = x.powf_scalar(2.0).mean();
        if sometimes { loss + self.sometimes.forward(ones).mean() } else { loss }
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        [&self.first, &self.tied, &self.sometimes, &self.unused]
            .iter()
            .flat_map(|linear| {
                [to_vec(linear.weight.base()), linear.bias.as_ref().and_then(|bias| to_vec(bias.base()))]
            })
            .map(Option::unwrap)
            .collect()
    }
}

/// Trains on `group`, whose ranks share each batch of 8 rows in `passes` backward passes. The weights at the end.
fn train(group: &Group, place: &Place, passes: usize) -> Vec<Vec<f32>> {
    let each = 8 / group.size() / passes;
    let (optimizer, mut model) =
        DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), place.net()).unwrap();
    let mut optimizer = optimizer.with_backward_passes_per_step(passes);
    for step in 0..STEPS {
        for pass in 0..passes {
            let from = (group.rank() * passes + pass) * each;
            let loss = model.loss(place.rows(step, from, from + each), group.rank() == 0);
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            if pass + 1 < passes {
                optimizer.accumulate(&model, &grads).unwrap();
            } else {
                model = optimizer.step(0.5, model, grads).unwrap();
            }
        }
    }
    assert_eq!(optimizer.without_gradient(), ["unused.weight", "unused.bias"]);
    let here = |param: Tensor<2>| (param.device(), param.dtype());
    let (device, dtype) = here(model.first.weight.base());
    assert_eq!((device.inner(), dtype), (place.device.clone().inner(), place.dtype), "a parameter moved");
    model.weights()
}

fn on_ranks<R: Send + 'static>(size: usize, rank: impl Fn(Group) -> R + Clone + Send + 'static) -> Vec<R> {
    let start = |group| {
        let rank = rank.clone();
        std::thread::spawn(move || rank(group))
    };
    let ranks: Vec<_> = Group::threads(size).into_iter().map(start).collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

/// The largest difference; not a number if one of them is.
fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0)
}

/// Two ranks on `place` against one rank of the whole batch on the host.
fn is_averaged_on(place: &Place, bound: f32) {
    let host = Place { device: Device::flex().autodiff(), dtype: DType::F32 };
    let start = host.net().weights();
    let one = on_ranks(1, move |group| train(&group, &host, 1)).remove(0);
    for passes in [1, 2] {
        let there = place.clone();
        let ranks = on_ranks(2, move |group| train(&group, &there, passes));
        assert_eq!(ranks[0], ranks[1], "the ranks drift apart");
        // `sometimes` has half the gradient that the single rank has: rank 1 counts as zero.
        let but = |weights: &[Vec<f32>]| [&weights[..4], &weights[6..]].concat();
        let apart = difference(&but(&ranks[0]), &but(&one));
        assert!(apart < bound, "{passes} passes: {apart}");
        let moved = difference(&but(&one), &but(&start));
        assert!(moved > 4.0 * bound, "nothing was learnt that the bound would not hide: {moved}");
        let half = |after: &[Vec<f32>]| difference(&after[4..6], &start[4..6]);
        let (averaged, whole) = (half(&ranks[0]), half(&one));
        assert!((averaged - whole / 2.0).abs() < bound, "`sometimes` moved by {averaged}, alone by {whole}");
    }
}

#[test]
fn sixteen_bit_parameters_are_averaged() {
    for dtype in [DType::F16, DType::BF16] {
        is_averaged_on(&Place { device: Device::flex().autodiff(), dtype }, 0.02);
    }
}

#[test]
fn parameters_under_gradient_checkpointing_are_averaged() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    is_averaged_on(&Place { device, dtype: DType::F32 }, 1e-5);
}

#[test]
fn parameters_on_the_host_are_averaged_whether_each_pass_is_handed_over_or_not() {
    is_averaged_on(&Place { device: Device::flex().autodiff(), dtype: DType::F32 }, 1e-5);
}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
#[test]
fn parameters_on_another_backend_are_averaged() {
    use burn::tensor::DeviceType;
    #[cfg(feature = "cuda")]
    let kind = DeviceType::Cuda;
    #[cfg(all(feature = "vulkan", not(feature = "cuda")))]
    let kind = DeviceType::Vulkan;
    #[cfg(all(feature = "wgpu", not(any(feature = "vulkan", feature = "cuda"))))]
    let kind = DeviceType::Wgpu;
    let Some(device) = Device::enumerate(kind.clone()).into_iter().next() else {
        return eprintln!("skipped: {kind:?} finds no device");
    };
    eprintln!("on {device:?}");
    is_averaged_on(&Place { device: device.autodiff(), dtype: DType::F32 }, 1e-4);
}

fn host() -> Place {
    Place { device: Device::flex().autodiff(), dtype: DType::F32 }
}

/// A step of a rank on its half of the batch.
fn step(
    optimizer: &mut DistributedOptimizer,
    model: Net,
    group: &Group,
    place: &Place,
) -> regatta::Result<Net> {
    let from = group.rank() % 2 * 4;
    let loss = model.loss(place.rows(0, from, from + 4), true);
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    optimizer.step(0.5, model, grads)
}

#[test]
fn a_model_that_was_not_hooked_is_averaged_all_the_same() {
    let weights = on_ranks(2, |group| {
        // The returned model is dropped, as by a user who keeps their own.
        let model = host().net();
        let (mut optimizer, _) =
            DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), model.clone()).unwrap();
        step(&mut optimizer, model, &group, &host()).unwrap().weights()
    });
    assert_eq!(weights[0], weights[1]);
    assert!(difference(&weights[0], &host().net().weights()) > 1e-3);
}

#[test]
fn passes_that_were_not_handed_over_are_an_error() {
    let group = Group::threads(1).remove(0);
    let place = Place { dtype: DType::BF16, ..host() };
    let (optimizer, model) =
        DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), place.net()).unwrap();
    let mut optimizer = optimizer.with_backward_passes_per_step(2);
    let error = step(&mut optimizer, model, &group, &place).unwrap_err().to_string();
    assert!(error.contains("accumulate()") && error.contains("0 times"), "{error}");
    // The sum that Burn's own accumulator makes is one pass.
    let (mut optimizer, model) =
        DistributedOptimizer::over(group, SgdConfig::new().init(), place.net()).unwrap();
    let mut sum = GradientsAccumulator::new();
    for pass in 0..2 {
        let loss = model.loss(place.rows(0, pass * 4, pass * 4 + 4), true);
        sum.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
    }
    optimizer.step(0.05, model, sum.grads()).unwrap();
}

#[test]
fn ranks_that_would_drift_are_told_at_the_first_step() {
    let errors = on_ranks(3, |group| {
        let mut place = host().net();
        if group.rank() == 2 {
            place.tied = host().linear(7);
        }
        let (mut optimizer, model) =
            DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), place).unwrap();
        step(&mut optimizer, model, &group, &host()).unwrap_err().to_string()
    });
    for error in errors {
        assert!(
            error.contains("tied.") && error.contains("rank 2") && error.contains("broadcast_parameters"),
            "{error}"
        );
    }
    let errors = on_ranks(2, |group| {
        let optimizer = DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), host().net());
        let (optimizer, model) = optimizer.unwrap();
        let mut optimizer = optimizer.with_backward_passes_per_step(1 + group.rank());
        step(&mut optimizer, model, &group, &host()).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| error.contains("1 on rank 0 and 2 on rank 1")), "{errors:?}");
}

#[test]
fn models_that_differ_are_named() {
    let errors = on_ranks(2, |group| {
        let mut net = host().net();
        if group.rank() == 1 {
            net.tied.bias = None;
        }
        DistributedOptimizer::over(group, SgdConfig::new().init(), net).err().unwrap().to_string()
    });
    for error in errors {
        assert!(error.contains("rank 0 has tied.bias [8], rank 1 has sometimes.weight [8, 8]"), "{error}");
    }
}

#[test]
fn what_is_not_averaged_is_named() {
    let over =
        |net: Net| DistributedOptimizer::over(Group::threads(1).remove(0), SgdConfig::new().init(), net);
    // Thawed afterwards.
    let mut net = host().net();
    net.tied = net.tied.no_grad();
    let (mut optimizer, mut model) = over(net).unwrap();
    model.tied.weight = model.tied.weight.set_require_grad(true);
    let group = Group::threads(1).remove(0);
    let error = step(&mut optimizer, model, &group, &host()).unwrap_err().to_string();
    assert!(error.contains("tied.weight has a gradient that is not averaged"), "{error}");
    // Lost.
    let (mut optimizer, mut model) = over(host().net()).unwrap();
    model.unused.bias = None;
    let error = step(&mut optimizer, model, &group, &host()).unwrap_err().to_string();
    assert!(error.contains("no parameter unused.bias"), "{error}");
    // Another model's gradients.
    let (mut optimizer, model) = over(host().net()).unwrap();
    let other = host().net();
    let grads = GradientsParams::from_grads(other.loss(host().rows(0, 0, 8), true).backward(), &other);
    let error = optimizer.step(0.5, model, grads).err().unwrap().to_string();
    assert!(error.contains("no parameter has a gradient on any rank"), "{error}");
    // Nothing to train, and numbers that f32 does not hold.
    let plain = Place { device: Device::flex(), dtype: DType::F32 };
    assert!(over(plain.net()).err().unwrap().to_string().contains(".autodiff()"));
    let double = Place { dtype: DType::F64, ..host() };
    let error = over(double.net()).err().unwrap().to_string();
    assert!(error.contains("first.weight is F64"), "{error}");
}

/// Evaluation that records, and is never gone backward, keeps a graph that is deeper than hooks are placed.
#[test]
fn recorded_evaluations_before_a_step_change_nothing() {
    let after = |evaluations: usize| {
        on_ranks(2, move |group| {
            let (mut optimizer, mut model) =
                DistributedOptimizer::over(group.clone(), SgdConfig::new().init(), host().net()).unwrap();
            for _ in 0..evaluations {
                model.loss(host().rows(5, 0, 1), true);
            }
            model = step(&mut optimizer, model, &group, &host()).unwrap();
            step(&mut optimizer, model, &group, &host()).unwrap().weights()
        })
    };
    let (evaluated, plain) = (after(2000), after(0));
    assert_eq!(evaluated[0], evaluated[1]);
    assert_eq!(evaluated, plain);
}
