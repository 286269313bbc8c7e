//! The rounds of joining, where they are kept: who has joined, and what the operations are that joined ranks take part in.

use super::directory::{Invitation, Round};
use std::collections::{BTreeMap, BTreeSet};

/// Rounds by token.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    rounds: BTreeMap<u64, Joined>,
    /// Ranks and invitations that are here.
    count: usize,
}

#[derive(Debug, Default)]
struct Joined {
    ranks: BTreeSet<usize>,
    invitations: BTreeMap<u32, Invitation>,
    /// The operation that each rank has come to: it needs only later ones.
    at: BTreeMap<usize, u32>,
    /// The number of the operation in which the round ends.
    end: Option<u32>,
}

impl Joined {
    fn count(&self) -> usize {
        self.ranks.len() + self.invitations.len() + self.at.len()
    }

    /// Drops the invitations that every rank of the group is past, and all when every rank knows of the end.
    fn forget(&mut self, size: usize) {
        let Some(&least) = self.at.values().min().filter(|_| self.at.len() >= size) else { return };
        if self.end.is_some_and(|end| end <= least) {
            *self = Self::default();
        } else {
            self.invitations = self.invitations.split_off(&least.saturating_add(1));
        }
    }

    fn reach(&mut self, rank: usize, sequence: u32) {
        let at = self.at.entry(rank).or_default();
        *at = sequence.max(*at);
    }
}

impl Rounds {
    /// Ranks and invitations that are here.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    fn change<R>(&mut self, token: u64, change: impl FnOnce(&mut Joined) -> R) -> R {
        let joined = self.rounds.entry(token).or_default();
        let before = joined.count();
        let result = change(joined);
        self.count = self.count - before + joined.count();
        if joined.count() == 0 {
            self.rounds.remove(&token);
        }
        result
    }

    /// Records that a rank has joined after operation `sequence`; how many have.
    pub(crate) fn join(&mut self, round: Round, sequence: u32) -> usize {
        self.change(round.token, |joined| {
            joined.ranks.insert(round.rank);
            joined.reach(round.rank, sequence);
            joined.ranks.len()
        })
    }

    /// The ranks that have joined.
    pub(crate) fn joined(&self, token: u64) -> Vec<usize> {
        self.rounds.get(&token).map_or(vec![], |joined| joined.ranks.iter().copied().collect())
    }

    /// Takes what operation `sequence` is from a rank that begins it.
    pub(crate) fn invite(&mut self, round: Round, sequence: u32, invitation: Invitation) {
        self.change(round.token, |joined| {
            joined.invitations.insert(sequence, invitation);
            joined.reach(round.rank, sequence);
            if matches!(invitation, Invitation::End { .. }) {
                joined.end = Some(sequence);
            }
            joined.forget(round.size);
        });
    }

    /// What operation `sequence` is, where somebody has said it, to a rank that needs no earlier one. Adds nothing to
    /// what is here.
    pub(crate) fn invited(&mut self, round: Round, sequence: u32) -> Option<Invitation> {
        self.change(round.token, |joined| {
            if !joined.ranks.contains(&round.rank) {
                return None;
            }
            let invitation = joined.invitations.get(&sequence).copied();
            // No rank asks for what comes after the end.
            let ends = matches!(invitation, Some(Invitation::End { .. }));
            joined.reach(round.rank, if ends { sequence } else { sequence.saturating_sub(1) });
            joined.forget(round.size);
            invitation
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::{Call, Kind};
    use crate::numbers::element::DType;

    const SIZE: usize = 3;

    fn place(rank: usize) -> Round {
        Round { token: 9, size: SIZE, rank }
    }

    fn call(sequence: u32) -> Invitation {
        Invitation::Call(Call { sequence, ..Call::new(Kind::Barrier, DType::U8, 0) })
    }

    #[test]
    fn a_rank_that_asks_adds_nothing() {
        let mut rounds = Rounds::default();
        for rank in 0..SIZE - 1 {
            rounds.join(place(rank), 0);
        }
        rounds.invite(place(0), 1, Invitation::End { rank: 0 });
        let before = rounds.len();
        // The last one has not joined: it is told nothing.
        for (rank, expected) in [(1, true), (1, true), (2, false)] {
            assert_eq!(rounds.invited(place(rank), 1).is_some(), expected, "rank {rank}");
            assert_eq!(rounds.len(), before);
        }
        rounds.join(place(2), 0);
        assert_eq!(rounds.invited(place(2), 1), Some(Invitation::End { rank: 0 }));
        assert_eq!(rounds.len(), 0);
    }

    #[test]
    fn what_all_are_past_is_dropped_and_what_a_slow_rank_needs_is_kept() {
        let mut rounds = Rounds::default();
        assert_eq!(rounds.join(place(2), 4), 1);
        let mut most = 0;
        for sequence in 5..100_005 {
            rounds.invite(place(0), sequence, call(sequence));
            assert_eq!(rounds.invited(place(2), sequence), Some(call(sequence)));
            // A rank that comes later says it again.
            rounds.invite(place(1), sequence, call(sequence));
            most = most.max(rounds.len());
        }
        assert!(most < 10, "{most} entries");
        // Rank 0 runs ahead; rank 1 joins where it is, and reads all that it has missed.
        for sequence in 100_005..100_050 {
            rounds.invite(place(0), sequence, call(sequence));
        }
        assert_eq!(rounds.join(place(1), 100_004), 2);
        for rank in [1, 2] {
            for sequence in 100_005..100_050 {
                assert_eq!(rounds.invited(place(rank), sequence), Some(call(sequence)), "rank {rank}");
            }
            assert_eq!(rounds.invited(place(rank), 100_050), None);
        }
        assert_eq!(rounds.joined(9), [1, 2]);
        assert_eq!(rounds.join(place(0), 100_049), 3);
        rounds.invite(place(0), 100_050, Invitation::End { rank: 0 });
        for rank in [2, 1] {
            assert_eq!(rounds.invited(place(rank), 100_050), Some(Invitation::End { rank: 0 }));
        }
        assert_eq!(rounds.len(), 0);
    }
}
