//! The encoder-decoder transformer (Vaswani et al. 2017, "Attention Is All You Need"), with pre-normalisation, learned
//! positions and one vocabulary for source, target and output. It maps sequences to sequences, as in translation.

use super::gpt::{DEVIATION, UNSPLIT_WIDTHS, deviations, transformer_cost};
use super::{
    Activation, Batch, BlockCost, Border, Limit, Model, ModelSpec, Problem, Samples, at_least_one,
    divides_into_heads, held, largest, rates,
};
use crate::layers::{
    ActivationFunction, Context, Initializer, LayerPass, Norm, NormKind, ParamBuilder, Split,
    TransformerConfig, TransformerLayer, Vocabulary, dropout_part,
};
use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

/// The configuration of an [`EncoderDecoder`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncoderDecoderConfig {
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Attention heads; must divide `embed`.
    pub heads: usize,
    /// Numbers that represent a token.
    pub embed: usize,
    /// Length of a source, and of a target, in tokens.
    #[serde(alias = "block")]
    pub context: usize,
    /// Dropout rate, 0 to below 1.
    pub dropout: f64,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
    /// The activation function of the feed-forward parts.
    #[serde(alias = "gelu")]
    pub activation: ActivationFunction,
    /// The kind of norm.
    pub norm: NormKind,
    /// Label smoothing: the part of the targets' probability that the loss spreads over all tokens, 0 to below 1.
    pub label_smoothing: f64,
}

impl Default for EncoderDecoderConfig {
    fn default() -> Self {
        Self {
            encoder_layers: 3,
            decoder_layers: 3,
            heads: 8,
            embed: 256,
            context: 64,
            dropout: 0.0,
            bias: false,
            activation: ActivationFunction::Gelu,
            norm: NormKind::Layer,
            label_smoothing: 0.0,
        }
    }
}

impl EncoderDecoderConfig {
    /// The index of the target embedding's block.
    fn target_block(&self) -> usize {
        self.encoder_layers + 1
    }

    fn layer(&self) -> TransformerConfig {
        TransformerConfig {
            width: self.embed,
            heads: self.heads,
            dropout: self.dropout,
            bias: self.bias,
            activation: self.activation,
            norm: self.norm,
            deviations: deviations(self.encoder_layers + self.decoder_layers),
        }
    }
}

/// An encoder-decoder transformer (Vaswani et al. 2017, "Attention Is All You Need"), from token ids of sources
/// `[batch, source time]` and targets `[batch, time]` to logits `[batch, time, vocab]`.
///
/// Its blocks are the source embedding, each encoder layer, the target embedding, each decoder layer and the output. From the
/// target embedding on, blocks pass on two tensors: the decoder's and the encoder's output.
#[derive(Module, Debug)]
pub struct EncoderDecoder {
    tokens: Option<Param<Tensor<2>>>,
    source_positions: Option<Param<Tensor<2>>>,
    target_positions: Option<Param<Tensor<2>>>,
    encoder: Vec<Option<TransformerLayer>>,
    encoder_norm: Option<Norm>,
    decoder: Vec<Option<TransformerLayer>>,
    norm: Option<Norm>,
    #[module(skip)]
    config: EncoderDecoderConfig,
    #[module(skip)]
    vocabulary: Vocabulary,
    #[module(skip)]
    sequence: Split,
}

impl EncoderDecoder {
    /// Builds the model for a vocabulary of `vocab` tokens; `params` creates its parameters.
    ///
    /// # Panics
    /// `config.heads` is 0.
    pub fn new(config: &EncoderDecoderConfig, vocab: usize, params: &ParamBuilder) -> Self {
        let width = config.embed;
        let (target, last) = (config.target_block(), config.encoder_layers + config.decoder_layers + 2);
        let norm = |block: usize, name: &str| {
            let params = params.of_blocks(&[block])?.at(name);
            Some(Norm::new(&params, width, config.norm, config.bias))
        };
        let layer = |name: &str, first: usize, i: usize, cross: bool| {
            let params = params.of_blocks(&[first + i])?.at(name).nth(i);
            Some(TransformerLayer::new(&params, config.layer(), cross))
        };
        let positions = |block: usize, name: &str| {
            let dims: [&[_]; 2] = [&[("positions", config.context)], &[("embed", width)]];
            let params = params.of_blocks(&[block])?;
            Some(params.param_of_region(name, dims, Initializer::Normal(DEVIATION)))
        };
        Self {
            tokens: params.of_blocks(&[0, target, last]).map(|params| {
                let dims: [&[_]; 2] = [&[("vocab", vocab)], &[("embed", width)]];
                params.param("tokens", dims, Initializer::Normal(DEVIATION))
            }),
            source_positions: positions(0, "source_positions"),
            target_positions: positions(target, "target_positions"),
            encoder: (0..config.encoder_layers).map(|i| layer("encoder", 1, i, false)).collect(),
            encoder_norm: norm(target, "encoder_norm"),
            decoder: (0..config.decoder_layers).map(|i| layer("decoder", target + 1, i, true)).collect(),
            norm: norm(last, "norm"),
            config: config.clone(),
            vocabulary: Vocabulary::new(params, vocab),
            sequence: params.sequence(),
        }
    }

