//! A decoder-only transformer with nanoGPT's architecture: pre-normalisation, GELU, learned positions, and by default an
//! output projection that is tied to the token embedding (Radford et al. 2019, "Language Models are Unsupervised Multitask
//! Learners").

use super::{
    Activation, Batch, BlockCost, Border, Limit, Model, ModelSpec, Problem, Samples, at_least_one,
    divides_into_heads, held, largest, rates,
};
use crate::layers::{
    ActivationFunction, Context, Deviations, Initializer, LayerPass, Norm, NormKind, ParamBuilder, Split,
    TransformerConfig, TransformerLayer, Vocabulary, dropout_part,
};
use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

/// The configuration of a [`Gpt`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; must divide `embed`.
    pub heads: usize,
    /// Numbers that represent a token.
    pub embed: usize,
    /// Longest context in tokens.
    #[serde(alias = "block")]
    pub context: usize,
    /// Dropout rate, 0 to below 1.
    pub dropout: f64,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
    /// Whether the output projection is the token embedding (Press & Wolf 2017, "Using the Output Embedding to Improve
    /// Language Models").
    pub tied: bool,
    /// The activation function of the feed-forward parts.
    #[serde(alias = "gelu")]
    pub activation: ActivationFunction,
    /// The kind of norm.
    pub norm: NormKind,
    /// Label smoothing: the part of the targets' probability that the loss spreads over all tokens, 0 to below 1.
    pub label_smoothing: f64,
}

impl Default for GptConfig {
    fn default() -> Self {
        Self {
            layers: 6,
            heads: 8,
            embed: 256,
            context: 128,
            dropout: 0.0,
            bias: false,
            tied: true,
            activation: ActivationFunction::Gelu,
            norm: NormKind::Layer,
            label_smoothing: 0.0,
        }
    }
}

/// A decoder-only transformer (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), from token ids
/// `[batch, time]` to logits `[batch, time, vocab]`. Its blocks are the embedding, each layer and the output.
#[derive(Module, Debug)]
pub struct Gpt {
    tokens: Option<Param<Tensor<2>>>,
    positions: Option<Param<Tensor<2>>>,
    layers: Vec<Option<TransformerLayer>>,
    norm: Option<Norm>,
    head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    config: GptConfig,
    #[module(skip)]
    vocabulary: Vocabulary,
    #[module(skip)]
    sequence: Split,
}

/// The numbers per token that a layer keeps in the regions between split layers, in widths of the model (Korthikanti et al.
/// 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2).
pub(super) const UNSPLIT_WIDTHS: f64 = 10.0;

/// GPT-2's standard deviation of initial weights.
pub(super) const DEVIATION: f32 = 0.02;

/// GPT-2's standard deviations for a model of `layers` layers. Weights that write to the residual stream are scaled by the
/// depth (Radford et al. 2019, section 2.3).
pub(super) fn deviations(layers: usize) -> Deviations {
    Deviations { input: DEVIATION, residual: DEVIATION / (2.0 * layers as f32).sqrt() }
}

impl GptConfig {
    fn layer(&self) -> TransformerConfig {
        TransformerConfig {
            width: self.embed,
            heads: self.heads,
            dropout: self.dropout,
            bias: self.bias,
            activation: self.activation,
            norm: self.norm,
            deviations: deviations(self.layers),
        }
    }
}

impl Gpt {
    /// Builds the model for a vocabulary of `vocab` tokens; `params` creates its parameters.
    ///
    /// # Panics
    /// `config.heads` is 0.
    pub fn new(config: &GptConfig, vocab: usize, params: &ParamBuilder) -> Self {
        let width = config.embed;
        let last = config.layers + 1;
        let table = |params: ParamBuilder, name: &str| {
            params.param(name, [&[("vocab", vocab)], &[("embed", width)]], Initializer::Normal(DEVIATION))
        };
        let layer = |i: usize| {
            let params = params.of_blocks(&[i + 1])?.at("layers").nth(i);
            Some(TransformerLayer::new(&params, config.layer(), false))
        };
        let users: &[usize] = if config.tied { &[0, last] } else { &[0] };
        Self {
            tokens: params.of_blocks(users).map(|params| table(params, "tokens")),
            positions: params.of_blocks(&[0]).map(|params| {
                let dims: [&[_]; 2] = [&[("positions", config.context)], &[("embed", width)]];
                params.param_of_region("positions", dims, Initializer::Normal(DEVIATION))
            }),
            layers: (0..config.layers).map(layer).collect(),
            norm: params
                .of_blocks(&[last])
                .map(|params| Norm::new(&params.at("norm"), width, config.norm, config.bias)),
            head: (!config.tied)
                .then(|| params.of_blocks(&[last]).map(|params| table(params, "head")))
                .flatten(),
            config: config.clone(),
            vocabulary: Vocabulary::new(params, vocab),
            sequence: params.sequence(),
        }
    }

