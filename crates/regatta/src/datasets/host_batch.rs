//! A batch in host memory.

use crate::layers::SampleRows;
use crate::models::{Batch, IGNORED};
use burn::tensor::{Device, Int, Tensor, TensorData};

/// A batch in host memory. A target or label of [`IGNORED`] does not count in the loss.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum HostBatch {
    /// Token ids and the ids that follow them, `[rows, time]` each.
    Text {
        /// The model's input.
        inputs: Vec<i64>,
        /// The tokens that the model should predict.
        targets: Vec<i64>,
        /// Number of tokens in a row.
        time: usize,
    },
    /// Source sequences, `[rows, source_time]`, and target sequences, `[rows, time]`.
    Pairs {
        /// The encoder's input.
        sources: Vec<i64>,
        /// The decoder's input.
        inputs: Vec<i64>,
        /// The tokens that the decoder should predict.
        targets: Vec<i64>,
        /// Number of tokens in a source.
        source_time: usize,
        /// Number of tokens in a target sequence.
        time: usize,
    },
    /// Images, `[rows, height, width, channels]`, and their labels, `[rows]`.
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
    /// Number of tokens that the model predicts; for images, number of samples.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text { inputs, .. } | Self::Pairs { inputs, .. } => inputs.len(),
            Self::Images { labels, .. } => labels.len(),
        }
    }

    /// A checksum of all values.
    pub fn checksum(&self) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        match self {
            Self::Text { inputs, targets, .. } => {
                [inputs, targets].into_iter().for_each(|ids| sum.update(bytemuck::cast_slice(ids)));
            }
            Self::Pairs { sources, inputs, targets, .. } => {
                [sources, inputs, targets].into_iter().for_each(|ids| sum.update(bytemuck::cast_slice(ids)));
            }
            Self::Images { pixels, labels, .. } => {
                sum.update(bytemuck::cast_slice(pixels));
                sum.update(bytemuck::cast_slice(labels));
            }
        }
        sum.finalize()
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        match self {
            Self::Text { inputs, time, .. } | Self::Pairs { inputs, time, .. } => inputs.len() / time,
            Self::Images { labels, .. } => labels.len(),
        }
    }

    /// Number of targets: tokens to predict, or labels.
    pub fn targets(&self) -> usize {
        self.target_ids().len()
    }

    /// Number of targets that count in the loss: those that are not [`IGNORED`].
    pub fn counted(&self) -> usize {
        self.target_ids().iter().filter(|target| **target != IGNORED).count()
    }

    fn target_ids(&self) -> &[i64] {
        let (Self::Text { targets, .. } | Self::Pairs { targets, .. } | Self::Images { labels: targets, .. }) =
            self;
        targets
    }

    /// Splits the batch into `parts` micro-batches of equally many rows, and returns with each which rows it has: for
    /// text, consecutive rows; for images, every `parts`-th row.
    pub fn split(self, parts: usize) -> Vec<(Self, SampleRows)> {
        if parts <= 1 {
            return vec![(self, SampleRows::ALL)];
        }
        let each = self.rows() / parts;
        let in_order = |part: usize| SampleRows { first: part * each, stride: 1 };
        let interleaved = |part: usize| SampleRows { first: part, stride: parts };
        let images = matches!(self, Self::Images { .. });
        let rows = |part: usize| if images { interleaved(part) } else { in_order(part) };
        self.cut(parts).into_iter().enumerate().map(|(part, batch)| (batch, rows(part))).collect()
    }

    fn cut(self, parts: usize) -> Vec<Self> {
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
                // Every parts-th row. Worker w of W takes every W-th row of the global batch from w on, so the
                // micro-batches of all workers together depend only on their number, W x parts.
                let (each, values) = (labels.len() / parts, shape.iter().product::<usize>());
                let part = |part: usize| {
                    let rows = (0..each).map(|row| part + row * parts);
                    let image = |row: usize| &pixels[row * values..][..values];
                    let pixels = rows.clone().flat_map(|row| image(row).iter().copied()).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_of_images_are_the_same_for_any_number_of_workers() {
        let batch = |rows: &[i64]| HostBatch::Images {
            pixels: rows.iter().flat_map(|row| [*row as f32, -*row as f32]).collect(),
            labels: rows.to_vec(),
            shape: [1, 2, 1],
        };
        let all: Vec<i64> = (0..12).collect();
        let one = batch(&all).split(4);
        let HostBatch::Images { pixels, labels, shape } = &one[1].0 else { panic!("{one:?}") };
        assert_eq!((&labels[..], *shape), (&[1, 5, 9][..], [1, 2, 1]));
        assert_eq!(pixels, &[1.0, -1.0, 5.0, -5.0, 9.0, -9.0]);
        assert_eq!(one[1].1, SampleRows { first: 1, stride: 4 });
        // The rows of each worker's micro-batches, numbered in the global batch.
        let workers = 2;
        let worker = |w: usize| {
            let rows: Vec<i64> = all.iter().copied().filter(|row| *row as usize % workers == w).collect();
            let dealt = SampleRows { first: w, stride: workers };
            batch(&rows).split(2).into_iter().map(move |(part, rows)| (part, dealt.of(rows)))
        };
        let two: Vec<_> = worker(0).chain(worker(1)).collect();
        for (micro_batch, rows) in &two {
            assert!(one.iter().any(|(other, _)| other == micro_batch), "{micro_batch:?}");
            let HostBatch::Images { labels, .. } = micro_batch else { panic!("{micro_batch:?}") };
            assert!(
                (0..labels.len()).all(|row| rows.sample(row) as i64 == labels[row]),
                "{micro_batch:?} {rows:?}"
            );
        }
    }

    #[test]
    fn rows_of_text_keep_their_order_and_ignored_targets_do_not_count() {
        let targets = vec![1, IGNORED, 2, 3, IGNORED, IGNORED, 4, 5];
        let batch = HostBatch::Text { inputs: vec![0; 8], targets, time: 2 };
        assert_eq!((batch.rows(), batch.counted()), (4, 5));
        let parts = batch.split(2);
        let found: Vec<_> = parts.iter().map(|(part, rows)| (part.counted(), *rows)).collect();
        assert_eq!(found, [(3, SampleRows { first: 0, stride: 1 }), (2, SampleRows { first: 2, stride: 1 })]);
    }
}
