//! A decoder-only transformer with nanoGPT's architecture: pre-norm, GELU, learned positions, and by default
//! an output projection tied to the token embedding (Radford et al. 2019, "Language Models are Unsupervised
//! Multitask Learners").

use super::{Activation, Batch, BlockCost, Model};
use crate::layers::{
    ActivationFunction, Attention, Context, Deviations, Fill, Init, Linear, Norm, NormKind, Split,
    Vocabulary, dropout_part, feed_forward, feed_forward_layers, residual_part,
};
use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

/// Shape of a [`Gpt`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; divides `embed`.
    pub heads: usize,
    /// Width.
    pub embed: usize,
    /// Longest context in tokens.
    pub block: usize,
    /// Dropout rate, 0 to below 1.
    pub dropout: f64,
    /// Biases in linear layers and norms.
    pub bias: bool,
    /// Whether the output projection is the token embedding.
    pub tied: bool,
    /// The function inside of feed-forward layers.
    #[serde(alias = "gelu")]
    pub activation: ActivationFunction,
    /// Which norm.
    pub norm: NormKind,
    /// Part of the targets' probability that is spread over all tokens in the loss, 0 to below 1.
    pub label_smoothing: f64,
}

impl Default for GptConfig {
    fn default() -> Self {
        Self {
            layers: 6,
            heads: 8,
            embed: 256,
            block: 128,
            dropout: 0.0,
            bias: false,
            tied: true,
            activation: ActivationFunction::Gelu,
            norm: NormKind::Layer,
            label_smoothing: 0.0,
        }
    }
}

/// See the [module](self). Blocks: the embedding, the layers, the output.
#[derive(Module, Debug)]
pub struct Gpt {
    tokens: Option<Param<Tensor<2>>>,
    positions: Option<Param<Tensor<2>>>,
    layers: Vec<Option<Layer>>,
    norm: Option<Norm>,
    head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    shape: Shape,
}

#[derive(Debug, Clone)]
struct Shape {
    config: GptConfig,
    vocabulary: Vocabulary,
    mlp: Split,
    sequence: Split,
}

#[derive(Module, Debug)]
struct Layer {
    norm1: Norm,
    attention: Attention,
    norm2: Norm,
    up: Linear,
    down: Linear,
}

/// GPT-2's standard deviation of initial weights.
pub(super) const DEVIATION: f32 = 0.02;

impl Gpt {
    /// A model of `config`'s shape over `vocab` tokens, of which `init` says what this rank holds.
    pub fn new(config: &GptConfig, vocab: usize, init: &Init) -> Self {
        let (width, bias) = (config.embed, config.bias);
        // Projections onto the residual stream are scaled by its depth (Radford et al. 2019, section 2.3).
        let residual = DEVIATION / (2.0 * config.layers as f32).sqrt();
        let deviations = Deviations { input: DEVIATION, residual };
        let norm = |init: &Init, name: &str| Norm::new(&init.at(name), width, config.norm, bias);
        let layer = |init: Init| {
            let (up, down) = feed_forward_layers(&init, width, deviations, bias);
            Layer {
                norm1: norm(&init, "norm1"),
                attention: Attention::new(&init.at("attention"), width, config.heads, deviations, bias),
                norm2: norm(&init, "norm2"),
                up,
                down,
            }
        };
        let last = config.layers + 1;
        let table = |init: Init, name: &str| {
            init.param(name, [&[("vocab", vocab)], &[("embed", width)]], Fill::Normal(DEVIATION))
        };
        let users: &[usize] = if config.tied { &[0, last] } else { &[0] };
        Self {
            tokens: init.of_blocks(users).map(|init| table(init, "tokens")),
            positions: init.of_blocks(&[0]).map(|init| {
                let dims: [&[_]; 2] = [&[("positions", config.block)], &[("embed", width)]];
                init.param_of_region("positions", dims, Fill::Normal(DEVIATION))
            }),
            layers: (0..config.layers)
                .map(|i| init.of_blocks(&[i + 1]).map(|init| layer(init.at("layers").nth(i))))
                .collect(),
            norm: init.of_blocks(&[last]).map(|init| norm(&init, "norm")),
            head: (!config.tied).then(|| init.of_blocks(&[last]).map(|init| table(init, "head"))).flatten(),
            shape: Shape {
                config: config.clone(),
                vocabulary: Vocabulary::new(init, vocab),
                mlp: init.split("mlp"),
                sequence: init.sequence(),
            },
        }
    }

