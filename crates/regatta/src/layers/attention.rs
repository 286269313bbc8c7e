//! Attention over heads that may be split over ranks (Vaswani et al. 2017, section 3.2; Shoeybi et al. 2019, section 3).

use super::{Context, Init, Linear, Split, dropout_part};
use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};

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
    /// Width of each.
    width: usize,
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
    fn new(init: &Init, width: usize, heads: usize) -> Self {
        Self { whole: heads, width: width / heads, split: init.split("heads") }
    }

    /// `[batch, time, n * heads * head]` to n times `[batch, heads, time, head]`.
    fn apart<const N: usize>(&self, x: Tensor<3>) -> [Tensor<4>; N] {
        let [batch, time, _] = x.dims();
        let heads = self.split.part(self.whole).len();
        let x = x.reshape([batch, time, N * heads, self.width]).swap_dims(1, 2);
        std::array::from_fn(|i| x.clone().narrow(1, i * heads, heads))
    }

    /// What the heads see, side by side, `[batch, time, heads * head]`. With `past`, queries come after that many keys and
    /// see only those up to themselves.
    fn mix(
        &self,
        [query, keys, values]: [Tensor<4>; 3],
        past: Option<usize>,
        rate: f64,
        noise: Option<crate::random::Stream>,
    ) -> Tensor<3> {
        let [batch, heads, time, width] = query.dims();
        let [_, _, seen, _] = keys.dims();
        let scores = query.matmul(keys.swap_dims(2, 3)).mul_scalar((width as f64).powf(-0.5));
        let scores = match past {
            Some(past) => {
                let mask = Tensor::<2, Bool>::tril_mask([time, seen], past as i64, &scores.device());
                scores.mask_fill(mask.unsqueeze::<4>(), f32::NEG_INFINITY)
            }
            None => scores,
        };
        let part = self.split.part(self.whole);
        let weights = dropout_part(softmax(scores, 3), rate, noise, part, self.whole);
        weights.matmul(values).swap_dims(1, 2).reshape([batch, time, heads * width])
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
            heads: Heads::new(init, width, heads),
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
        let [query, keys, values] = heads.apart(self.qkv.forward(heads.split.enter(x)));
        let past = context.past();
        let (keys, values) = context.remember(block, keys, values);
        let mixed = heads.mix([query, keys, values], causal.then_some(past), rate, context.noise(place));
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
            heads: Heads::new(init, width, heads),
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
        let [query] = heads.apart(self.query.forward(heads.split.enter(x)));
        let [keys, values] = heads.apart(self.kv.forward(heads.split.enter(memory)));
        let mixed = heads.mix([query, keys, values], None, rate, context.noise(place));
        self.out.add_bias(heads.split.leave(self.out.sum(mixed)))
    }
}
