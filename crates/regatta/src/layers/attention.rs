//! Attention over heads that may be split over ranks (Vaswani et al. 2017, section 3.2; Shoeybi et al. 2019, section 3).

use super::{Context, Init, Linear, Split};
use crate::autograd::{Rule, Seen, apart, attention};
use crate::random::Stream;
use burn::module::Module;
use burn::tensor::Tensor;

/// Self-attention.
#[derive(Module, Debug)]
pub struct Attention {
    qkv: Linear,
    out: Linear,
    #[module(skip)]
    heads: Heads,
}

/// Attention of one sequence to another.
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
    /// In the whole model.
    whole: usize,
    split: Split,
}

/// Deviations of initial weights: of inputs, and of projections onto the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct Deviations {
    /// Of weights that read the residual stream.
    pub input: f32,
    /// Of weights that write to it.
    pub residual: f32,
}

impl Heads {
    fn new(init: &Init, heads: usize) -> Self {
        Self { whole: heads, split: init.split("heads") }
    }

    /// How this rank's heads see; with `past`, queries come after that many keys and see only those up to themselves.
    fn rule(&self, past: Option<usize>, rate: f64, noise: Option<Stream>) -> Rule {
        let part = self.split.part(self.whole);
        Rule { heads: part.len(), first: part.start, all: self.whole, past, rate, noise }
    }
}

impl Attention {
    /// Over `width` in `heads` heads.
    pub fn new(init: &Init, width: usize, heads: usize, deviations: Deviations, bias: bool) -> Self {
        let head = width / heads;
        let (qkv, out) = (init.at("qkv"), init.at("out"));
        let three: &[(&str, usize)] = &[("three", 3), ("heads", heads), ("head", head)];
        let one: &[(&str, usize)] = &[("heads", heads), ("head", head)];
        Self {
            qkv: Linear::columns(&qkv, &[("embed", width)], three, deviations.input, bias),
            out: Linear::rows(&out, one, &[("embed", width)], deviations.residual, bias),
            heads: Heads::new(init, heads),
        }
    }

    /// Of `[batch, time, embed]`, the same. `block` is where keys and values are remembered, in generation.
    pub fn forward(
        &self,
        x: Tensor<3>,
        causal: bool,
        rate: f64,
        context: &Context,
        block: usize,
        place: u64,
    ) -> Tensor<3> {
        let heads = &self.heads;
        let rule = heads.rule(causal.then_some(context.past()), rate, context.noise(place));
        let qkv = self.qkv.forward(heads.split.enter(x));
        let seen = if context.remembers() {
            let [query, keys, values] = apart(qkv, rule.heads);
            let (keys, values) = context.remember(block, keys, values);
            Seen::Apart([query, keys, values])
        } else {
            Seen::Itself(qkv)
        };
        let mixed = attention(seen, rule);
        self.out.add_bias(heads.split.leave(self.out.sum(mixed)))
    }
}

impl CrossAttention {
    /// Over `width` in `heads` heads.
    pub fn new(init: &Init, width: usize, heads: usize, deviations: Deviations, bias: bool) -> Self {
        let head = width / heads;
        let one: &[(&str, usize)] = &[("heads", heads), ("head", head)];
        let two: &[(&str, usize)] = &[("two", 2), ("heads", heads), ("head", head)];
        let embed: &[(&str, usize)] = &[("embed", width)];
        Self {
            query: Linear::columns(&init.at("query"), embed, one, deviations.input, bias),
            kv: Linear::columns(&init.at("kv"), embed, two, deviations.input, bias),
            out: Linear::rows(&init.at("out"), one, embed, deviations.residual, bias),
            heads: Heads::new(init, heads),
        }
    }

    /// What `x` `[batch, time, embed]` sees in `memory` `[batch, other time, embed]`.
    pub fn forward(
        &self,
        x: Tensor<3>,
        memory: Tensor<3>,
        rate: f64,
        context: &Context,
        place: u64,
    ) -> Tensor<3> {
        let heads = &self.heads;
        let rule = heads.rule(None, rate, context.noise(place));
        let query = self.query.forward(heads.split.enter(x));
        let kv = self.kv.forward(heads.split.enter(memory));
        let mixed = attention(Seen::Other(query, kv), rule);
        self.out.add_bias(heads.split.leave(self.out.sum(mixed)))
    }
}
