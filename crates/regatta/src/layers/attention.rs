//! Attention over heads that may be split over ranks (Vaswani et al. 2017, section 3.2; Shoeybi et al. 2019, section 3).

use super::{Context, Linear, ParamBuilder, Split};
use crate::autograd::{AttentionInput, AttentionOptions, attention, split_heads};
use burn::module::Module;
use burn::tensor::Tensor;
use regatta_kernel::dropout::Noise;

/// Multi-head self-attention (Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2). Its heads may be split over
/// the tensor axis.
#[derive(Module, Debug)]
pub struct Attention {
    qkv: Linear,
    out: Linear,
    #[module(skip)]
    heads: Heads,
}

/// Multi-head attention of one sequence to another (Vaswani et al. 2017, section 3.2.3). Its heads may be split over the
/// tensor axis.
#[derive(Module, Debug)]
pub struct CrossAttention {
    query: Linear,
    kv: Linear,
    out: Linear,
    #[module(skip)]
    heads: Heads,
}

#[derive(Debug, Clone)]
struct Heads {
    /// The number of heads in the model.
    count: usize,
    split: Split,
}

/// Standard deviations of initial weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deviations {
    /// For weights that read the residual stream.
    pub input: f32,
    /// For weights that write to the residual stream.
    pub residual: f32,
}

impl Heads {
    fn new(params: &ParamBuilder, heads: usize) -> Self {
        Self { count: heads, split: params.split("heads") }
    }

    /// The options of this rank's heads. With `past`, attention is causal and the queries come after that many keys.
    fn options(&self, past: Option<usize>, rate: f64, noise: Option<Noise>) -> AttentionOptions {
        let part = self.split.part(self.count);
        AttentionOptions {
            heads: part.len(),
            first_head: part.start,
            all_heads: self.count,
            past,
            rate,
            noise,
        }
    }
}

impl Attention {
    /// Self-attention over tokens of `width` numbers with `heads` heads, which must divide `width`. With `bias`, the
    /// projections have biases.
    ///
    /// # Panics
    /// `heads` is 0.
    pub fn new(
        params: &ParamBuilder,
        width: usize,
        heads: usize,
        deviations: Deviations,
        bias: bool,
    ) -> Self {
        let head = width / heads;
        let (qkv, out) = (params.at("qkv"), params.at("out"));
        let qkv_dims: &[(&str, usize)] = &[("three", 3), ("heads", heads), ("head", head)];
        let head_dims: &[(&str, usize)] = &[("heads", heads), ("head", head)];
        Self {
            qkv: Linear::columns(&qkv, &[("embed", width)], qkv_dims, deviations.input, bias),
            out: Linear::rows(&out, head_dims, &[("embed", width)], deviations.residual, bias),
            heads: Heads::new(params, heads),
        }
    }

    /// Maps `x` `[batch, time, width]` to `[batch, time, width]`. With `causal`, a token attends only to itself and to the
    /// tokens before it. `rate` is the dropout rate of attention weights, 0 to below 1. The block and the index identify the
    /// random numbers of their mask ([`Context::noise`]). In generation, the block identifies the cache of keys and values.
    pub fn forward(
        &self,
        x: Tensor<3>,
        causal: bool,
        rate: f64,
        context: &Context,
        [block, index]: [usize; 2],
    ) -> Tensor<3> {
        let heads = &self.heads;
        let options = heads.options(causal.then_some(context.past()), rate, context.noise(block, index));
        let qkv = self.qkv.forward(heads.split.enter(x));
        let input = if context.has_cache() {
            let [query, keys, values] = split_heads(qkv, options.heads);
            let (keys, values) = context.append_to_cache(block, keys, values);
            AttentionInput::Separate([query, keys, values])
        } else {
            AttentionInput::Fused(qkv)
        };
        let attended = attention(input, options);
        self.out.add_bias(heads.split.leave(self.out.sum(attended)))
    }
}

impl CrossAttention {
    /// Attention over tokens of `width` numbers with `heads` heads, which must divide `width`. With `bias`, the projections
    /// have biases.
    ///
    /// # Panics
    /// `heads` is 0.
    pub fn new(
        params: &ParamBuilder,
        width: usize,
        heads: usize,
        deviations: Deviations,
        bias: bool,
    ) -> Self {
        let head = width / heads;
        let head_dims: &[(&str, usize)] = &[("heads", heads), ("head", head)];
        let kv_dims: &[(&str, usize)] = &[("two", 2), ("heads", heads), ("head", head)];
        let embed: &[(&str, usize)] = &[("embed", width)];
        Self {
            query: Linear::columns(&params.at("query"), embed, head_dims, deviations.input, bias),
            kv: Linear::columns(&params.at("kv"), embed, kv_dims, deviations.input, bias),
            out: Linear::rows(&params.at("out"), head_dims, embed, deviations.residual, bias),
            heads: Heads::new(params, heads),
        }
    }

    /// Attends from `x` `[batch, time, width]` to `memory` `[batch, source time, width]` and returns `[batch, time, width]`.
    /// `rate` is the dropout rate of attention weights, 0 to below 1. The block and the index identify the random numbers of
    /// their mask ([`Context::noise`]).
    pub fn forward(
        &self,
        x: Tensor<3>,
        memory: Tensor<3>,
        rate: f64,
        context: &Context,
        [block, index]: [usize; 2],
    ) -> Tensor<3> {
        let heads = &self.heads;
        let options = heads.options(None, rate, context.noise(block, index));
        let query = self.query.forward(heads.split.enter(x));
        let kv = self.kv.forward(heads.split.enter(memory));
        let attended = attention(AttentionInput::Cross(query, kv), options);
        self.out.add_bias(heads.split.leave(self.out.sum(attended)))
    }
}
