//! The encoder-decoder transformer (Vaswani et al. 2017, "Attention Is All You Need"), pre-norm, with learned positions and
//! one vocabulary for source, target and output: sequence to sequence, as in translation.

use super::gpt::{DEVIATION, held};
use super::{Activation, Batch, BlockCost, Model};
use crate::layers::{
    ActivationFunction, Attention, Context, CrossAttention, Deviations, Fill, Init, Linear, Norm, NormKind,
    Split, Vocabulary, dropout_part, feed_forward, feed_forward_layers, residual_part,
};
use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

/// Shape of an [`EncoderDecoder`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncoderDecoderConfig {
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Attention heads; divides `embed`.
    pub heads: usize,
    /// Width.
    pub embed: usize,
    /// Tokens of a source, and of a target.
    pub block: usize,
    /// Dropout rate, 0 to below 1.
    pub dropout: f64,
    /// Biases in linear layers and norms.
    pub bias: bool,
    /// The function inside of feed-forward layers.
    #[serde(alias = "gelu")]
    pub activation: ActivationFunction,
    /// Which norm.
    pub norm: NormKind,
    /// Part of the targets' probability that is spread over all tokens in the loss, 0 to below 1.
    pub label_smoothing: f64,
}

impl Default for EncoderDecoderConfig {
    fn default() -> Self {
        Self {
            encoder_layers: 3,
            decoder_layers: 3,
            heads: 8,
            embed: 256,
            block: 64,
            dropout: 0.0,
            bias: false,
            activation: ActivationFunction::Gelu,
            norm: NormKind::Layer,
            label_smoothing: 0.0,
        }
    }
}

/// See the [module](self). Blocks: the source's embedding, the encoder's layers, the target's embedding, the decoder's
/// layers, the output. Behind the target's embedding two tensors flow: the decoder's and the encoder's result.
#[derive(Module, Debug)]
pub struct EncoderDecoder {
    tokens: Option<Param<Tensor<2>>>,
    source_positions: Option<Param<Tensor<2>>>,
    target_positions: Option<Param<Tensor<2>>>,
    encoder: Vec<Option<EncoderLayer>>,
    encoder_norm: Option<Norm>,
    decoder: Vec<Option<DecoderLayer>>,
    norm: Option<Norm>,
    #[module(skip)]
    shape: Shape,
}

#[derive(Debug, Clone)]
struct Shape {
    config: EncoderDecoderConfig,
    vocabulary: Vocabulary,
    mlp: Split,
    sequence: Split,
}

