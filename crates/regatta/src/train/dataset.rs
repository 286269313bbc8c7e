//! From a configuration to batches: prepares the data once, keeps it, and hands out samples.

use super::config::{Config, DataKind, ModelConfig, TokenizerKind};
use super::pictures::{DigitSamples, PictureSamples, SyntheticSamples};
use super::prepare::prepare;
use crate::checkpoint::Checkpoint;
use crate::data::cifar10::{self, Pictures};
use crate::data::mnist::Digits;
use crate::data::notice::Listener;
use crate::data::synthetic::Patterns;
use crate::data::tokenizer::Tokenizer;
use crate::data::tokens::{TokenFile, Windows};
use crate::error::Result;
use crate::models::Batch;
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::sync::Arc;

/// Digits.
const CLASSES: usize = 10;

/// Samples by index.
pub trait Dataset: Send + Sync {
    /// Samples in an epoch.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens in a sample; 1 where samples are not text.
    fn tokens_per_sample(&self) -> usize;

    /// The samples `indices` of `epoch`.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch>;

    /// A checksum of the content, whatever the seed.
    fn digest(&self) -> u32;
}

/// A batch in ordinary memory.
#[derive(Debug, Clone, PartialEq)]
pub enum HostBatch {
    /// Token ids and the ids that follow them, `[rows, time]` each.
    Text {
        /// What the model sees.
        inputs: Vec<i64>,
        /// What it is to say.
        targets: Vec<i64>,
        /// Tokens of a row.
        time: usize,
    },
    /// Sequences, `[rows, source time]`, and those that answer them, `[rows, time]`.
    Pairs {
        /// What is to be answered.
        sources: Vec<i64>,
        /// What the model sees of the answer.
        inputs: Vec<i64>,
        /// What it is to say.
        targets: Vec<i64>,
        /// Tokens of a source.
        source_time: usize,
        /// Tokens of an answer.
        time: usize,
    },
    /// Pictures, `[rows, height, width, channels]`, and their labels, `[rows]`.
    Images {
        /// Normalised pixels.
        pixels: Vec<f32>,
        /// Classes.
        labels: Vec<i64>,
        /// Height, width and channels.
        shape: [usize; 3],
    },
}

impl HostBatch {
    /// Tokens in the batch; for pictures, samples.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text { inputs, .. } | Self::Pairs { inputs, .. } => inputs.len(),
            Self::Images { labels, .. } => labels.len(),
        }
    }

    /// Cuts the batch into `parts` batches of equally many rows: text in its order, and of pictures every `parts`-th.
    pub fn split(self, parts: usize) -> Vec<Self> {
        if parts <= 1 {
            return vec![self];
        }
        match self {
            Self::Text { inputs, targets, time } => {
                let each = inputs.len() / time / parts * time;
                let pairs = inputs.chunks_exact(each).zip(targets.chunks_exact(each));
                pairs.map(|(a, b)| Self::Text { inputs: a.to_vec(), targets: b.to_vec(), time }).collect()
            }
            Self::Pairs { sources, inputs, targets, source_time, time } => {
                let rows = inputs.len() / time / parts;
                let part = |index: usize| Self::Pairs {
                    sources: sources[index * rows * source_time..][..rows * source_time].to_vec(),
                    inputs: inputs[index * rows * time..][..rows * time].to_vec(),
                    targets: targets[index * rows * time..][..rows * time].to_vec(),
                    source_time,
                    time,
                };
                (0..parts).map(part).collect()
            }
            Self::Images { pixels, labels, shape } => {
                // Every parts-th row: worker w of W takes every W-th row of the global batch from w on, so the micro-batches
                // of all workers are the same sets of rows whatever part of their number are workers.
                let (each, numbers) = (labels.len() / parts, shape.iter().product::<usize>());
                let part = |part: usize| {
                    let rows = (0..each).map(|row| part + row * parts);
                    let picture = |row: usize| &pixels[row * numbers..][..numbers];
                    let pixels = rows.clone().flat_map(|row| picture(row).iter().copied()).collect();
                    Self::Images { pixels, labels: rows.map(|row| labels[row]).collect(), shape }
                };
                (0..parts).map(part).collect()
            }
        }
    }

    /// Moves the batch to `device`.
    pub fn into_batch(self, device: &Device) -> Batch {
        match self {
            Self::Text { inputs, targets, time } => {
                let rows = inputs.len() / time;
                let tensor = |ids| Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, time]), device);
                Batch::Text { inputs: tensor(inputs), targets: tensor(targets) }
            }
            Self::Pairs { sources, inputs, targets, source_time, time } => {
                let rows = inputs.len() / time;
                let tensor =
                    |ids, time| Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, time]), device);
                Batch::Pairs {
                    sources: tensor(sources, source_time),
                    inputs: tensor(inputs, time),
                    targets: tensor(targets, time),
                }
            }
            Self::Images { pixels, labels, shape: [height, width, channels] } => {
                let rows = labels.len();
                let shape = [rows, height, width, channels];
                Batch::Images {
                    pixels: Tensor::from_data(TensorData::new(pixels, shape), device),
                    labels: Tensor::from_data(TensorData::new(labels, [rows]), device),
                }
            }
        }
    }
}

