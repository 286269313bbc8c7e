//! Decides which samples each rank sees, and when (like PyTorch's `DistributedSampler`).
//!
//! Every epoch shuffles all samples with another seed. Rank r of n takes the places r, r+n, r+2n, ... of that order,
//! so the k-th global batch of B samples is the same for every number of ranks.

use crate::error::{Error, Result};
use crate::random::Stream;
use serde::{Deserialize, Serialize};

/// How to handle samples that do not fill an epoch's last global batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LastBatch {
    /// They are dropped from this epoch.
    Drop,
    /// The batch is padded with samples from the epoch's beginning.
    Pad,
}

/// A position in the endless sequence of global batches. It is the same on all ranks and for any number of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Number of global batches of the epoch that are done.
    pub batch: usize,
}

/// One rank's share of a global batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The epoch it belongs to.
    pub epoch: u64,
    /// Indices of samples.
    pub indices: Vec<usize>,
}

/// The sequence of batches of one rank.
#[derive(Debug, Clone)]
pub struct Sampler {
    len: usize,
    world: usize,
    rank: usize,
    seed: u64,
    shuffle: bool,
    last: LastBatch,
    rows: usize,
    position: Position,
    order: Option<(u64, Vec<u32>)>,
}

impl Sampler {
    /// Batches of `rows` samples per rank, out of `len` samples.
    ///
    /// # Errors
    /// There are fewer samples than one global batch (`Drop`), none (`Pad`), or 2^32 or more; `rows` is 0; or `rank`
    /// is not below `world`.
    pub fn new(
        len: usize,
        world: usize,
        rank: usize,
        seed: u64,
        shuffle: bool,
        last: LastBatch,
        rows: usize,
    ) -> Result<Self> {
        if rows == 0 || rank >= world {
            return Err(Error::Usage(format!(
                "rank {rank} of {world} cannot take batches of {rows} samples: ranks count from 0, and a batch has \
                 one sample or more"
            )));
        }
        let needed = if last == LastBatch::Drop { rows * world } else { 1 };
        if len < needed || u32::try_from(len).is_err() {
            return Err(Error::Usage(format!(
                "there are {len} training samples, but one batch needs {needed}: lower train.batch, give more data, \
                 or set train.last_batch = \"pad\""
            )));
        }
        Ok(Self { len, world, rank, seed, shuffle, last, rows, position: Position::default(), order: None })
    }

