//! Samples that are pictures.

use super::dataset::{Dataset, HostBatch};
use crate::data::mnist::{self, Digits};
use crate::data::synthetic::Patterns;
use crate::data::{cifar10, cifar10::Pictures};
use crate::error::Result;
use crate::random::Stream;

/// Pictures that a digest looks at, spread over all.
const LOOKED_AT: usize = 1024;

/// A checksum of pictures, from a function that gives the pixels of one and returns its label.
fn digest(len: usize, mut picture: impl FnMut(usize, &mut Vec<f32>) -> u64) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&(len as u64).to_le_bytes());
    let mut pixels = vec![];
    for index in (0..len).step_by(len.div_ceil(LOOKED_AT).max(1)) {
        pixels.clear();
        let label = picture(index, &mut pixels);
        sum.update(bytemuck::cast_slice(&pixels));
        sum.update(&label.to_le_bytes());
    }
    sum.finalize()
}

/// Handwritten digits.
pub(super) struct DigitSamples {
    pub(super) digits: Digits,
    pub(super) shift: usize,
    pub(super) seed: u64,
}

impl Dataset for DigitSamples {
    fn len(&self) -> usize {
        self.digits.len()
    }

    fn tokens_per_sample(&self) -> usize {
        1
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let noise = Stream::new(self.seed).named("shift").at(epoch);
        let (mut pixels, mut labels) = (Vec::with_capacity(indices.len() * mnist::PIXELS), vec![]);
        for &index in indices {
            self.digits.fill(index, self.shift, noise.at(index as u64), &mut pixels);
            labels.push(i64::from(self.digits.labels[index]));
        }
        Ok(HostBatch::Images { pixels, labels, shape: [mnist::SIDE, mnist::SIDE, 1] })
    }

    fn digest(&self) -> u32 {
        let noise = Stream::new(0);
        digest(self.len(), |index, pixels| {
            self.digits.fill(index, 0, noise, pixels);
            self.digits.labels[index].into()
        })
    }
}

/// CIFAR-10.
pub(super) struct PictureSamples {
    pub(super) pictures: Pictures,
    pub(super) shift: usize,
    pub(super) seed: u64,
}

impl Dataset for PictureSamples {
    fn len(&self) -> usize {
        self.pictures.len()
    }

    fn tokens_per_sample(&self) -> usize {
        1
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let noise = Stream::new(self.seed).named("shift").at(epoch);
        let shape = [cifar10::SIDE, cifar10::SIDE, cifar10::CHANNELS];
        let len = indices.len() * shape.iter().product::<usize>();
        let (mut pixels, mut labels) = (Vec::with_capacity(len), vec![]);
        for &index in indices {
            self.pictures.fill(index, self.shift, noise.at(index as u64), &mut pixels);
            labels.push(i64::from(self.pictures.label(index)));
        }
        Ok(HostBatch::Images { pixels, labels, shape })
    }

    fn digest(&self) -> u32 {
        let noise = Stream::new(0);
        digest(self.len(), |index, pixels| {
            self.pictures.fill(index, 0, noise, pixels);
            self.pictures.label(index).into()
        })
    }
}

/// Made-up pictures.
pub(super) struct SyntheticSamples {
    pub(super) patterns: Patterns,
    /// Which set.
    pub(super) name: &'static str,
    pub(super) len: usize,
    pub(super) shape: [usize; 3],
}

impl Dataset for SyntheticSamples {
    fn len(&self) -> usize {
        self.len
    }

    fn tokens_per_sample(&self) -> usize {
        1
    }

    fn batch(&self, _: u64, indices: &[usize]) -> Result<HostBatch> {
        let len = indices.len() * self.shape.iter().product::<usize>();
        let (mut pixels, mut labels) = (Vec::with_capacity(len), vec![]);
        for &index in indices {
            self.patterns.fill(self.name, index, &mut pixels);
            labels.push(self.patterns.label(self.name, index) as i64);
        }
        Ok(HostBatch::Images { pixels, labels, shape: self.shape })
    }

    fn digest(&self) -> u32 {
        // The seed makes the pictures themselves.
        crc32fast::hash(format!("{} {} {:?}", self.name, self.len, self.shape).as_bytes())
    }
}
