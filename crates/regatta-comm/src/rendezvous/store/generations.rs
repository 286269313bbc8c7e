//! The generations of a job: which ranks each has, and how each has ended.
//!
//! A job begins with generation 0, which has all its ranks. Where that ends - a rank has died, or has given up - the
//! living ranks may begin another, with other members. The store keeps the members of each, so that it can tell those
//! whom a death concerns, and forgets a generation when no rank is in it any longer.

use super::protocol::News;
use std::collections::BTreeMap;

/// Why something has ended: the rank, where one is known, and what happened.
pub(super) type End = (Option<usize>, String);

/// One generation.
#[derive(Debug, Default)]
struct Generation {
    /// Ranks of the job.
    members: Vec<usize>,
    end: Option<End>,
    /// Members that make no more calls in it.
    left: Vec<usize>,
}

/// A rank's place in the job.
#[derive(Debug)]
struct Seat {
    /// Host and process of whoever has it, or had it last.
    who: String,
    /// Somebody has it.
    taken: bool,
    /// The generation that the rank is in.
    generation: u64,
}

/// All of them that ranks are in.
#[derive(Debug)]
pub(super) struct Generations {
    all: BTreeMap<u64, Generation>,
    seats: BTreeMap<usize, Seat>,
    /// The end of the whole job.
    over: Option<End>,
    /// The first end of all.
    first: Option<End>,
}

impl Generations {
    /// With generation 0, of `size` ranks.
    pub(super) fn new(size: usize) -> Self {
        let first = Generation { members: (0..size).collect(), ..Generation::default() };
        Self { all: BTreeMap::from([(0, first)]), seats: BTreeMap::new(), over: None, first: None }
    }

    /// The first end of a generation or of the job.
    pub(super) fn first_end(&self) -> Option<&End> {
        self.first.as_ref()
    }

    /// A process takes the seat of a rank, to begin with `generation`.
    ///
    /// # Errors
    /// Another process has it, or had it in the same generation: who.
    pub(super) fn sit(&mut self, rank: usize, who: &str, generation: u64) -> Result<(), String> {
        if let Some(seat) = self.seats.get(&rank)
            && (seat.taken || seat.generation >= generation)
        {
            return Err(seat.who.clone());
        }
        self.seats.insert(rank, Seat { who: who.into(), taken: true, generation });
        Ok(())
    }

    /// The process has never known that it has the seat.
    pub(super) fn give_back(&mut self, rank: usize) {
        self.seats.remove(&rank);
    }

    /// The generation that a rank is in.
    pub(super) fn of(&self, rank: usize) -> u64 {
        self.seats.get(&rank).map_or(0, |seat| seat.generation)
    }

    /// Whether a rank's generation has ended, or the job.
    pub(super) fn has_ended(&self, rank: usize) -> bool {
        self.over.is_some() || self.all.get(&self.of(rank)).is_some_and(|generation| generation.end.is_some())
    }

    /// Rank `rank` goes on to `generation`, which has these members; the generations in which it makes no more calls.
    ///
    /// # Errors
    /// It is in a later one, or another rank has named other members.
    pub(super) fn begin(
        &mut self,
        rank: usize,
        generation: u64,
        members: &[usize],
    ) -> Result<Vec<u64>, String> {
        let now = self.of(rank);
        if generation == 0 || generation < now {
            return Err(format!("rank {rank} is in generation {now}, and cannot go back to {generation}"));
        }
        let known = self.all.entry(generation).or_default();
        if known.members.is_empty() {
            known.members = members.to_vec();
        } else if known.members != members {
            return Err(format!(
                "generation {generation} has the members {:?}, and rank {rank} names {members:?}: all must name the same",
                known.members
            ));
        }
        if let Some(seat) = self.seats.get_mut(&rank) {
            seat.generation = generation;
        }
        let mut left = vec![];
        for (&number, earlier) in self.all.range_mut(..generation) {
            if earlier.members.contains(&rank) && !earlier.left.contains(&rank) {
                earlier.left.push(rank);
                left.push(number);
            }
        }
        Ok(left)
    }

    /// The generations that nobody is in any longer and nobody can begin; they are forgotten.
    pub(super) fn forget(&mut self) -> Vec<u64> {
        let seats = &self.seats;
        let is_gone = |number: u64, rank: &usize| {
            seats.get(rank).is_none_or(|seat| !seat.taken || seat.generation > number)
        };
        let is_over = |&(&number, generation): &(&u64, &Generation)| {
            generation.members.iter().all(|rank| generation.left.contains(rank) || is_gone(number, rank))
        };
        let over: Vec<u64> = self.all.iter().filter(is_over).map(|(&number, _)| number).collect();
        self.all.retain(|number, _| !over.contains(number));
        over
    }

