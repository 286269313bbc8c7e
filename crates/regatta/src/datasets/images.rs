//! Image samples.

use super::dataset::Dataset;
use super::host_batch::HostBatch;
use crate::data::mnist::{self, Digits};
use crate::data::synthetic::Patterns;
use crate::data::{cifar10, cifar10::Images};
use crate::error::Result;
use crate::random::Stream;

/// Number of images that a digest covers, spread over all.
const DIGEST_IMAGES: usize = 1024;

/// A checksum of `len` images. `image` appends the pixels of one of them and returns its label.
fn digest(len: usize, mut image: impl FnMut(usize, &mut Vec<f32>) -> u64) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&(len as u64).to_le_bytes());
    let mut pixels = vec![];
    for index in (0..len).step_by(len.div_ceil(DIGEST_IMAGES).max(1)) {
        pixels.clear();
        let label = image(index, &mut pixels);
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

    fn digest(&self) -> Result<u32> {
        let noise = Stream::new(0);
        Ok(digest(self.len(), |index, pixels| {
            self.digits.fill(index, 0, noise, pixels);
            self.digits.labels[index].into()
        }))
    }
}

/// CIFAR-10 images.
pub(super) struct ImageSamples {
    pub(super) images: Images,
    pub(super) shift: usize,
    pub(super) seed: u64,
}

impl Dataset for ImageSamples {
    fn len(&self) -> usize {
        self.images.len()
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
            self.images.fill(index, self.shift, noise.at(index as u64), &mut pixels);
            labels.push(i64::from(self.images.label(index)));
        }
        Ok(HostBatch::Images { pixels, labels, shape })
    }

    fn digest(&self) -> Result<u32> {
        let noise = Stream::new(0);
        Ok(digest(self.len(), |index, pixels| {
            self.images.fill(index, 0, noise, pixels);
            self.images.label(index).into()
        }))
    }
}

/// Generated images.
pub(super) struct SyntheticSamples {
    pub(super) patterns: Patterns,
    /// Name of the set, `train` or `val`, on which the images depend.
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

    fn digest(&self) -> Result<u32> {
        // The images depend on the seed, but the digest must not.
        Ok(crc32fast::hash(format!("{} {} {:?}", self.name, self.len, self.shape).as_bytes()))
    }
}
