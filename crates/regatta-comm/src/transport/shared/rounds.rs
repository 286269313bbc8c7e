//! Rounds: what ranks stage, and how they wait for one another.

use super::{Counter, LARGE, LITTLE, PRIVATE, SLOT, Shared, Stage};
use crate::error::Result;
use crate::member::call::Call;
use crate::member::health::SLICE;
use crate::member::wait::Wait;
use crate::transport::lateness::DEEP_OPERATIONS;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Instant;

impl Shared {
    /// Bytes of the slots of `round`.
    pub(crate) fn slot_bytes(&self, round: u32) -> usize {
        self.slot_bytes[(round % 2) as usize]
    }

    /// An operation begins: its peers may come to it at any time.
    pub(crate) fn enter(&mut self) {
        self.inside = false;
        self.has_waited.set(false);
        self.lanes.iter_mut().for_each(Self::enter);
    }

    /// Whether a peer was not there at once in this operation.
    pub(crate) fn has_waited(&self) -> bool {
        self.has_waited.get()
    }

    /// As if this rank had waited long for a peer.
    #[cfg(test)]
    pub(crate) fn pretend_late(&mut self) {
        self.lateness.pretend();
    }

    /// No peer is ever late.
    #[cfg(test)]
    pub(crate) fn never_late(&mut self) {
        self.lateness.never();
    }

    /// Rounds so far.
    #[cfg(test)]
    pub(crate) fn rounds(&self) -> u32 {
        self.round
    }

    /// Decides about the slots of the rounds to come, by what all ranks have said in `round`, of an operation with
    /// `left` bytes more to stage. For rounds in which every rank has waited for every other to stage, and has not
    /// been done yet: so all decide alike.
    pub(crate) fn agree(&mut self, round: u32, left: usize) {
        if !std::mem::replace(&mut self.inside, true) {
            self.deep = self.deep.saturating_sub(1);
            self.lateness.forgive(left);
        }
        let said = |rank: usize| self.stage_of(rank, round).said.load(Ordering::Relaxed);
        let (mut late, mut least) = (false, LARGE);
        for rank in 0..self.size {
            late |= said(rank) & 1 == 1;
            least = least.min((said(rank) / 2) as usize);
        }
        if said(self.rank) & 1 == 1 {
            self.lateness.clear();
        }
        if late {
            self.deep = DEEP_OPERATIONS;
        }
        let wanted = left.min(LARGE);
        if self.deep > 0 && wanted > self.reserved.max(SLOT) {
            self.reserved = self.region.reserve(self.rank, wanted).max(self.reserved);
        }
        self.next_bytes = if self.deep > 0 { least.max(SLOT) } else { SLOT };
    }

    /// Begins the next round: waits until its slot is free, and returns its number.
    pub(crate) fn begin(&mut self, call: Call) -> Result<u32> {
        let round = self.round.wrapping_add(1);
        let before_last = round.wrapping_sub(2);
        for peer in 0..self.size {
            // What a peer has staged since says mostly that it has: then its counters need no look.
            if !has_come(self.known_done[peer], before_last) {
                self.await_counter(peer, Counter::Done, before_last, call)?;
                self.known_done[peer] = before_last;
            }
        }
        self.round = round;
        self.slot_bytes[(round % 2) as usize] = self.next_bytes;
        Ok(round)
    }

    /// This rank's place for data of `round`, to write before it is staged.
    pub(crate) fn staging(&mut self, round: u32) -> &mut [u8] {
        // SAFETY: `begin` saw that no peer reads the slot any longer, and only this rank writes it.
        unsafe { std::slice::from_raw_parts_mut(self.slot(self.rank, round), self.slot_bytes(round)) }
    }

    /// Says that this rank has staged its data of `round`, and what it is calling.
    pub(crate) fn stage(&mut self, round: u32, call: Call, place: u64) {
        self.say(round, call, place);
        self.announce();
    }

    /// As [`stage`](Self::stage), of what is not in registered memory. Sleepers are woken a moment later: as this rank waits,
    /// or is done with the round.
    pub(crate) fn stage_soon(&mut self, round: u32, call: Call) {
        self.say(round, call, PRIVATE);
    }

    /// As [`stage_soon`](Self::stage_soon), with `data` of at most [`LITTLE`] bytes, which peers need not look for in the slot.
    pub(crate) fn stage_little(&mut self, round: u32, call: Call, data: &[u8]) {
        let stage = self.stage_of(self.rank, round);
        let (words, rest) = data.as_chunks();
        for (word, &bytes) in stage.little.iter().zip(words) {
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            stage.little[words.len()].store(u64::from_ne_bytes(last), Ordering::Relaxed);
        }
        self.say(round, call, PRIVATE);
    }

    fn say(&self, round: u32, call: Call, place: u64) {
        let stage = self.stage_of(self.rank, round);
        let said = 2 * self.reserved as u64 + u64::from(self.lateness.is_too_late());
        for (word, value) in stage.call.iter().zip(call.encode()) {
            word.store(value, Ordering::Relaxed);
        }
        stage.place.store(place, Ordering::Relaxed);
        stage.said.store(said, Ordering::Relaxed);
        let done = self.control(self.rank).counters[Counter::Done as usize].load(Ordering::Relaxed);
        stage.done.store(done, Ordering::Relaxed);
        stage.round.store(round, Ordering::Release);
        self.unannounced.set(Some(round));
    }