    /// Ends one generation; whether it was the first end that it has.
    pub(super) fn end(&mut self, generation: u64, end: &End) -> bool {
        let Some(ended) = self.all.get_mut(&generation).filter(|generation| generation.end.is_none()) else {
            return false;
        };
        ended.end = Some(end.clone());
        self.first.get_or_insert_with(|| end.clone());
        true
    }

    /// Ends the job; whether it had not ended.
    pub(super) fn end_all(&mut self, end: &End) -> bool {
        self.first.get_or_insert_with(|| end.clone());
        let first = self.over.is_none();
        self.over.get_or_insert_with(|| end.clone());
        first
    }

    /// The process of a rank has gone; the generations that have the rank, and in which it still makes calls.
    pub(super) fn stand_up(&mut self, rank: usize, by_itself: bool) -> Vec<u64> {
        if let Some(seat) = self.seats.get_mut(&rank) {
            seat.taken = false;
        }
        let mut affected = vec![];
        for (&number, generation) in &mut self.all {
            if generation.members.contains(&rank) && !generation.left.contains(&rank) {
                if by_itself {
                    generation.left.push(rank);
                }
                affected.push(number);
            }
        }
        affected
    }

    /// What whoever watches from now on has to hear: who has left which generation, and which have ended.
    pub(super) fn past(&self) -> Vec<News> {
        let mut past = vec![];
        for (&generation, Generation { left, .. }) in &self.all {
            past.extend(left.iter().map(|&rank| News::Left { generation, rank }));
        }
        let end =
            |generation, (rank, reason): &End| News::End { generation, rank: *rank, reason: reason.clone() };
        for (&number, generation) in &self.all {
            past.extend(generation.end.iter().map(|known| end(Some(number), known)));
        }
        past.extend(self.over.iter().map(|known| end(None, known)));
        past
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(rank: usize) -> End {
        (Some(rank), "it died".into())
    }

    #[test]
    fn a_death_concerns_the_generations_that_have_the_rank() {
        let mut generations = Generations::new(3);
        (0..3).for_each(|rank| generations.sit(rank, "first", 0).unwrap());
        assert_eq!(generations.sit(1, "second", 0), Err("first".into()));
        assert_eq!(generations.begin(0, 1, &[0, 1]), Ok(vec![0]));
        assert_eq!(generations.begin(0, 1, &[0, 1]), Ok(vec![]));
        // Rank 1 has yet to come to generation 1.
        assert_eq!(generations.stand_up(1, false), [0, 1]);
        assert!(generations.end(0, &end(1)) && !generations.end(0, &end(2)) && generations.end(1, &end(1)));
        assert!([0, 1, 2].iter().all(|&rank| generations.has_ended(rank)));
        assert_eq!(generations.first_end(), Some(&end(1)));
        // Its seat is free for a later generation.
        assert_eq!(generations.sit(1, "second", 0), Err("first".into()));
        generations.sit(1, "second", 2).unwrap();
        assert_eq!(generations.sit(1, "third", 3), Err("second".into()));
        for rank in [0, 1, 2] {
            generations.begin(rank, 2, &[2, 1, 0]).unwrap();
        }
        assert!(generations.begin(2, 1, &[2]).unwrap_err().contains("cannot go back"));
        assert!(generations.begin(2, 3, &[2]).is_ok());
        assert!(generations.begin(0, 3, &[2, 0]).unwrap_err().contains("all must name the same"));
        assert!(![0, 1, 2].iter().any(|&rank| generations.has_ended(rank)));
        assert_eq!(generations.forget(), [0, 1]);
        assert_eq!(generations.past(), [News::Left { generation: 2, rank: 2 }]);
    }

    #[test]
    fn the_end_of_the_job_is_that_of_all_generations() {
        let mut generations = Generations::new(1);
        generations.sit(0, "first", 0).unwrap();
        assert!(generations.end_all(&end(7)) && !generations.end_all(&end(8)));
        generations.begin(0, 1, &[0]).unwrap();
        assert!(generations.has_ended(0));
        let over = News::End { generation: None, rank: Some(7), reason: "it died".into() };
        assert_eq!(generations.past(), [News::Left { generation: 0, rank: 0 }, over]);
    }
}
