//! The Horovod-shaped face on Burn modules that know nothing of it: two ranks with half a batch each must do what
//! one does with the whole.

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::TensorData;
use regatta::DistributedOptimizer;
use regatta::comm::Group;

/// The numbers of a tensor.
fn to_vec<const D: usize>(tensor: Tensor<D>) -> Option<Vec<f32>> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.try_into_vec_as::<f32>().ok()
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    norm: LayerNorm,
    /// Used twice.
    tied: Linear,
    /// Used by rank 0 alone.
    sometimes: Linear,
    /// Never used.
    unused: Linear,
    frozen: Param<Tensor<1>>,
}

const WIDTH: usize = 8;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 37 + seed * 101) % 23) as f32 - 11.0) / 23.0).collect()
}

impl Net {
    fn new(seed: usize) -> Self {
        let device = Device::flex().autodiff();
        let linear = |offset: usize| {
            let mut linear = LinearConfig::new(WIDTH, WIDTH).init(&device);
            let weight = Tensor::from_data(
                TensorData::new(numbers(WIDTH * WIDTH, seed + offset), [WIDTH, WIDTH]),
                &device,
            );
            let bias = Tensor::from_data(TensorData::new(numbers(WIDTH, seed + offset), [WIDTH]), &device);
            linear.weight = Param::from_tensor(weight);
            linear.bias = Some(Param::from_tensor(bias));
            linear
        };
        let frozen = Tensor::from_data(TensorData::new(numbers(WIDTH, seed + 9), [WIDTH]), &device);
        Self {
            first: linear(0),
            norm: LayerNormConfig::new(WIDTH).init(&device),
            tied: linear(1),
            sometimes: linear(2),
            unused: linear(3),
            frozen: Param::from_tensor(frozen).set_require_grad(false),
        }
    }

    fn loss(&self, x: Tensor<2>, sometimes: bool) -> Tensor<1> {
        let x = self.norm.forward(self.first.forward(x)) + self.frozen.val().unsqueeze::<2>();
        let x = self.tied.forward(burn::tensor::activation::gelu(self.tied.forward(x)));
        let loss = x.powf_scalar(2.0).mean();
        if !sometimes {
            return loss;
        }
        let ones = Tensor::<2>::ones([1, WIDTH], &Device::flex().autodiff());
        loss + self.sometimes.forward(ones).mean()
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        [&self.first, &self.tied, &self.sometimes, &self.unused]
            .iter()
            .flat_map(|linear| {
                [to_vec(linear.weight.base()), linear.bias.as_ref().and_then(|bias| to_vec(bias.base()))]
            })
            .chain([to_vec(self.norm.gamma.base()), to_vec(self.frozen.base())])
            .map(Option::unwrap)
            .collect()
    }
}

/// Rows `from..to` of step `step`'s batch.
fn rows(step: usize, from: usize, to: usize) -> Tensor<2> {
    let all = numbers(8 * WIDTH, step)[from * WIDTH..to * WIDTH].to_vec();
    Tensor::from_data(TensorData::new(all, [to - from, WIDTH]), &Device::flex().autodiff())
}

const STEPS: usize = 5;

/// Trains on `group`, whose ranks share each batch of 8 rows in `passes` backward passes.
fn train(group: Group, passes: usize) -> Vec<Vec<f32>> {
    let each = 8 / group.size() / passes;
    let optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let (optimizer, mut model) = DistributedOptimizer::over(group.clone(), optimizer, Net::new(0)).unwrap();
    let mut optimizer = optimizer.with_backward_passes_per_step(passes);
    for step in 0..STEPS {
        let mut grads = None;
        for pass in 0..passes {
            let from = (group.rank() * passes + pass) * each;
            let loss = model.loss(rows(step, from, from + each), group.rank() == 0);
            grads = Some(GradientsParams::from_grads(loss.backward(), &model));
        }
        model = optimizer.step(1e-2, model, grads.unwrap()).unwrap();
    }
    let time = optimizer.comm_time();
    assert!(group.size() == 1 || time.busy > std::time::Duration::ZERO);
    model.weights()
}