/// The data of a run.
#[derive(Clone)]
pub struct Datasets {
    /// To learn from.
    pub train: Arc<dyn Dataset>,
    /// Held out.
    pub val: Arc<dyn Dataset>,
    /// Tokens of the vocabulary, or classes.
    pub vocab: usize,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
}

impl Datasets {
    /// Opens the data of `config`, preparing it first where that has not been done for the same settings. Of
    /// several processes that come at once, one prepares and the others wait for it.
    ///
    /// # Errors
    /// Data that is missing, unreadable or too small for the model.
    pub fn open(config: &Config) -> Result<Self> {
        Self::open_with(config, &mut |_| {})
    }

    /// As [`open`](Self::open); `listener` hears what the user should know, and how far the preparation is.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(config: &Config, listener: &mut Listener<'_>) -> Result<Self> {
        match (&config.model, config.data.kind) {
            (ModelConfig::Gpt(gpt), DataKind::Text | DataKind::Rust) => {
                let folder = prepare(&config.data, listener)?;
                let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
                let open =
                    |name: &str, seed| Windows::new(TokenFile::open(&folder.join(name))?, gpt.block, seed);
                Ok(Self {
                    train: Arc::new(TextSamples(open("train.tok", Some(config.train.seed))?, gpt.block)),
                    val: Arc::new(TextSamples(open("val.tok", None)?, gpt.block)),
                    vocab: tokenizer.vocab_size(),
                    tokenizer: Some(tokenizer),
                })
            }
            (ModelConfig::EncoderDecoder(model), DataKind::Text | DataKind::Rust) => {
                let folder = prepare(&config.data, listener)?;
                let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
                let open = |name: &str, seed| -> Result<_> {
                    let windows = Windows::new(TokenFile::open(&folder.join(name))?, 2 * model.block, seed)?;
                    Ok(Arc::new(PairSamples(windows, model.block)))
                };
                Ok(Self {
                    train: open("train.tok", Some(config.train.seed))?,
                    val: open("val.tok", None)?,
                    vocab: tokenizer.vocab_size(),
                    tokenizer: Some(tokenizer),
                })
            }
            (model, kind) => Self::pictures(config, model, kind),
        }
    }

    /// The same data for a model that goes on from `checkpoint`: its vocabulary may have rows beyond the tokenizer's.
    pub(super) fn for_model_of(self, checkpoint: &Checkpoint) -> Self {
        let trained = checkpoint.state().vocab;
        let padded = self.tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.fits(trained).is_ok());
        let vocab = if padded { trained } else { self.vocab };
        Self { vocab, ..self }
    }

    fn pictures(config: &Config, model: &ModelConfig, kind: DataKind) -> Result<Self> {
        let (data, seed) = (&config.data, config.train.seed);
        let folder = |name: &str| data.path.clone().unwrap_or_else(|| data.cache.join(name));
        let of = |[train, val]: [Arc<dyn Dataset>; 2], vocab| Self { train, val, vocab, tokenizer: None };
        match kind {
            DataKind::Cifar10 => {
                let [train, val] = Pictures::read(&folder("cifar10"))?;
                let samples = |pictures, shift| -> Arc<dyn Dataset> {
                    Arc::new(PictureSamples { pictures, shift, seed })
                };
                Ok(of([samples(train, data.shift), samples(val, 0)], cifar10::CLASSES))
            }
            DataKind::Synthetic => {
                let shape = model.picture().unwrap_or([1, 1, 1]);
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

    /// The tokens of the vocabulary, or the classes, that the data of `config` has; opens it only where that is not known
    /// without.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn vocab_of(config: &Config) -> Result<usize> {
        match (config.data.kind, config.data.tokenizer) {
            (DataKind::Mnist, _) => Ok(CLASSES),
            (DataKind::Cifar10, _) => Ok(cifar10::CLASSES),
            (DataKind::Synthetic, _) => Ok(config.data.classes),
            (_, TokenizerKind::Bytes) => Ok(usize::from(u8::MAX) + 1),
            _ => Ok(Self::open(config)?.vocab),
        }
    }

    /// What the data and the tokenizer hold, as one short word: the same for the same content, wherever it lies.
    ///
    /// # Errors
    /// A tokenizer that cannot be written as JSON.
    pub fn digest(&self) -> Result<String> {
        let tokenizer = self.tokenizer.as_ref().map(Tokenizer::to_json).transpose()?.unwrap_or_default();
        let tokenizer = crc32fast::hash(tokenizer.as_bytes());
        Ok(format!("{:08x}-{:08x}-{tokenizer:08x}", self.train.digest(), self.val.digest()))
    }

    /// A few words on the data.
    pub fn describe(&self) -> String {
        let (train, val) = (self.train.len(), self.val.len());
        match &self.tokenizer {
            Some(tokenizer) => format!(
                "{:.2} M tokens to learn from, {:.2} M held out, {} tokens of {}",
                (train * self.train.tokens_per_sample()) as f64 / 1e6,
                (val * self.val.tokens_per_sample()) as f64 / 1e6,
                self.vocab,
                tokenizer.kind()
            ),
            None => format!("{train} samples to learn from, {val} held out"),
        }
    }
}

struct TextSamples(Windows, usize);

impl Dataset for TextSamples {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn tokens_per_sample(&self) -> usize {
        self.1
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let (mut inputs, mut targets) = (vec![], vec![]);
        for &index in indices {
            self.0.fill(epoch, index, &mut inputs, &mut targets);
        }
        self.0.check(&inputs)?;
        self.0.check(&targets)?;
        Ok(HostBatch::Text { inputs, targets, time: self.1 })
    }

    fn digest(&self) -> u32 {
        self.0.tokens().digest()
    }
}

/// A stretch of text as the source, and the text behind it as its answer.
struct PairSamples(Windows, usize);

impl Dataset for PairSamples {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn tokens_per_sample(&self) -> usize {
        self.1
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let time = self.1;
        let (mut sources, mut inputs, mut targets) = (vec![], vec![], vec![]);
        let (mut seen, mut next) = (vec![], vec![]);
        for &index in indices {
            seen.clear();
            next.clear();
            self.0.fill(epoch, index, &mut seen, &mut next);
            sources.extend_from_slice(&seen[..time]);
            // The decoder begins with the source's last token, so that it says the answer's first.
            inputs.extend_from_slice(&seen[time - 1..2 * time - 1]);
            targets.extend_from_slice(&next[time - 1..2 * time - 1]);
        }
        [&sources, &inputs, &targets].into_iter().try_for_each(|tokens| self.0.check(tokens))?;
        Ok(HostBatch::Pairs { sources, inputs, targets, source_time: time, time })
    }

    fn digest(&self) -> u32 {
        self.0.tokens().digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_of_pictures_are_the_same_for_any_number_of_workers() {
        let batch = |rows: &[i64]| HostBatch::Images {
            pixels: rows.iter().flat_map(|row| [*row as f32, -*row as f32]).collect(),
            labels: rows.to_vec(),
            shape: [1, 2, 1],
        };
        let all: Vec<i64> = (0..12).collect();
        let one = batch(&all).split(4);
        let HostBatch::Images { pixels, labels, shape } = &one[1] else { panic!("{one:?}") };
        assert_eq!((&labels[..], *shape), (&[1, 5, 9][..], [1, 2, 1]));
        assert_eq!(pixels, &[1.0, -1.0, 5.0, -5.0, 9.0, -9.0]);
        let worker =
            |w: i64| batch(&all.iter().copied().filter(|row| row % 2 == w).collect::<Vec<_>>()).split(2);
        let two = [worker(0), worker(1)].concat();
        for micro in &one {
            assert!(two.contains(micro), "{micro:?}");
        }
    }
}
