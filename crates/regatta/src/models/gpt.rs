//! A decoder-only transformer with nanoGPT's architecture: pre-norm, GELU, learned positions, and by default
//! an output projection tied to the token embedding (Radford et al. 2019, "Language Models are Unsupervised
//! Multitask Learners").

use super::{Activation, Batch, Model};
use crate::layers::{Context, Init, cross_entropy, dropout};
use burn::module::{Module, Param};
use burn::nn::{LayerNorm, Linear};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::module::embedding;
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
}

impl Default for GptConfig {
    fn default() -> Self {
        Self { layers: 6, heads: 8, embed: 256, block: 128, dropout: 0.0, bias: false, tied: true }
    }
}

/// See the [module](self).
#[derive(Module, Debug)]
pub struct Gpt {
    tokens: Param<Tensor<2>>,
    positions: Param<Tensor<2>>,
    layers: Vec<Layer>,
    norm: LayerNorm,
    head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    rate: f64,
}

#[derive(Module, Debug)]
struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Attention {
    qkv: Linear,
    out: Linear,
    #[module(skip)]
    heads: usize,
}

/// GPT-2's standard deviation of initial weights.
const DEVIATION: f32 = 0.02;

impl Gpt {
    /// A model of `config`'s shape over `vocab` tokens, with weights of `seed`.
    pub fn new(config: &GptConfig, vocab: usize, seed: u64) -> Self {
        let (init, width, bias) = (Init::new(seed), config.embed, config.bias);
        // Projections onto the residual stream are scaled by its depth (Radford et al. 2019, section 2.3).
        let residual = DEVIATION / (2.0 * config.layers as f32).sqrt();
        let layer = |init: Init| Layer {
            norm1: init.layer_norm(width, bias),
            attention: Attention {
                qkv: init.at("attention.qkv").linear(width, 3 * width, DEVIATION, bias),
                out: init.at("attention.out").linear(width, width, residual, bias),
                heads: config.heads,
            },
            norm2: init.layer_norm(width, bias),
            up: init.at("up").linear(width, 4 * width, DEVIATION, bias),
            down: init.at("down").linear(4 * width, width, residual, bias),
        };
        Self {
            tokens: init.at("tokens").normal([vocab, width], DEVIATION),
            positions: init.at("positions").normal([config.block, width], DEVIATION),
            layers: (0..config.layers).map(|i| layer(init.at("layers").nth(i))).collect(),
            norm: init.layer_norm(width, bias),
            head: (!config.tied).then(|| init.at("head").normal([vocab, width], DEVIATION)),
            rate: config.dropout,
        }
    }

    /// Longest context in tokens.
    pub fn block(&self) -> usize {
        self.positions.dims()[0]
    }

    fn embed(&self, ids: Tensor<2, Int>, context: &Context) -> Tensor<3> {
        let [_, time] = ids.dims();
        let positions = self.positions.val().narrow(0, 0, time).unsqueeze::<3>();
        dropout(embedding(self.tokens.val(), ids) + positions, self.rate, context, 0)
    }

    /// Logits `[batch, time, vocab]` for token ids `[batch, time]`, for generation.
    pub fn logits(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let batch = Batch::Text { inputs: ids.clone(), targets: ids };
        self.forward(&batch, &Context::eval()).three()
    }
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
            layer.forward(input.three(), self.rate, context, 3 * index as u64)
        } else {
            let x = self.norm.forward(input.three());
            let head = self.head.as_ref().unwrap_or(&self.tokens).val();
            let [batch, time, width] = x.dims();
            let logits = x.reshape([batch * time, width]).matmul(head.transpose());
            let [_, vocab] = logits.dims();
            logits.reshape([batch, time, vocab])
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        let Batch::Text { targets, .. } = batch else { panic!("a language model was given images") };
        let logits = output.three();
        let [rows, time, vocab] = logits.dims();
        cross_entropy(logits.reshape([rows * time, vocab]), targets.clone().reshape([rows * time]))
    }
}

impl Layer {
    fn forward(&self, x: Tensor<3>, rate: f64, context: &Context, place: u64) -> Tensor<3> {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), rate, context, place);
        let x = x + dropout(attended, rate, context, place + 1);
        let hidden = self.down.forward(gelu(self.up.forward(self.norm2.forward(x.clone()))));
        x + dropout(hidden, rate, context, place + 2)
    }
}

impl Attention {
    /// Causal self-attention (Vaswani et al. 2017, section 3.2) of `x` `[batch, time, embed]`.
    fn forward(&self, x: Tensor<3>, rate: f64, context: &Context, place: u64) -> Tensor<3> {
        let [batch, time, width] = x.dims();
        let head = width / self.heads;
        let qkv = self.qkv.forward(x).reshape([batch, time, 3 * self.heads, head]).swap_dims(1, 2);
        let [q, k, v] = [0, 1, 2].map(|i| qkv.clone().narrow(1, i * self.heads, self.heads));
        let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar((head as f64).powf(-0.5));
        let mask = Tensor::<2, burn::tensor::Bool>::tril_mask([time, time], 0, &scores.device());
        let scores = scores.mask_fill(mask.unsqueeze::<4>(), f32::NEG_INFINITY);
        let weights = dropout(softmax(scores, 3), rate, context, place);
        let mixed = weights.matmul(v).swap_dims(1, 2).reshape([batch, time, width]);
        self.out.forward(mixed)
    }
}
