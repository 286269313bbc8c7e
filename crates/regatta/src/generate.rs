//! Text from a trained language model.

use crate::autograd::{device, to_vec};
use crate::checkpoint::{Checkpoint, Which};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::Gpt;
use crate::parallel::ParamStore;
use crate::random::Stream;
use crate::train::{ModelConfig, SampleConfig};
use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use std::path::Path;

/// A language model and its tokenizer, loaded from a run's folder.
pub struct Generator {
    model: Gpt,
    tokenizer: Tokenizer,
    /// The model views this memory.
    _store: ParamStore,
}

impl Generator {
    /// Loads a checkpoint of the run folder `run`.
    ///
    /// # Errors
    /// No checkpoint, a damaged one, or one of a model that does not generate text.
    pub fn load(run: &Path, which: Which) -> Result<Self> {
        let checkpoint = Checkpoint::find(run, which)?;
        let ModelConfig::Gpt(config) = &checkpoint.state.config.model else {
            return Err(Error::checkpoint(
                checkpoint.path(),
                "holds no language model: there is no text to generate",
            ));
        };
        let tokenizer = Tokenizer::load(&run.join("tokenizer.json"))?;
        if tokenizer.vocab_size() != checkpoint.state.vocab {
            let problem = format!(
                "was trained with {} tokens, but tokenizer.json beside it has {}",
                checkpoint.state.vocab,
                tokenizer.vocab_size()
            );
            return Err(Error::checkpoint(checkpoint.path(), problem));
        }
        let (model, mut store) = ParamStore::adopt(Gpt::new(config, checkpoint.state.vocab, 0), 25 << 20)?;
        checkpoint.load_parameters(&mut store)?;
        Ok(Self { model: model.valid(), tokenizer, _store: store })
    }

    /// Goes on from `prompt`, handing each piece of text to `emit` as soon as it is complete. Stops early when
    /// `emit` returns false.
    ///
    /// # Errors
    /// A prompt that the tokenizer cannot encode.
    pub fn stream(
        &self,
        prompt: &str,
        options: &SampleConfig,
        seed: u64,
        mut emit: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        let mut ids = self.tokenizer.encode(prompt)?;
        if ids.is_empty() {
            // Something to go on from: the first token, which for text is most often a line break.
            ids.push(self.tokenizer.encode("\n").ok().and_then(|ids| ids.first().copied()).unwrap_or(0));
        }
        let noise = Stream::new(seed).named("sample");
        let mut decoder = self.tokenizer.stream();
        for n in 0..options.tokens {
            let context = &ids[ids.len().saturating_sub(self.model.block())..];
            let data: Vec<i64> = context.iter().map(|&id| i64::from(id)).collect();
            let input = Tensor::<2, Int>::from_data(TensorData::new(data, [1, context.len()]), &device());
            let logits = self.model.logits(input).narrow(1, context.len() - 1, 1);
            let logits =
                to_vec(logits).ok_or_else(|| Error::Numeric("the model's logits are not f32".into()))?;
            let id = choose(&logits, options, noise.uniform(n as u64));
            ids.push(id);
            let text = decoder.push(id);
            if !text.is_empty() && !emit(&text) {
                return Ok(());
            }
        }
        // The last token may have ended within a character.
        let rest = decoder.finish();
        if !rest.is_empty() {
            emit(&rest);
        }
        Ok(())
    }

    /// `prompt` and what follows it, as one string.
    ///
    /// # Errors
    /// As for [`stream`](Self::stream).
    pub fn text(&self, prompt: &str, options: &SampleConfig, seed: u64) -> Result<String> {
        let mut text = prompt.to_string();
        self.stream(prompt, options, seed, |piece| {
            text.push_str(piece);
            true
        })?;
        Ok(text)
    }
}

/// Chooses a token by `logits`, with `uniform` in [0, 1) as the dice.
fn choose(logits: &[f32], options: &SampleConfig, uniform: f32) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    if options.temperature == 0.0 {
        return order.first().copied().unwrap_or(0);
    }
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let top = order.first().map_or(0.0, |&id| logits[id as usize]);
    let weight = |id: u32| (f64::from(logits[id as usize] - top) / options.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut left = f64::from(uniform) * total;
    for &id in &order {
        left -= weight(id);
        if left < 0.0 {
            return id;
        }
    }
    order.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choice_follows_temperature_and_top_k() {
        let logits = [0.0, 3.0, 2.0, -1.0];
        let options = |temperature, top_k| SampleConfig { temperature, top_k, ..Default::default() };
        assert_eq!(choose(&logits, &options(0.0, 0), 0.99), 1);
        assert_eq!(choose(&logits, &options(1.0, 1), 0.99), 1);
        assert_eq!(choose(&logits, &options(1.0, 2), 0.99), 2);
        assert_eq!(choose(&logits, &options(1.0, 0), 0.9999), 3);
        let hits = (0..1000).filter(|&i| choose(&logits, &options(1.0, 0), i as f32 / 1000.0) == 1).count();
        let expected = 3f64.exp() / (1.0 + 3f64.exp() + 2f64.exp() + (-1f64).exp());
        assert!((hits as f64 / 1000.0 - expected).abs() < 0.01, "{hits} {expected}");
    }
}
