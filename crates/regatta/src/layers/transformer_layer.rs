//! A transformer layer (Vaswani et al. 2017, "Attention Is All You Need") with pre-normalisation (Xiong et al. 2020, "On
//! Layer Normalization in the Transformer Architecture"). It may be split over ranks (Shoeybi et al. 2019, "Megatron-LM",
//! section 3).

use super::feed_forward::{feed_forward, feed_forward_layers};
use super::{
    ActivationFunction, Attention, Context, CrossAttention, Deviations, Linear, Norm, NormKind, ParamBuilder,
    Split, residual_part,
};
use burn::module::Module;
use burn::tensor::Tensor;

/// The configuration that all transformer layers of a model share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TransformerConfig {
    /// Numbers that represent a token.
    pub width: usize,
    /// Attention heads; must divide `width`.
    pub heads: usize,
    /// Dropout rate, 0 to below 1.
    pub dropout: f64,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
    /// The activation function of the feed-forward part.
    pub activation: ActivationFunction,
    /// The kind of norm.
    pub norm: NormKind,
    /// Standard deviations of initial weights.
    pub deviations: Deviations,
}

/// A transformer layer: self-attention, optional cross attention and a feed-forward part, each with a residual connection.
///
/// ```text
/// x = x + attention(norm1(x))
/// x = x + cross(norm2(x), source)        only with cross attention
/// x = x + down(activation(up(norm(x))))  norm is norm3 with cross attention, norm2 without
/// ```
#[derive(Module, Debug)]
pub struct TransformerLayer {
    norm1: Norm,
    attention: Attention,
    norm2: Norm,
    cross: Option<CrossAttention>,
    norm3: Option<Norm>,
    up: Linear,
    down: Linear,
    #[module(skip)]
    config: TransformerConfig,
    #[module(skip)]
    mlp: Split,
    #[module(skip)]
    sequence: Split,
}

/// The arguments of one forward pass of a layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerPass {
    /// The index of the model's block that the layer is.
    pub block: usize,
    /// Tokens of a whole sequence, of which this rank may hold a part.
    pub time: usize,
    /// Whether a token attends only to itself and to the tokens before it.
    pub causal: bool,
}

impl TransformerLayer {
    /// A layer whose parameters `params` creates. With `cross`, it has cross attention.
    ///
    /// # Panics
    /// `config.heads` is 0.
    pub fn new(params: &ParamBuilder, config: TransformerConfig, cross: bool) -> Self {
        let TransformerConfig { width, heads, bias, norm, deviations, .. } = config;
        let norm = |name: &str| Norm::new(&params.at(name), width, norm, bias);
        let (up, down) = feed_forward_layers(params, width, deviations, bias);
        Self {
            norm1: norm("norm1"),
            attention: Attention::new(&params.at("attention"), width, heads, deviations, bias),
            norm2: norm("norm2"),
            cross: cross.then(|| CrossAttention::new(&params.at("cross"), width, heads, deviations, bias)),
            norm3: cross.then(|| norm("norm3")),
            up,
            down,
            config,
            mlp: params.split("mlp"),
            sequence: params.sequence(),
        }
    }

    /// Maps `x` `[batch, time, width]` to `[batch, time, width]`. Cross attention attends to `source`
    /// `[batch, source time, width]`, and is left out without one. In a region that is split by time, `x` and `source` are
    /// this rank's parts.
    pub fn forward(
        &self,
        x: Tensor<3>,
        source: Option<Tensor<3>>,
        pass: LayerPass,
        context: &Context,
    ) -> Tensor<3> {
        let (rate, block) = (self.config.dropout, pass.block);
        let add = |x: Tensor<3>, y: Tensor<3>, index: usize| {
            residual_part(x, y, rate, context.noise(block, index), self.sequence.part(pass.time), pass.time)
        };
        let attended =
            self.attention.forward(self.norm1.forward(x.clone()), pass.causal, rate, context, [block, 0]);
        let mut x = add(x, attended, 1);
        if let (Some(cross), Some(source)) = (&self.cross, source) {
            let attended = cross.forward(self.norm2.forward(x.clone()), source, rate, context, [block, 2]);
            x = add(x, attended, 3);
        }
        let norm = self.norm3.as_ref().unwrap_or(&self.norm2);
        let hidden = norm.forward(x.clone());
        let hidden = feed_forward(hidden, &self.up, &self.down, self.config.activation, &self.mlp);
        add(x, hidden, 4)
    }
}
