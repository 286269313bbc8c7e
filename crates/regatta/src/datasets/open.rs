//! Opens the data that a configuration names, and prepares it first if necessary.

use super::dataset::Dataset;
use super::images::{DigitSamples, ImageSamples, SyntheticSamples};
use super::own;
use super::prepare::prepare;
use super::run_data::Datasets;
use super::text::{PairSamples, TextSamples};
use crate::config::{Config, DataKind, TokenizerKind};
use crate::data::cifar10::{self, Images};
use crate::data::mnist::Digits;
use crate::data::notice::Listener;
use crate::data::synthetic::Patterns;
use crate::data::tokenizer::Tokenizer;
use crate::data::tokens::{TokenFile, Windows};
use crate::error::Result;
use crate::models::Samples;
use std::path::Path;
use std::sync::Arc;

/// Number of classes of MNIST: the digits.
const CLASSES: usize = 10;

impl Datasets {
    /// Opens the data of `config`. Text is prepared first unless that was done before with the same settings. If
    /// several processes open the same data, one prepares it and the others wait.
    ///
    /// # Errors
    /// The data is missing, unreadable or too small for the model.
    pub fn open(config: &Config) -> Result<Self> {
        Self::open_with(config, &mut |_| {})
    }

    /// As [`open`](Self::open); `listener` receives warnings and the progress of the preparation.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(config: &Config, listener: &mut Listener<'_>) -> Result<Self> {
        match (config.model.samples(), config.data.kind) {
            (_, DataKind::Own) => own::open(config),
            (Samples::Text { time }, _) => {
                let folder = prepare(&config.data, listener)?;
                let open = |name: &str, seed| -> Result<Arc<dyn Dataset>> {
                    let windows = Windows::new(TokenFile::open(&folder.join(name))?, time, seed)?;
                    Ok(Arc::new(TextSamples(windows, time)))
                };
                Self::of_text(config, &folder, open)
            }
            (Samples::Pairs { source_time, time }, _) => {
                let folder = prepare(&config.data, listener)?;
                let open = |name: &str, seed| -> Result<Arc<dyn Dataset>> {
                    let windows =
                        Windows::new(TokenFile::open(&folder.join(name))?, source_time + time, seed)?;
                    Ok(Arc::new(PairSamples { windows, source_time, time }))
                };
                Self::of_text(config, &folder, open)
            }
            (Samples::Images { height, width, channels }, kind) => {
                Self::images(config, kind, [height, width, channels])
            }
        }
    }

    /// The data of text that was prepared in `folder`; `open` opens the samples of one of its files.
    fn of_text(
        config: &Config,
        folder: &Path,
        open: impl Fn(&str, Option<u64>) -> Result<Arc<dyn Dataset>>,
    ) -> Result<Self> {
        let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
        Ok(Self {
            train: open("train.tok", Some(config.train.seed))?,
            val: open("val.tok", None)?,
            vocab: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer),
        })
    }

    fn images(config: &Config, kind: DataKind, shape: [usize; 3]) -> Result<Self> {
        let (data, seed) = (&config.data, config.train.seed);
        let folder = |name: &str| data.path.clone().unwrap_or_else(|| data.cache.join(name));
        let of = |[train, val]: [Arc<dyn Dataset>; 2], vocab| Self { train, val, vocab, tokenizer: None };
        match kind {
            DataKind::Cifar10 => {
                let [train, val] = Images::read(&folder("cifar10"))?;
                let samples =
                    |images, shift| -> Arc<dyn Dataset> { Arc::new(ImageSamples { images, shift, seed }) };
                Ok(of([samples(train, data.shift), samples(val, 0)], cifar10::CLASSES))
            }
            DataKind::Synthetic => {
                let patterns = Patterns::new(seed, data.classes, shape[0], shape[2]);
                let samples = |name, len| -> Arc<dyn Dataset> {
                    Arc::new(SyntheticSamples { patterns: patterns.clone(), name, len, shape })
                };
                let sets = [samples("train", data.samples), samples("val", data.samples.div_ceil(10))];
                Ok(of(sets, data.classes))
            }
            _ => {
                let [train, val] = Digits::read(&folder("mnist"))?;
                let samples =
                    |digits, shift| -> Arc<dyn Dataset> { Arc::new(DigitSamples { digits, shift, seed }) };
                Ok(of([samples(train, data.shift), samples(val, 0)], CLASSES))
            }
        }
    }

    /// The number of tokens or classes of the data of `config`. Opens the data only if the configuration does not
    /// determine the number.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn vocab_of(config: &Config) -> Result<usize> {
        match (config.data.kind, config.data.tokenizer) {
            (DataKind::Own, _) => Ok(Self::open(config)?.vocab),
            (DataKind::Mnist, _) => Ok(CLASSES),
            (DataKind::Cifar10, _) => Ok(cifar10::CLASSES),
            (DataKind::Synthetic, _) => Ok(config.data.classes),
            (_, TokenizerKind::Bytes) => Ok(usize::from(u8::MAX) + 1),
            _ => Ok(Self::open(config)?.vocab),
        }
    }
}
