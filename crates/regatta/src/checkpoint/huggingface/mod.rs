//! GPT-2 models as Hugging Face's `transformers` saves them: a folder with `config.json` and `model.safetensors`.

mod export;
mod import;
mod names;

pub use export::{Exported, export};
#[cfg(any(test, fuzzing))]
pub(crate) use import::examine;
pub use import::{Imported, import};

use crate::models::{ActivationFunction, GptConfig, NormKind};
use serde::{Deserialize, Serialize};

/// The term against division by zero in layer norms, as in Burn, PyTorch and GPT-2.
const EPSILON: f64 = 1e-5;
/// Largest size of a dimension: products of two dimensions must not overflow.
const LARGEST_SIZE: usize = 1 << 24;

/// The settings in `config.json` that affect the model's values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Gpt2Config {
    model_type: String,
    #[serde(skip_deserializing)]
    architectures: Vec<String>,
    n_layer: usize,
    n_head: usize,
    n_embd: usize,
    n_positions: usize,
    n_inner: Option<usize>,
    vocab_size: usize,
    activation_function: String,
    layer_norm_epsilon: f64,
    scale_attn_weights: bool,
    scale_attn_by_inverse_layer_idx: bool,
    add_cross_attention: bool,
    tie_word_embeddings: bool,
    attn_pdrop: f64,
    embd_pdrop: f64,
    resid_pdrop: f64,
    #[serde(skip_deserializing)]
    bos_token_id: Option<u32>,
    #[serde(skip_deserializing)]
    eos_token_id: Option<u32>,
}

/// The defaults of `transformers` for missing settings.
impl Default for Gpt2Config {
    fn default() -> Self {
        Self {
            model_type: String::new(),
            architectures: vec![],
            n_layer: 12,
            n_head: 12,
            n_embd: 768,
            n_positions: 1024,
            n_inner: None,
            vocab_size: 50257,
            activation_function: "gelu_new".into(),
            layer_norm_epsilon: EPSILON,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            add_cross_attention: false,
            tie_word_embeddings: true,
            attn_pdrop: 0.1,
            embd_pdrop: 0.1,
            resid_pdrop: 0.1,
            bos_token_id: None,
            eos_token_id: None,
        }
    }
}

impl Gpt2Config {
    fn of(gpt: &GptConfig, vocab: usize, end_of_text: Option<u32>) -> Self {
        Self {
            model_type: "gpt2".into(),
            architectures: vec!["GPT2LMHeadModel".into()],
            n_layer: gpt.layers,
            n_head: gpt.heads,
            n_embd: gpt.embed,
            n_positions: gpt.context,
            vocab_size: vocab,
            activation_function: match gpt.activation {
                ActivationFunction::Gelu => "gelu".into(),
                ActivationFunction::GeluTanh => "gelu_new".into(),
                ActivationFunction::Silu => "silu".into(),
                ActivationFunction::Relu => "relu".into(),
            },
            tie_word_embeddings: gpt.tied,
            attn_pdrop: gpt.dropout,
            embd_pdrop: gpt.dropout,
            resid_pdrop: gpt.dropout,
            bos_token_id: end_of_text,
            eos_token_id: end_of_text,
            ..Self::default()
        }
    }

    /// The same model as a configuration of ours.
    ///
    /// # Errors
    /// The message names the setting that our GPT does not support.
    fn gpt(&self) -> Result<GptConfig, String> {
        let refuse = |key: &str, value: String, can: &str| {
            Err(format!("has {key} {value}: Regatta's gpt supports {can}"))
        };
        if self.model_type != "gpt2" {
            return refuse("model_type", format!("{:?}", self.model_type), "only \"gpt2\"");
        }
        let activation = match self.activation_function.as_str() {
            "gelu" | "gelu_python" => ActivationFunction::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => ActivationFunction::GeluTanh,
            "silu" | "swish" => ActivationFunction::Silu,
            "relu" => ActivationFunction::Relu,
            other => {
                let can = "\"gelu\", \"gelu_new\", \"silu\" or \"relu\"";
                return refuse("activation_function", format!("{other:?}"), can);
            }
        };
        for (key, size) in [
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("n_embd", self.n_embd),
            ("n_positions", self.n_positions),
            ("vocab_size", self.vocab_size),
        ] {
            if size == 0 || size > LARGEST_SIZE {
                return refuse(key, size.to_string(), &format!("1 to {LARGEST_SIZE}"));
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return refuse("n_embd", self.n_embd.to_string(), "a multiple of n_head");
        }
        if let Some(inner) = self.n_inner.filter(|&inner| inner != 4 * self.n_embd) {
            return refuse("n_inner", inner.to_string(), "four times n_embd");
        }
        if (self.layer_norm_epsilon - EPSILON).abs() > 1e-9 {
            return refuse("layer_norm_epsilon", self.layer_norm_epsilon.to_string(), "0.00001");
        }
        for (key, value, can) in [
            ("scale_attn_weights", self.scale_attn_weights, true),
            ("scale_attn_by_inverse_layer_idx", self.scale_attn_by_inverse_layer_idx, false),
            ("add_cross_attention", self.add_cross_attention, false),
        ] {
            if value != can {
                return refuse(key, value.to_string(), &can.to_string());
            }
        }
        if !(0.0..1.0).contains(&self.resid_pdrop) {
            return refuse("resid_pdrop", self.resid_pdrop.to_string(), "0 to below 1");
        }
        Ok(GptConfig {
            layers: self.n_layer,
            heads: self.n_head,
            embed: self.n_embd,
            context: self.n_positions,
            dropout: self.resid_pdrop,
            bias: true,
            tied: self.tie_word_embeddings,
            activation,
            norm: NormKind::Layer,
            label_smoothing: 0.0,
        })
    }
}