fn on_threads(size: usize, passes: usize) -> Vec<Vec<Vec<f32>>> {
    let ranks: Vec<_> = Group::threads(size)
        .into_iter()
        .map(|group| std::thread::spawn(move || train(group, passes)))
        .collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter()
        .flatten()
        .zip(b.iter().flatten())
        .map(|(a, b)| (a - b).abs())
        .max_by(f32::total_cmp)
        .unwrap_or(0.0)
}

#[test]
fn two_ranks_do_what_one_does_with_the_whole_batch() {
    let start = Net::new(0).weights();
    // `sometimes` has a gradient on rank 0 only, so its mean over two ranks is half of the single one's; AdamW's
    // first steps do not depend on the scale. It is left out here and checked by the ranks' agreement.
    let compare = |a: &[Vec<f32>], b: &[Vec<f32>]| {
        let but = |weights: &[Vec<f32>]| [&weights[..4], &weights[6..]].concat();
        largest_difference(&but(a), &but(b))
    };
    let one = on_threads(1, 1).remove(0);
    for (size, passes) in [(2, 1), (4, 1), (1, 2), (2, 2)] {
        let ranks = on_threads(size, passes);
        for rank in &ranks {
            assert_eq!(rank, &ranks[0], "the ranks differ");
            assert_eq!(
                (&rank[6], &rank[7], &rank[9]),
                (&start[6], &start[7], &start[9]),
                "unused or frozen moved"
            );
            assert!(largest_difference(&rank[4..6], &start[4..6]) > 1e-2, "`sometimes` stood still");
        }
        let difference = compare(&ranks[0], &one);
        assert!(difference < 2e-4, "{size} ranks, {passes} passes: {difference}");
    }
    // Unused and frozen parameters stay as they were, the others moved.
    assert_eq!((&one[6], &one[7], &one[9]), (&start[6], &start[7], &start[9]));
    assert!(largest_difference(&one[..6], &start[..6]) > 1e-2);
}

#[test]
fn before_init_the_face_says_so() {
    assert_eq!((regatta::rank(), regatta::size(), regatta::local_rank()), (0, 1, 0));
    let error = regatta::broadcast_parameters(Net::new(1), 0).unwrap_err();
    assert!(error.to_string().contains("regatta::init()"), "{error}");
    regatta::init().unwrap();
    let model = regatta::broadcast_parameters(Net::new(1), 0).unwrap();
    assert_eq!(model.weights(), Net::new(1).weights());
    let mean = regatta::all_reduce(Tensor::<1>::from_floats([1.0, 2.0], &Device::flex())).unwrap();
    assert_eq!(to_vec(mean).unwrap(), [1.0, 2.0]);
}

/// The README's diff is what makes `char_lm.rs` of `char_lm_single.rs`, to the letter, and of six lines.
#[test]
fn the_example_changes_the_six_lines_of_the_readme() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```diff\n").unwrap();
    let (diff, _) = rest.split_once("```").unwrap();
    let of = |sign: char| diff.lines().filter_map(move |line| line.strip_prefix(sign));
    assert_eq!(of('+').count(), 6);
    let lines = |text: &'static str| text.lines().filter(|line| !line.starts_with("//!")).collect::<Vec<_>>();
    let single = lines(include_str!("../examples/char_lm_single.rs"));
    let many = lines(include_str!("../examples/char_lm.rs"));
    let only = |these: &[&'static str], those: &[&'static str]| -> Vec<&'static str> {
        these.iter().filter(|line| !those.contains(line)).copied().collect()
    };
    assert!(only(&single, &many).into_iter().eq(of('-')));
    assert!(only(&many, &single).into_iter().eq(of('+')));
}