    fn embed(&self, ids: Tensor<2, Int>, context: &Context) -> Tensor<3> {
        let (tokens, positions) = (held(&self.tokens), held(&self.positions));
        let [_, time] = ids.dims();
        let part = self.sequence.part(time);
        let places = context.past() + part.start..context.past() + part.end;
        let x = self.vocabulary.embed(tokens.val(), ids);
        let x = self.vocabulary.add_positions(x, positions.val(), places);
        dropout_part(x, self.config.dropout, context.noise(0, 0), part, time)
    }

    /// The logits `[batch, time, vocab]` of token ids `[batch, time]`, in evaluation.
    ///
    /// # Panics
    /// This rank does not hold the whole model, or `time` is longer than the model's context.
    pub fn logits(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let batch = Batch::Text { inputs: ids.clone(), targets: ids };
        self.forward(&batch, &Context::eval()).three()
    }
}

impl Model for Gpt {
    fn num_blocks(&self) -> usize {
        self.layers.len() + 2
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let (inputs, _) = batch.text();
        let [_, time] = inputs.dims();
        Activation::Three(if block == 0 {
            self.embed(inputs.clone(), context)
        } else if let Some(layer) = self.layers.get(block - 1) {
            held(layer).forward(input.three(), None, LayerPass { block, time, causal: true }, context)
        } else {
            let x = held(&self.norm).forward(input.three());
            let table = self.head.as_ref().unwrap_or_else(|| held(&self.tokens));
            self.vocabulary.logits(x, table.val())
        })
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        let smoothing = self.config.label_smoothing as f32;
        self.vocabulary.loss(output.three(), batch.text().1.clone(), smoothing)
    }

    fn output_shapes(&self, _block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let [rows, time] = batch.text().0.dims();
        vec![vec![rows, self.sequence.part(time).len(), self.config.embed]]
    }
}

impl ModelSpec for GptConfig {
    const KIND: &'static str = "gpt";
    type Model = Gpt;

    fn samples(&self) -> Samples {
        Samples::Text { time: self.context }
    }

    fn build(&self, vocab: usize, params: &ParamBuilder) -> Gpt {
        Gpt::new(self, vocab, params)
    }

    fn costs(&self, vocab: usize) -> Vec<BlockCost> {
        let (width, tokens) = (self.embed as f64, self.context as f64);
        let embedding = BlockCost {
            name: "embedding".into(),
            flops: 2.0 * tokens * width,
            kept: tokens * width,
            unsplit: tokens * width,
        };
        let layer = |i: usize| transformer_cost(format!("layer {i}"), width, self.heads, tokens, false);
        let output = BlockCost {
            name: "output".into(),
            flops: 2.0 * tokens * width * vocab as f64,
            kept: tokens * (2.0 * width + vocab as f64),
            unsplit: tokens * (2.0 * width + vocab as f64).min(UNSPLIT_WIDTHS * width),
        };
        std::iter::once(embedding).chain((0..self.layers).map(layer)).chain([output]).collect()
    }

    fn borders(&self, block: usize) -> Vec<Border> {
        let numbers = self.context * self.embed;
        match block {
            0 => Border::of_embedding(numbers),
            layer if layer <= self.layers => Border::of_transformer_layer(numbers, None),
            _ => Border::of_vocabulary(numbers, self.context, self.label_smoothing),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        vec![
            ("layers", self.layers, largest::LAYERS),
            ("heads", self.heads, largest::WIDTH),
            ("embed", self.embed, largest::WIDTH),
            ("context", self.context, largest::CONTEXT),
        ]
    }

    fn check(&self) -> Result<(), Problem> {
        at_least_one(self.limits().into_iter().map(|(key, value, _)| (key, value)))?;
        divides_into_heads(self.embed, self.heads)?;
        rates(&[("dropout", self.dropout), ("label_smoothing", self.label_smoothing)])
    }

    fn context(&self) -> Option<usize> {
        Some(self.context)
    }
}

/// The cost of a transformer layer for one sequence of `tokens` tokens.
pub(super) fn transformer_cost(
    name: String,
    width: f64,
    heads: usize,
    tokens: f64,
    cross: bool,
) -> BlockCost {
    // `products` and `attention` count the operations of the products with weights and of attention's two products. `kept`
    // counts the inputs of the norms, of the products and of the activation, and the output of attention, in widths per
    // token; `rows` counts one number for each row of attention scores.
    let (products, attention, kept, rows) =
        if cross { (32.0, 8.0, 22.0, 2.0) } else { (24.0, 4.0, 16.0, 1.0) };
    let kept = tokens * (kept * width + rows * heads as f64);
    BlockCost {
        name,
        flops: tokens * products * width * width + attention * tokens * tokens * width,
        kept,
        unsplit: (UNSPLIT_WIDTHS * tokens * width).min(kept),
    }
}