    /// Global batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        let batch = self.rows * self.world;
        match self.last {
            LastBatch::Drop => self.len / batch,
            LastBatch::Pad => self.len.div_ceil(batch),
        }
    }

    /// The position of the next batch.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues at `position`, for example one from a checkpoint.
    pub fn seek(&mut self, position: Position) {
        self.position = position;
    }

    /// The next batch; epochs follow one another without end.
    pub fn next_batch(&mut self) -> Batch {
        let batches = self.batches_per_epoch();
        if self.position.batch >= batches {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
        }
        let Position { epoch, batch } = self.position;
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, self.shuffled(epoch)));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let first = batch * self.rows * self.world + self.rank;
        let places = (0..self.rows).map(|row| (first + row * self.world) % self.len);
        let indices = places.map(|place| order[place] as usize).collect();
        self.position.batch += 1;
        Batch { epoch, indices }
    }

    fn shuffled(&self, epoch: u64) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.len as u32).collect();
        if self.shuffle {
            let stream = Stream::new(self.seed).named("sampler").at(epoch);
            // The shuffle by Fisher and Yates, in Durstenfeld's form.
            for i in (1..order.len()).rev() {
                let j = (u128::from(stream.bits(i as u64)) * (i as u128 + 1)) >> 64;
                order.swap(i, j as usize);
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two epochs of 12 samples with seed 3.
    const GOLDEN: [[usize; 12]; 2] =
        [[6, 8, 10, 9, 3, 4, 5, 0, 2, 7, 1, 11], [7, 2, 9, 11, 8, 1, 6, 10, 3, 4, 5, 0]];

    fn sampler(len: usize, world: usize, rank: usize, rows: usize, last: LastBatch) -> Sampler {
        Sampler::new(len, world, rank, 3, true, last, rows).unwrap()
    }

    proptest! {
        #[test]
        fn global_batches_do_not_depend_on_the_number_of_ranks(len in 24usize..200, pad in any::<bool>()) {
            let last = if pad { LastBatch::Pad } else { LastBatch::Drop };
            let global = |world: usize, batches: usize| -> Vec<Vec<usize>> {
                let mut ranks: Vec<_> = (0..world).map(|rank| sampler(len, world, rank, 12 / world, last)).collect();
                (0..batches).map(|_| {
                    let parts: Vec<Batch> = ranks.iter_mut().map(Sampler::next_batch).collect();
                    (0..12).map(|i| parts[i % world].indices[i / world]).collect()
                }).collect()
            };
            let one = global(1, 40);
            for world in [2, 3, 4, 6, 12] {
                prop_assert_eq!(&global(world, 40), &one);
            }
        }

        #[test]
        fn an_epoch_sees_every_sample_once(len in 1usize..300, rows in 1usize..9) {
            let mut all = sampler(len, 1, 0, rows, LastBatch::Pad);
            let mut seen: Vec<usize> = (0..all.batches_per_epoch()).flat_map(|_| all.next_batch().indices).collect();
            prop_assert_eq!(all.next_batch().epoch, 1);
            seen.truncate(len);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn a_sampler_continues_at_a_position(len in 10usize..100, before in 0usize..50) {
            let mut whole = sampler(len, 2, 1, 3, LastBatch::Drop);
            for _ in 0..before { whole.next_batch(); }
            let mut resumed = sampler(len, 2, 1, 3, LastBatch::Drop);
            resumed.seek(whole.position());
            for _ in 0..30 { prop_assert_eq!(whole.next_batch(), resumed.next_batch()); }
        }
    }

    #[test]
    fn epochs_differ_and_too_little_data_is_refused() {
        let mut sampler = sampler(100, 1, 0, 100, LastBatch::Drop);
        assert_ne!(sampler.next_batch().indices, sampler.next_batch().indices);
        let error = Sampler::new(5, 2, 0, 0, true, LastBatch::Drop, 3).unwrap_err();
        assert!(error.to_string().contains("5 training samples, but one batch needs 6"), "{error}");
        for (world, rank, rows) in [(2, 2, 1), (0, 0, 1), (1, 0, 0)] {
            for last in [LastBatch::Drop, LastBatch::Pad] {
                assert!(Sampler::new(50, world, rank, 0, true, last, rows).is_err());
            }
        }
        assert!(Sampler::new(0, 1, 0, 0, true, LastBatch::Pad, 1).is_err());
    }

    #[test]
    fn the_last_batch_is_dropped_or_padded_from_the_epochs_beginning() {
        // 10 samples in order on 2 ranks, 2 per batch and rank: two global batches, and two samples are left.
        let epoch = |rank, last| -> Vec<Vec<usize>> {
            let mut sampler = Sampler::new(10, 2, rank, 0, false, last, 2).unwrap();
            (0..sampler.batches_per_epoch()).map(|_| sampler.next_batch().indices).collect()
        };
        assert_eq!(epoch(0, LastBatch::Drop), [[0, 2], [4, 6]]);
        assert_eq!(epoch(1, LastBatch::Drop), [[1, 3], [5, 7]]);
        assert_eq!(epoch(0, LastBatch::Pad), [[0, 2], [4, 6], [8, 0]]);
        assert_eq!(epoch(1, LastBatch::Pad), [[1, 3], [5, 7], [9, 1]]);
        // Fewer samples than a batch are repeated.
        let mut few = Sampler::new(3, 1, 0, 0, false, LastBatch::Pad, 8).unwrap();
        assert_eq!(few.next_batch().indices, [0, 1, 2, 0, 1, 2, 0, 1]);
    }

    #[test]
    fn the_order_is_the_one_that_checkpoints_were_written_with() {
        let mut sampler = sampler(12, 1, 0, 12, LastBatch::Drop);
        assert_eq!([sampler.next_batch().indices, sampler.next_batch().indices], GOLDEN);
    }
}
