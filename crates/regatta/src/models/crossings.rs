//! Where the blocks of a model go into layers that are split over ranks, and come out of them: what tensor parallelism
//! communicates, as data (Shoeybi et al. 2019, "Megatron-LM", section 3).

use super::{EncoderDecoderConfig, GptConfig};

/// What happens at a border of split layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// Into split layers, as [`Split::enter`](crate::layers::Split::enter).
    Enter,
    /// Out of them, as [`Split::leave`](crate::layers::Split::leave).
    Leave,
    /// An all-reduce forward, and nothing backward: in the loss.
    Reduce,
}

/// A border of split layers in a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Border {
    /// Which one, as in `attention out`.
    pub what: &'static str,
    /// The dimension whose split it is the border of.
    pub dim: &'static str,
    /// Which way.
    pub crossing: Crossing,
    /// Numbers of the whole tensor that crosses, for one sample.
    pub numbers: usize,
}

fn into(what: &'static str, dim: &'static str, numbers: usize) -> Border {
    Border { what, dim, crossing: Crossing::Enter, numbers }
}

fn out_of(what: &'static str, dim: &'static str, numbers: usize) -> Border {
    Border { what, dim, crossing: Crossing::Leave, numbers }
}

fn attention(numbers: usize) -> [Border; 2] {
    [into("attention in", "heads", numbers), out_of("attention out", "heads", numbers)]
}

fn feed_forward(numbers: usize) -> [Border; 2] {
    [into("feed-forward in", "mlp", numbers), out_of("feed-forward out", "mlp", numbers)]
}

fn embedding(numbers: usize) -> Vec<Border> {
    vec![out_of("tokens", "vocab", numbers)]
}

/// The output and the loss behind it, over `time` tokens; a smoothed one takes the logits' sum too.
fn output(numbers: usize, time: usize, smoothing: f64) -> Vec<Border> {
    let sums = if smoothing > 0.0 { 3 } else { 2 };
    let reduce = |what, numbers| Border { what, dim: "vocab", crossing: Crossing::Reduce, numbers };
    vec![into("logits in", "vocab", numbers), reduce("largest logits", time), reduce("sums", sums * time)]
}

impl GptConfig {
    /// The borders of split layers in `block`, in the order of its forward.
    pub fn borders(&self, block: usize) -> Vec<Border> {
        let numbers = self.block * self.embed;
        match block {
            0 => embedding(numbers),
            layer if layer <= self.layers => [attention(numbers), feed_forward(numbers)].concat(),
            _ => output(numbers, self.block, self.label_smoothing),
        }
    }
}

impl EncoderDecoderConfig {
    /// The borders of split layers in `block`, in the order of its forward.
    pub fn borders(&self, block: usize) -> Vec<Border> {
        let numbers = self.block * self.embed;
        let bridge = self.encoder_layers + 1;
        if block == 0 || block == bridge {
            return embedding(numbers);
        }
        if block > bridge + self.decoder_layers {
            return output(numbers, self.block, self.label_smoothing);
        }
        let mut borders = attention(numbers).to_vec();
        if block > bridge {
            borders.push(into("cross attention in", "heads", numbers));
            borders.push(into("cross attention's source in", "heads", numbers));
            borders.push(out_of("cross attention out", "heads", numbers));
        }
        borders.extend(feed_forward(numbers));
        borders
    }
}