    fn embed(
        &self,
        ids: &Tensor<2, Int>,
        positions: &Option<Param<Tensor<2>>>,
        context: &Context,
        block: usize,
    ) -> Tensor<3> {
        let [_, time] = ids.dims();
        let part = self.sequence.part(time);
        let x = self.vocabulary.embed(held(&self.tokens).val(), ids.clone());
        let x = self.vocabulary.add_positions(x, held(positions).val(), part.clone());
        dropout_part(x, self.config.dropout, context.noise(block, 0), part, time)
    }
}

impl Model for EncoderDecoder {
    fn num_blocks(&self) -> usize {
        self.encoder.len() + self.decoder.len() + 3
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        let (sources, inputs, _) = batch.pairs();
        let target = self.config.target_block();
        if block == 0 {
            return Activation::Three(self.embed(sources, &self.source_positions, context, block));
        }
        if block < target {
            let [_, time] = sources.dims();
            let pass = LayerPass { block, time, causal: false };
            return Activation::Three(held(&self.encoder[block - 1]).forward(
                input.three(),
                None,
                pass,
                context,
            ));
        }
        if block == target {
            let source = held(&self.encoder_norm).forward(input.three());
            return Activation::Pair(self.embed(inputs, &self.target_positions, context, block), source);
        }
        let Some(layer) = self.decoder.get(block - target - 1) else {
            let x = held(&self.norm).forward(input.three());
            return Activation::Three(self.vocabulary.logits(x, held(&self.tokens).val()));
        };
        let (x, source) = input.pair();
        let [_, time] = inputs.dims();
        let pass = LayerPass { block, time, causal: true };
        let x = held(layer).forward(x, Some(source.clone()), pass, context);
        // No block after the last decoder layer uses the source.
        let last = block == target + self.decoder.len();
        if last { Activation::Three(x) } else { Activation::Pair(x, source) }
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        let smoothing = self.config.label_smoothing as f32;
        self.vocabulary.loss(output.three(), batch.pairs().2.clone(), smoothing)
    }

    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        let (sources, inputs, _) = batch.pairs();
        let target = self.config.target_block();
        let shape = |ids: &Tensor<2, Int>| {
            let [rows, time] = ids.dims();
            vec![rows, self.sequence.part(time).len(), self.config.embed]
        };
        if block < target {
            vec![shape(sources)]
        } else if block < target + self.decoder.len() {
            vec![shape(inputs), shape(sources)]
        } else {
            vec![shape(inputs)]
        }
    }
}

impl ModelSpec for EncoderDecoderConfig {
    const KIND: &'static str = "encoder-decoder";
    type Model = EncoderDecoder;

    fn samples(&self) -> Samples {
        Samples::Pairs { source_time: self.context, time: self.context }
    }

    fn build(&self, vocab: usize, params: &ParamBuilder) -> EncoderDecoder {
        EncoderDecoder::new(self, vocab, params)
    }

    fn costs(&self, vocab: usize) -> Vec<BlockCost> {
        let (width, tokens) = (self.embed as f64, self.context as f64);
        let block = |name: &str, flops: f64, kept: f64| BlockCost {
            name: name.into(),
            flops,
            kept,
            unsplit: kept.min(UNSPLIT_WIDTHS * tokens * width),
        };
        let embedding = |name: &str| block(name, 2.0 * tokens * width, tokens * width);
        let layer = |name: &str, i: usize, cross: bool| {
            transformer_cost(format!("{name} layer {i}"), width, self.heads, tokens, cross)
        };
        let flops = 2.0 * tokens * width * vocab as f64;
        std::iter::once(embedding("source embedding"))
            .chain((0..self.encoder_layers).map(|i| layer("encoder", i, false)))
            .chain([embedding("target embedding")])
            .chain((0..self.decoder_layers).map(|i| layer("decoder", i, true)))
            .chain([block("output", flops, tokens * (2.0 * width + vocab as f64))])
            .collect()
    }

    fn borders(&self, block: usize) -> Vec<Border> {
        let numbers = self.context * self.embed;
        let target = self.target_block();
        if block == 0 || block == target {
            return Border::of_embedding(numbers);
        }
        if block > target + self.decoder_layers {
            return Border::of_vocabulary(numbers, self.context, self.label_smoothing);
        }
        Border::of_transformer_layer(numbers, (block > target).then_some(numbers))
    }

    fn limits(&self) -> Vec<Limit> {
        vec![
            ("encoder_layers", self.encoder_layers, largest::LAYERS),
            ("decoder_layers", self.decoder_layers, largest::LAYERS),
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
}