#[derive(Module, Debug)]
struct EncoderLayer {
    norm1: Norm,
    attention: Attention,
    norm2: Norm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct DecoderLayer {
    norm1: Norm,
    attention: Attention,
    norm2: Norm,
    cross: CrossAttention,
    norm3: Norm,
    up: Linear,
    down: Linear,
}

impl EncoderDecoder {
    /// A model of `config`'s shape over `vocab` tokens, of which `init` says what this rank holds.
    pub fn new(config: &EncoderDecoderConfig, vocab: usize, init: &Init) -> Self {
        let (width, bias, heads) = (config.embed, config.bias, config.heads);
        let depth = config.encoder_layers + config.decoder_layers;
        let deviations = Deviations { input: DEVIATION, residual: DEVIATION / (2.0 * depth as f32).sqrt() };
        let norm = |init: &Init, name: &str| Norm::new(&init.at(name), width, config.norm, bias);
        let encoder = |init: Init| {
            let (up, down) = feed_forward_layers(&init, width, deviations, bias);
            EncoderLayer {
                norm1: norm(&init, "norm1"),
                attention: Attention::new(&init.at("attention"), width, heads, deviations, bias),
                norm2: norm(&init, "norm2"),
                up,
                down,
            }
        };
        let decoder = |init: Init| {
            let (up, down) = feed_forward_layers(&init, width, deviations, bias);
            DecoderLayer {
                norm1: norm(&init, "norm1"),
                attention: Attention::new(&init.at("attention"), width, heads, deviations, bias),
                norm2: norm(&init, "norm2"),
                cross: CrossAttention::new(&init.at("cross"), width, heads, deviations, bias),
                norm3: norm(&init, "norm3"),
                up,
                down,
            }
        };
        let positions = |block: usize, name: &str| {
            let dims: [&[_]; 2] = [&[("positions", config.block)], &[("embed", width)]];
            init.of_blocks(&[block]).map(|init| init.param_of_region(name, dims, Fill::Normal(DEVIATION)))
        };
        let bridge = config.encoder_layers + 1;
        let last = depth + 2;
        Self {
            tokens: init.of_blocks(&[0, bridge, last]).map(|init| {
                init.param("tokens", [&[("vocab", vocab)], &[("embed", width)]], Fill::Normal(DEVIATION))
            }),
            source_positions: positions(0, "source_positions"),
            target_positions: positions(bridge, "target_positions"),
            encoder: (0..config.encoder_layers)
                .map(|i| init.of_blocks(&[i + 1]).map(|init| encoder(init.at("encoder").nth(i))))
                .collect(),
            encoder_norm: init.of_blocks(&[bridge]).map(|init| norm(&init, "encoder_norm")),
            decoder: (0..config.decoder_layers)
                .map(|i| init.of_blocks(&[bridge + 1 + i]).map(|init| decoder(init.at("decoder").nth(i))))
                .collect(),
            norm: init.of_blocks(&[last]).map(|init| norm(&init, "norm")),
            shape: Shape {
                config: config.clone(),
                vocabulary: Vocabulary::new(init, vocab),
                mlp: init.split("mlp"),
                sequence: init.sequence(),
            },
        }
    }

    fn embed(
        &self,
        ids: &Tensor<2, Int>,
        positions: &Option<Param<Tensor<2>>>,
        context: &Context,
        place: u64,
    ) -> Tensor<3> {
        let [_, time] = ids.dims();
        let part = self.shape.sequence.part(time);
        let vocabulary = &self.shape.vocabulary;
        let x = vocabulary.embed(held(&self.tokens).val(), ids.clone());
        let x = vocabulary.add_positions(x, held(positions).val(), part.clone());
        dropout_part(x, self.shape.config.dropout, context.noise(place), part, time)
    }
}

/// Source, target and what follows the target's tokens.
fn pairs(batch: &Batch) -> (&Tensor<2, Int>, &Tensor<2, Int>, &Tensor<2, Int>) {
    match batch {
        Batch::Pairs { sources, inputs, targets } => (sources, inputs, targets),
        _ => panic!("an encoder-decoder was given no pairs"),
    }
}

impl Model for EncoderDecoder {
    fn num_blocks(&self) -> usize {
        self.encoder.len() + self.decoder.len() + 3
    }

    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let (sources, inputs, _) = pairs(batch);
        let (shape, bridge) = (&self.shape, self.encoder.len() + 1);
        let place = 4 * index as u64;
        if index == 0 {
            return Activation::Three(self.embed(sources, &self.source_positions, context, place));
        }
        if index < bridge {
            let [_, time] = sources.dims();
            return Activation::Three(held(&self.encoder[index - 1]).forward(
                input.three(),
                shape,
                time,
                context,
                index,
            ));
        }
        if index == bridge {
            let memory = held(&self.encoder_norm).forward(input.three());
            return Activation::Pair(self.embed(inputs, &self.target_positions, context, place), memory);
        }
        let Some(layer) = self.decoder.get(index - bridge - 1) else {
            let x = held(&self.norm).forward(input.three());
            return Activation::Three(shape.vocabulary.logits(x, held(&self.tokens).val()));
        };
        let (x, memory) = input.pair();
        let [_, time] = inputs.dims();
        let x = held(layer).forward(x, memory.clone(), shape, time, context, index);
        // Behind the last layer nobody looks at the source.
        let last = index == bridge + self.decoder.len();
        if last { Activation::Three(x) } else { Activation::Pair(x, memory) }
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        self.shape.vocabulary.loss(
            output.three(),
            pairs(batch).2.clone(),
            self.shape.config.label_smoothing as f32,
        )
    }