    /// Longest context in tokens.
    pub fn block(&self) -> usize {
        self.shape.config.block
    }

    fn embed(&self, ids: Tensor<2, Int>, context: &Context) -> Tensor<3> {
        let (tokens, positions) = (held(&self.tokens), held(&self.positions));
        let [_, time] = ids.dims();
        let part = self.shape.sequence.part(time);
        let places = context.past() + part.start..context.past() + part.end;
        let vocabulary = &self.shape.vocabulary;
        let x = vocabulary.add_positions(vocabulary.embed(tokens.val(), ids), positions.val(), places);
        dropout_part(x, self.shape.config.dropout, context.noise(0), part, time)
    }

    /// Logits `[batch, time, vocab]` for token ids `[batch, time]`, where one rank holds the whole model.
    pub fn logits(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let batch = Batch::Text { inputs: ids.clone(), targets: ids };
        self.forward(&batch, &Context::eval()).three()
    }
}

/// What a block that runs here needs.
///
/// # Panics
/// Where this rank does not hold it: the plan runs a block on a rank that was not given it, a bug.
pub(super) fn held<T>(part: &Option<T>) -> &T {
    part.as_ref().expect("a rank runs only the blocks that it holds")
}

impl Model for Gpt {
    fn num_blocks(&self) -> usize {
        self.layers.len() + 2
    }

    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let Batch::Text { inputs, .. } = batch else { panic!("a language model was given images") };
        Activation::Three(if index == 0 {
            self.embed(inputs.clone(), context)
        } else if let Some(layer) = self.layers.get(index - 1) {
            let [_, time] = inputs.dims();
            held(layer).forward(input.three(), &self.shape, time, context, index)
        } else {
            let x = held(&self.norm).forward(input.three());
            let table = self.head.as_ref().unwrap_or_else(|| held(&self.tokens));
            self.shape.vocabulary.logits(x, table.val())
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        let Batch::Text { targets, .. } = batch else { panic!("a language model was given images") };
        self.shape.vocabulary.loss(output.three(), targets.clone(), self.shape.config.label_smoothing as f32)
    }

    fn handed_on(&self, _index: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let Batch::Text { inputs, .. } = batch else { panic!("a language model was given images") };
        let [rows, time] = inputs.dims();
        vec![vec![rows, self.shape.sequence.part(time).len(), self.shape.config.embed]]
    }
}

impl Layer {
    fn forward(
        &self,
        x: Tensor<3>,
        shape: &Shape,
        time: usize,
        context: &Context,
        index: usize,
    ) -> Tensor<3> {
        let (rate, place) = (shape.config.dropout, 3 * index as u64);
        let add = |x: Tensor<3>, y: Tensor<3>, place: u64| {
            residual_part(x, y, rate, context.noise(place), shape.sequence.part(time), time)
        };
        let attended =
            self.attention.forward(self.norm1.forward(x.clone()), true, rate, context, index, place);
        let x = add(x, attended, place + 1);
        let hidden = self.norm2.forward(x.clone());
        let hidden = feed_forward(hidden, &self.up, &self.down, shape.config.activation, &shape.mlp);
        add(x, hidden, place + 2)
    }
}

impl GptConfig {
    /// What each block costs for one sample of `time` tokens, over `vocab` tokens.
    pub fn costs(&self, vocab: usize, time: usize) -> Vec<BlockCost> {
        let (width, tokens) = (self.embed as f64, time as f64);
        let embedding =
            BlockCost { name: "embedding".into(), flops: 2.0 * tokens * width, kept: tokens * width };
        let layer = |i: usize| {
            let scores = self.heads as f64 * tokens * tokens;
            BlockCost {
                name: format!("layer {i}"),
                flops: tokens * (24.0 * width * width) + 4.0 * scores * width / self.heads as f64,
                // Inputs of the norms, of the four products and of the activation, and what attention gave; of its scores
                // a number a row.
                kept: tokens * (16.0 * width + self.heads as f64),
            }
        };
        let output = BlockCost {
            name: "output".into(),
            flops: 2.0 * tokens * width * vocab as f64,
            kept: tokens * (2.0 * width + vocab as f64),
        };
        std::iter::once(embedding).chain((0..self.layers).map(layer)).chain([output]).collect()
    }
}
