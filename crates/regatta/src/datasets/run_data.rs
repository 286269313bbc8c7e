//! The data sets of a run.

use super::{Checked, dataset::Dataset};
use crate::config::Config;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::Samples;
use std::sync::Arc;

/// The data sets of a run.
#[derive(Clone)]
pub struct Datasets {
    /// Training samples.
    pub train: Arc<dyn Dataset>,
    /// Held-out samples.
    pub val: Arc<dyn Dataset>,
    /// Number of tokens in the vocabulary, or of classes.
    pub vocab: usize,
    /// The tokenizer, for text.
    pub tokenizer: Option<Tokenizer>,
}

impl Datasets {
    /// The same data for a model that was trained with `trained` tokens, which may be more than the tokenizer has.
    pub(crate) fn for_model_over(self, trained: usize) -> Self {
        let padded = self.tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.fits(trained).is_ok());
        let vocab = if padded { trained } else { self.vocab };
        Self { vocab, ..self }
    }

    /// The same data, whose batches are checked against what the model takes.
    pub(crate) fn checked(self, samples: Samples) -> Self {
        let check = |set| Arc::new(Checked::new(set, samples, self.vocab)) as Arc<dyn Dataset>;
        Self { train: check(self.train), val: check(self.val), ..self }
    }

    /// A digest of the content of the data and the tokenizer: three hexadecimal checksums joined by `-`. It does not
    /// depend on the location of the files.
    ///
    /// # Errors
    /// The tokenizer cannot be serialised, or the data cannot be read.
    pub fn digest(&self) -> Result<String> {
        let tokenizer = self.tokenizer.as_ref().map(Tokenizer::to_json).transpose()?.unwrap_or_default();
        let tokenizer = crc32fast::hash(tokenizer.as_bytes());
        Ok(format!("{:08x}-{:08x}-{tokenizer:08x}", self.train.digest()?, self.val.digest()?))
    }

    /// A short description of the data.
    pub fn describe(&self) -> String {
        let (train, val) = (self.train.len(), self.val.len());
        match &self.tokenizer {
            Some(tokenizer) => format!(
                "{:.2} M training tokens, {:.2} M held out, vocabulary of {} tokens ({})",
                (train * self.train.tokens_per_sample()) as f64 / 1e6,
                (val * self.val.tokens_per_sample()) as f64 / 1e6,
                self.vocab,
                tokenizer.kind()
            ),
            None => format!("{train} training samples, {val} held out"),
        }
    }

    /// Checks before training that the tokenizer can encode `sample.prompt`, from which text is generated at the end.
    ///
    /// # Errors
    /// The tokenizer cannot encode the prompt.
    pub fn check_sample(&self, config: &Config) -> Result<()> {
        let (Some(prompt), Some(tokenizer), Some(_)) =
            (&config.sample.prompt, &self.tokenizer, config.model.context())
        else {
            return Ok(());
        };
        tokenizer.encode(prompt).map(drop).map_err(|error| Error::Config {
            origin: "the configuration".into(),
            key: "sample.prompt".into(),
            problem: format!("{error}; the text is generated when training has ended"),
        })
    }
}
