//! A small language model on Burn's own layers, written without Regatta in mind.

use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, attention::generate_autoregressive_mask};
use burn::prelude::*;

/// Tokens are bytes.
const VOCAB: usize = 256;
const WIDTH: usize = 128;
/// Characters of context.
pub const BLOCK: usize = 64;
/// Sequences in a batch.
pub const BATCH: usize = 8;

#[derive(Module, Debug)]
pub struct CharLm {
    tokens: Embedding,
    positions: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl CharLm {
    pub fn new(device: &Device) -> Self {
        let encoder =
            TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, 4).with_dropout(0.0).with_norm_first(true);
        Self {
            tokens: EmbeddingConfig::new(VOCAB, WIDTH).init(device),
            positions: EmbeddingConfig::new(BLOCK, WIDTH).init(device),
            encoder: encoder.init(device),
            head: LinearConfig::new(WIDTH, VOCAB).init(device),
        }
    }

    /// Mean cross entropy of `targets` given `inputs`, both `[batch, time]`.
    pub fn loss(&self, inputs: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [batch, time] = inputs.dims();
        let device = inputs.device();
        let places = Tensor::arange(0..time as i64, &device).reshape([1, time]);
        let x = self.tokens.forward(inputs) + self.positions.forward(places);
        let mask = generate_autoregressive_mask(batch, time, &device);
        let x = self.encoder.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        let logits = self.head.forward(x).reshape([batch * time, VOCAB]);
        CrossEntropyLossConfig::new().init(&device).forward(logits, targets.reshape([batch * time]))
    }
}

/// The `index`-th batch of `text`: inputs and the bytes that follow them, `[BATCH, BLOCK]`.
pub fn batch(text: &[u8], index: usize, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let windows = text.len() - BLOCK;
    let rows: Vec<usize> = (0..BATCH).map(|row| (index * BATCH + row) * 7919 % windows).collect();
    let tensor = |shift: usize| {
        let ids: Vec<i64> =
            rows.iter().flat_map(|&at| &text[at + shift..][..BLOCK]).map(|&b| i64::from(b)).collect();
        Tensor::from_data(TensorData::new(ids, [BATCH, BLOCK]), device)
    };
    (tensor(0), tensor(1))
}

/// Text to learn: a file, or the source code of Regatta's models.
pub fn text() -> std::io::Result<Vec<u8>> {
    match std::env::args().nth(1) {
        Some(path) => std::fs::read(path),
        None => Ok([include_str!("../../src/models/gpt.rs"), include_str!("../../src/models/cnn.rs")]
            .concat()
            .into()),
    }
}
