//! Samples by index.

use super::host_batch::HostBatch;
use crate::error::Result;

/// Number of samples that the default checksum covers.
const DIGEST_SAMPLES: usize = 64;

/// Samples by index. The same index gives the same sample on every rank.
///
/// ```
/// use regatta::datasets::{Dataset, HostBatch};
///
/// /// Sample `i` counts from `i`: 0 1 2 3, 1 2 3 4, and so on.
/// struct Counting;
///
/// impl Dataset for Counting {
///     fn len(&self) -> usize {
///         100
///     }
///     fn tokens_per_sample(&self) -> usize {
///         4
///     }
///     fn batch(&self, _epoch: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
///         let tokens = |offset: i64| indices.iter().flat_map(|&i| (0..4).map(move |t| i as i64 + t + offset)).collect();
///         Ok(HostBatch::Text { inputs: tokens(0), targets: tokens(1), time: 4 })
///     }
/// }
/// assert_eq!(Counting.batch(0, &[5, 7]).unwrap().rows(), 2);
/// ```
pub trait Dataset: Send + Sync {
    /// Number of samples in an epoch.
    fn len(&self) -> usize;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of tokens in a sample; 1 if samples are not text.
    fn tokens_per_sample(&self) -> usize {
        1
    }

    /// The samples `indices` of `epoch`.
    ///
    /// # Errors
    /// The data cannot be read.
    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch>;

    /// A checksum of the content that does not depend on the seed. Ranks compare it with each other, and a resumed run
    /// with its checkpoint. By default it covers the number of samples, and up to 64 of them, spread over all.
    ///
    /// # Errors
    /// The data cannot be read.
    fn digest(&self) -> Result<u32> {
        let len = self.len();
        let mut sum = crc32fast::Hasher::new();
        sum.update(&(len as u64).to_le_bytes());
        sum.update(&(self.tokens_per_sample() as u64).to_le_bytes());
        let indices: Vec<usize> = (0..len).step_by(len.div_ceil(DIGEST_SAMPLES).max(1)).collect();
        if !indices.is_empty() {
            sum.update(&self.batch(0, &indices)?.checksum().to_le_bytes());
        }
        Ok(sum.finalize())
    }
}

impl Dataset for Box<dyn Dataset> {
    fn len(&self) -> usize {
        (**self).len()
    }

    fn tokens_per_sample(&self) -> usize {
        (**self).tokens_per_sample()
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        (**self).batch(epoch, indices)
    }

    fn digest(&self) -> Result<u32> {
        (**self).digest()
    }
}
