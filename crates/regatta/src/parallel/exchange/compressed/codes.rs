//! Codes of a few bits: each worker owns a part, decodes and sums what all have sent of it, and sends the mean to all in codes
//! again (the exchange of Tang et al. 2021, "1-bit Adam", section 4.2). Each sends 2(n-1)/n of the codes of a unit.

use super::coder::{Coder, Turn};
use crate::error::Result;
use regatta_comm::Group;
use regatta_kernel::bias::accumulate;
use regatta_kernel::compress::{blocks, sign};
use regatta_plan::{Compress, CompressKind};
use std::ops::Range;

pub(super) struct Codes<'a> {
    workers: &'a Group,
    compress: Compress,
    turn: Turn,
}

impl<'a> Codes<'a> {
    pub(super) fn new(coder: &'a Coder, turn: Turn) -> Self {
        Self { workers: &coder.workers, compress: coder.compress, turn }
    }

    /// Replaces `numbers` by their mean. `unsent` becomes what is lost of them, and its second half what the owner of a part
    /// loses of the mean.
    pub(super) fn mean(&self, numbers: &mut [f32], unsent: Option<(&mut [f32], &mut [f32])>) -> Result<()> {
        let (rank, size) = (self.workers.rank(), self.workers.size());
        let part = self.compress.part(numbers.len(), size);
        let bytes = self.compress.coded(part);
        let range = |owner: usize| -> Range<usize> {
            (owner * part).min(numbers.len())..((owner + 1) * part).min(numbers.len())
        };
        let ranges: Vec<Range<usize>> = (0..size).map(range).collect();
        let (own, factor) = (ranges[rank].clone(), 1.0 / size as f32);
        let mut sent = vec![0u8; size * bytes];
        for (owner, range) in ranges.iter().enumerate() {
            let codes = &mut sent[owner * bytes..][..self.compress.coded(range.len())];
            self.encode(&numbers[range.clone()], (rank, owner), codes);
        }
        let mut received = vec![0u8; size * bytes];
        self.workers.all_to_all(&sent, &mut received)?;
        let mut mean = vec![0.0; own.len()];
        for codes in received.chunks(bytes) {
            self.decode(&codes[..self.compress.coded(own.len())], factor, true, &mut mean);
        }
        let (unsent, mut unsent_mean) = unsent.unzip();
        if let Some(unsent) = unsent {
            // What is lost is what there was without what was sent.
            unsent.copy_from_slice(numbers);
            for (owner, range) in ranges.iter().enumerate() {
                let codes = &sent[owner * bytes..][..self.compress.coded(range.len())];
                self.decode(codes, -1.0, true, &mut unsent[range.clone()]);
            }
        }
        if let Some(unsent_mean) = &unsent_mean {
            accumulate(&mut mean, &unsent_mean[own.clone()]);
        }
        let mut codes = vec![0u8; bytes];
        let coded = self.compress.coded(own.len());
        self.encode(&mean, (size, rank), &mut codes[..coded]);
        if let Some(unsent_mean) = &mut unsent_mean {
            self.decode(&codes[..coded], -1.0, true, &mut mean);
            unsent_mean.fill(0.0);
            unsent_mean[own].copy_from_slice(&mean);
        }
        self.workers.all_gather(&codes, &mut received)?;
        for (codes, range) in received.chunks(bytes).zip(ranges) {
            self.decode(&codes[..self.compress.coded(range.len())], 1.0, false, &mut numbers[range]);
        }
        Ok(())
    }

    /// Encodes what worker `by` (or, as worker `size`, an owner) sends of the part of `owner`.
    fn encode(&self, numbers: &[f32], (by, owner): (usize, usize), codes: &mut [u8]) {
        match self.width() {
            Some(width) => {
                let seed = self.turn.random().at(by as u64).bits(owner as u64);
                blocks::encode(width, numbers, seed, codes);
            }
            None => sign::encode(numbers, codes),
        }
    }

    fn decode(&self, codes: &[u8], factor: f32, add: bool, into: &mut [f32]) {
        match self.width() {
            Some(width) => blocks::decode(width, codes, factor, add, into),
            None => sign::decode(codes, factor, add, into),
        }
    }

    /// None for signs.
    fn width(&self) -> Option<blocks::Width> {
        match self.compress.kind {
            CompressKind::Int8 => Some(blocks::Width::Eight),
            CompressKind::Int4 => Some(blocks::Width::Four),
            _ => None,
        }
    }
}
