//! Text samples.

use super::dataset::Dataset;
use super::host_batch::HostBatch;
use crate::data::tokens::Windows;
use crate::error::Result;

/// Windows of text, and for each token the next one. The second field is the number of tokens in a window.
pub(super) struct TextSamples(pub(super) Windows, pub(super) usize);

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

    fn digest(&self) -> Result<u32> {
        Ok(self.0.tokens().digest())
    }
}

/// Windows of text that are cut in two: the first part is the source, the second the target sequence.
pub(super) struct PairSamples {
    pub(super) windows: Windows,
    pub(super) source_time: usize,
    pub(super) time: usize,
}

impl Dataset for PairSamples {
    fn len(&self) -> usize {
        self.windows.len()
    }

    fn tokens_per_sample(&self) -> usize {
        self.time
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let &Self { source_time, time, .. } = self;
        let (mut sources, mut inputs, mut targets) = (vec![], vec![], vec![]);
        let (mut seen, mut next) = (vec![], vec![]);
        for &index in indices {
            seen.clear();
            next.clear();
            self.windows.fill(epoch, index, &mut seen, &mut next);
            sources.extend_from_slice(&seen[..source_time]);
            // The decoder's first input is the source's last token, from which it predicts the target's first.
            inputs.extend_from_slice(&seen[source_time - 1..source_time + time - 1]);
            targets.extend_from_slice(&next[source_time - 1..source_time + time - 1]);
        }
        [&sources, &inputs, &targets].into_iter().try_for_each(|tokens| self.windows.check(tokens))?;
        Ok(HostBatch::Pairs { sources, inputs, targets, source_time, time })
    }

    fn digest(&self) -> Result<u32> {
        Ok(self.windows.tokens().digest())
    }
}