    fn handed_on(&self, index: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let (sources, inputs, _) = pairs(batch);
        let bridge = self.encoder.len() + 1;
        let shape = |ids: &Tensor<2, Int>| {
            let [rows, time] = ids.dims();
            vec![rows, self.shape.sequence.part(time).len(), self.shape.config.embed]
        };
        if index < bridge {
            vec![shape(sources)]
        } else if index < bridge + self.decoder.len() {
            vec![shape(inputs), shape(sources)]
        } else {
            vec![shape(inputs)]
        }
    }
}

impl EncoderLayer {
    fn forward(
        &self,
        x: Tensor<3>,
        shape: &Shape,
        time: usize,
        context: &Context,
        index: usize,
    ) -> Tensor<3> {
        let (rate, place) = (shape.config.dropout, 4 * index as u64);
        let add = |x: Tensor<3>, y: Tensor<3>, place: u64| {
            residual_part(x, y, rate, context.noise(place), shape.sequence.part(time), time)
        };
        let attended =
            self.attention.forward(self.norm1.forward(x.clone()), false, rate, context, index, place);
        let x = add(x, attended, place + 1);
        let hidden = self.norm2.forward(x.clone());
        let hidden = feed_forward(hidden, &self.up, &self.down, shape.config.activation, &shape.mlp);
        add(x, hidden, place + 2)
    }
}

impl DecoderLayer {
    fn forward(
        &self,
        x: Tensor<3>,
        memory: Tensor<3>,
        shape: &Shape,
        time: usize,
        context: &Context,
        index: usize,
    ) -> Tensor<3> {
        let (rate, place) = (shape.config.dropout, 4 * index as u64);
        // Cross attention's masks and its output's share a place with nothing else.
        let cross = 1 << 32;
        let add = |x: Tensor<3>, y: Tensor<3>, place: u64| {
            residual_part(x, y, rate, context.noise(place), shape.sequence.part(time), time)
        };
        let attended =
            self.attention.forward(self.norm1.forward(x.clone()), true, rate, context, index, place);
        let x = add(x, attended, place + 1);
        let seen = self.cross.forward(self.norm2.forward(x.clone()), memory, rate, context, cross + place);
        let x = add(x, seen, cross + place + 1);
        let hidden = self.norm3.forward(x.clone());
        let hidden = feed_forward(hidden, &self.up, &self.down, shape.config.activation, &shape.mlp);
        add(x, hidden, place + 2)
    }
}

impl EncoderDecoderConfig {
    /// What each block costs for one sample, over `vocab` tokens.
    pub fn costs(&self, vocab: usize) -> Vec<BlockCost> {
        let (width, tokens) = (self.embed as f64, self.block as f64);
        // What is kept: see `GptConfig::costs`.
        let heads = self.heads as f64;
        let block = |name: String, flops: f64, kept: f64| BlockCost { name, flops, kept };
        let embedding = |name: &str| block(name.into(), 2.0 * tokens * width, tokens * width);
        let encoder = |i: usize| {
            let flops = tokens * 24.0 * width * width + 4.0 * tokens * tokens * width;
            block(format!("encoder layer {i}"), flops, tokens * (16.0 * width + heads))
        };
        let decoder = |i: usize| {
            let flops = tokens * 32.0 * width * width + 8.0 * tokens * tokens * width;
            block(format!("decoder layer {i}"), flops, tokens * (22.0 * width + 2.0 * heads))
        };
        let flops = 2.0 * tokens * width * vocab as f64;
        std::iter::once(embedding("source embedding"))
            .chain((0..self.encoder_layers).map(encoder))
            .chain([embedding("target embedding")])
            .chain((0..self.decoder_layers).map(decoder))
            .chain([block("output".into(), flops, tokens * (2.0 * width + vocab as f64))])
            .collect()
    }
}