    /// Wakes those who sleep until this rank has staged, where that has not been done yet.
    fn announce(&self) {
        if let Some(round) = self.unannounced.take() {
            self.wake_sleepers([&self.stage_of(self.rank, round).round]);
        }
    }

    /// Waits until `peer` has staged `round`, checks that it calls the same, and returns the place of its
    /// registered data.
    pub(crate) fn await_staged(&mut self, peer: usize, round: u32, call: Call) -> Result<u64> {
        let stage = self.stage_of(peer, round);
        self.await_word(&stage.round, peer, round, call)?;
        let done = stage.done.load(Ordering::Relaxed);
        let theirs = [0, 1, 2, 3].map(|word| stage.call[word].load(Ordering::Relaxed));
        let place = stage.place.load(Ordering::Relaxed);
        if theirs != call.encode() {
            self.announce();
            return Err(self.context.mismatch(call, peer, Call::decode(theirs)));
        }
        // The peer had done it before it staged this round.
        self.known_done[peer] = done;
        Ok(place)
    }

    /// `bytes` of little data of `rank` in `round`, which it has staged.
    pub(crate) fn little(&self, rank: usize, round: u32, bytes: usize) -> &[u8] {
        assert!(bytes <= LITTLE);
        let words = self.stage_of(rank, round).little.as_ptr();
        // SAFETY: the rank does not write them again before this one is done with the round.
        unsafe { std::slice::from_raw_parts(words.cast(), bytes) }
    }

    fn stage_of(&self, rank: usize, round: u32) -> &Stage {
        &self.control(rank).stages[(round % 2) as usize]
    }

    /// The slot of `peer` in `round`: what it has staged there, and what it has reduced.
    pub(crate) fn staged(&self, peer: usize, round: u32) -> &[u8] {
        // SAFETY: the peer does not write again what it has said to be there before this rank is done with the round.
        unsafe { std::slice::from_raw_parts(self.slot(peer, round), self.slot_bytes(round)) }
    }

    /// Sets one of this rank's counters and wakes those who wait for it.
    pub(crate) fn publish(&self, counter: Counter, round: u32) {
        let word = &self.control(self.rank).counters[counter as usize];
        word.store(round, Ordering::Release);
        match self.unannounced.take() {
            Some(staged) => self.wake_sleepers([word, &self.stage_of(self.rank, staged).round]),
            None => self.wake_sleepers([word]),
        }
    }

    /// Wakes those who sleep on `words` of this rank, which have just been written.
    fn wake_sleepers<const WORDS: usize>(&self, words: [&AtomicU32; WORDS]) {
        // Pairs with the fence in `sleep_until`: either we see the sleeper, or it sees the new value.
        fence(Ordering::SeqCst);
        if self.control(self.rank).sleepers.load(Ordering::Relaxed) > 0 {
            words.iter().for_each(|word| self.region.waker().wake(word));
        }
    }

    /// Waits until `peer`'s counter has come to `round`.
    pub(crate) fn await_counter(&self, peer: usize, counter: Counter, round: u32, call: Call) -> Result<()> {
        self.await_word(&self.control(peer).counters[counter as usize], peer, round, call)
    }

    /// Waits until `word`, which `peer` writes, has come to `round`.
    fn await_word(&self, word: &AtomicU32, peer: usize, round: u32, call: Call) -> Result<()> {
        let reached = || has_come(word.load(Ordering::Acquire), round);
        // What is on its way is there before anything else is done.
        if reached() || (0..self.patience.at_once()).any(|_| reached()) {
            return Ok(());
        }
        self.has_waited.set(true);
        self.announce();
        if self.patience.look(reached) {
            return Ok(());
        }
        self.sleep_until(word, peer, round, call)
    }

    #[cold]
    fn sleep_until(&self, word: &AtomicU32, peer: usize, round: u32, call: Call) -> Result<()> {
        let control = self.control(peer);
        let mut wait = Wait::new(&self.context);
        // In a large slot each rank takes long by itself.
        let begun = (self.inside && self.next_bytes == SLOT).then(Instant::now);
        control.sleepers.fetch_add(1, Ordering::SeqCst);
        let outcome = loop {
            fence(Ordering::SeqCst);
            let value = word.load(Ordering::Acquire);
            if has_come(value, round) {
                break Ok(());
            }
            if let Err(error) = wait.check(peer, call) {
                break Err(error);
            }
            self.region.waker().sleep(word, value, SLICE);
        };
        control.sleepers.fetch_sub(1, Ordering::SeqCst);
        if let Some(begun) = begun {
            self.lateness.add(begun.elapsed());
        }
        outcome
    }
}

/// Whether a counter at `value` has come to `round`; both may have wrapped around.
fn has_come(value: u32, round: u32) -> bool {
    value.wrapping_sub(round).cast_signed() >= 0
}
