//! A model that Regatta does not have, as a program with every command of `regatta`: gated feed-forward layers (Shazeer
//! 2020, "GLU Variants Improve Transformer") classify points on noisy spirals. `docs/adding-a-model.md` walks through it.

use burn::{module::Module, tensor::Tensor};
use regatta::datasets::{Dataset, Datasets, HostBatch};
use regatta::layers::{Context, Linear, Nonlinearity, Norm, NormKind, ParamBuilder, Split, cross_entropy};
use regatta::models::{Activation, Batch, Border, Model, ModelSpec, Samples, count_correct, held};
use regatta::random::Stream;
use serde::{Deserialize, Serialize};
use std::{process::ExitCode, sync::Arc};

/// The section `[model]` with `kind = "gated"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GatedConfig {
    layers: usize,
    width: usize,
    hidden: usize,
}

/// `x + down(silu(gate(norm(x))) * up(norm(x)))`; the dimension `mlp` may be split.
#[derive(Module, Debug)]
struct GatedLayer {
    norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    #[module(skip)]
    split: Split,
}

impl GatedLayer {
    fn new(params: &ParamBuilder, config: &GatedConfig) -> Self {
        let (embed, mlp): (&[_], &[_]) = (&[("embed", config.width)], &[("mlp", config.hidden)]);
        Self {
            norm: Norm::new(&params.at("norm"), config.width, NormKind::Rms, false),
            gate: Linear::columns(&params.at("gate"), embed, mlp, 0.3, false),
            up: Linear::columns(&params.at("up"), embed, mlp, 0.3, false),
            down: Linear::rows(&params.at("down"), mlp, embed, 0.1, false),
            split: params.split("mlp"),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.split.enter(self.norm.forward(x.clone()));
        let hidden = self.gate.activated(y.clone(), Nonlinearity::Silu) * self.up.forward(y);
        x + self.split.leave(self.down.forward(hidden))
    }
}

/// Blocks: the stem, the layers, the head.
#[derive(Module, Debug)]
struct Gated {
    stem: Option<Linear>,
    layers: Vec<Option<GatedLayer>>,
    head: Option<Linear>,
    #[module(skip)]
    sizes: [usize; 2],
}

impl Model for Gated {
    fn num_blocks(&self) -> usize {
        self.layers.len() + 2
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, _: &Context) -> Activation {
        if block == 0 {
            let points = batch.images().0.clone().reshape([batch.rows(), 1, 2]);
            return Activation::Three(held(&self.stem).forward(points));
        }
        match self.layers.get(block - 1) {
            Some(layer) => Activation::Three(held(layer).forward(input.three())),
            None => Activation::Two(held(&self.head).forward(input.three().squeeze_dim(1))),
        }
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), batch.images().1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), batch.images().1))
    }

    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let [width, classes] = self.sizes;
        let last = block > self.layers.len();
        vec![if last { vec![batch.rows(), classes] } else { vec![batch.rows(), 1, width] }]
    }
}

impl ModelSpec for GatedConfig {
    const KIND: &'static str = "gated";
    type Model = Gated;

    fn samples(&self) -> Samples {
        Samples::Images { height: 1, width: 1, channels: 2 }
    }

    fn build(&self, classes: usize, params: &ParamBuilder) -> Gated {
        let linear = |block: usize, name: &str, from: usize, to: usize| {
            let (params, deviation) = (params.of_blocks(&[block])?.at(name), (from as f32).powf(-0.5));
            Some(Linear::columns(&params, &[("inputs", from)], &[("outputs", to)], deviation, true))
        };
        let layer = |i: usize| Some(GatedLayer::new(&params.of_blocks(&[i + 1])?.at("layers").nth(i), self));
        Gated {
            stem: linear(0, "stem", 2, self.width),
            layers: (0..self.layers).map(layer).collect(),
            head: linear(self.layers + 1, "head", self.width, classes),
            sizes: [self.width, classes],
        }
    }

    fn borders(&self, block: usize) -> Vec<Border> {
        let both =
            [Border::enter("gate in", "mlp", self.width), Border::leave("gate out", "mlp", self.width)];
        if (1..=self.layers).contains(&block) { both.to_vec() } else { vec![] }
    }
}

/// Points on three spirals, one a class.
struct Spirals(Stream, usize);

impl Dataset for Spirals {
    fn len(&self) -> usize {
        self.1
    }

    fn batch(&self, _epoch: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
        let point = |&index: &usize| {
            let noise = self.0.at(index as u64);
            let (radius, class) = (noise.uniform(0), (index % 3) as f32);
            let angle = 4.0 * radius + 2.1 * class + 0.2 * noise.uniform(1);
            [radius * angle.cos(), radius * angle.sin()]
        };
        let labels = indices.iter().map(|index| (index % 3) as i64).collect();
        Ok(HostBatch::Images { pixels: indices.iter().flat_map(point).collect(), labels, shape: [1, 1, 2] })
    }
}

fn main() -> ExitCode {
    let set = |name: &str, len| Arc::new(Spirals(Stream::new(7).named(name), len));
    let data =
        move |_: &_| Ok(Datasets { train: set("a", 3000), val: set("b", 300), vocab: 3, tokenizer: None });
    regatta_cli::App::new().model::<GatedConfig>().data(data).main()
}
