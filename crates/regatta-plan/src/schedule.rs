//! Pipeline schedules as data: what every stage does in which order, and so what it sends to whom.
//!
//! A stage executes its list from the first task to the last and never chooses. What may run, how much memory it
//! takes and how long it waits can therefore be told on paper, before anything runs.

mod check;
mod gpipe;
mod interleaved;
mod kind;
mod one_f_one_b;
mod zero_bubble;

pub use kind::ScheduleKind;

pub(crate) use check::complete;

use crate::{Costs, PlanError, simulate};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most forwards of a step over all stages: every one is an entry of a list in memory.
const MAX_TASKS: usize = 1 << 20;

/// One piece of work of a stage: a micro-batch on one of its chunks of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Task {
    /// From activations in to activations out.
    Forward {
        /// The chunk among those of the stage.
        chunk: usize,
        /// The micro-batch.
        micro: usize,
    },
    /// From the gradient of what went out to the gradients of weights and of what came in.
    Backward {
        /// The chunk among those of the stage.
        chunk: usize,
        /// The micro-batch.
        micro: usize,
    },
    /// The half of the backward that the stage before waits for: the gradient of what came in.
    BackwardInput {
        /// The chunk among those of the stage.
        chunk: usize,
        /// The micro-batch.
        micro: usize,
    },
    /// The other half: the gradient of the weights.
    BackwardWeight {
        /// The chunk among those of the stage.
        chunk: usize,
        /// The micro-batch.
        micro: usize,
    },
}

impl Task {
    /// The chunk among those of the stage.
    pub fn chunk(self) -> usize {
        self.parts().1
    }

    /// The micro-batch.
    pub fn micro(self) -> usize {
        self.parts().2
    }

    /// What others wait for when this is done; nobody waits for a weight part.
    pub fn sends(self) -> Option<Direction> {
        match self {
            Self::Forward { .. } => Some(Direction::Activation),
            Self::Backward { .. } | Self::BackwardInput { .. } => Some(Direction::Gradient),
            Self::BackwardWeight { .. } => None,
        }
    }

    /// The letter of the papers' figures, the chunk and the micro-batch.
    fn parts(self) -> (char, usize, usize) {
        match self {
            Self::Forward { chunk, micro } => ('F', chunk, micro),
            Self::Backward { chunk, micro } => ('B', chunk, micro),
            Self::BackwardInput { chunk, micro } => ('I', chunk, micro),
            Self::BackwardWeight { chunk, micro } => ('W', chunk, micro),
        }
    }
}

/// `F0.3` is the forward of micro-batch 3 on chunk 0; `B`, `I` and `W` are the backward and its parts.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (letter, chunk, micro) = self.parts();
        write!(f, "{letter}{chunk}.{micro}")
    }
}

/// What travels between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Forward, to the next virtual stage.
    Activation,
    /// Backward, to the virtual stage before.
    Gradient,
}

/// What every stage of a pipeline does in one step, in order.
///
/// The model is cut into `stages * chunks` virtual stages. Virtual stage `chunk * stages + stage` is chunk `chunk`
/// of `stage`, so activations go around the stages once for every chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// How it was made.
    pub kind: ScheduleKind,
    /// Ranks in the pipeline.
    pub stages: usize,
    /// Chunks of the model that a stage holds: 1 but for the interleaved schedule.
    pub chunks: usize,
    /// Micro-batches of a step.
    pub micros: usize,
    /// Whether there are backwards; evaluation has none.
    pub training: bool,
    /// By stage, in order.
    pub tasks: Vec<Vec<Task>>,
}

impl Schedule {
    /// The schedule of a training step.
    ///
    /// Any number of micro-batches will do; see [`Self::warning`] for too few.
    ///
    /// # Errors
    /// When a count is zero or all together are more than a step may have, or `chunks` is not what the kind takes: at least 2 for the interleaved schedule, 1
    /// for the others.
    pub fn new(kind: ScheduleKind, stages: usize, chunks: usize, micros: usize) -> Result<Self, PlanError> {
        for (count, name) in [
            (stages, "the number of pipeline stages"),
            (chunks, "the number of model chunks a stage"),
            (micros, "the number of micro-batches"),
        ] {
            if count == 0 {
                return Err(PlanError::Zero(name));
            }
        }
        match kind {
            ScheduleKind::Interleaved if chunks == 1 => return Err(PlanError::TooFewChunks),
            ScheduleKind::Interleaved => {}
            _ if chunks > 1 => return Err(PlanError::TooManyChunks { kind, chunks }),
            _ => {}
        }
        let forwards = stages.checked_mul(chunks).and_then(|parts| parts.checked_mul(micros));
        if forwards.is_none_or(|forwards| forwards > MAX_TASKS) {
            return Err(PlanError::TooLarge(format!(
                "{stages} stages x {chunks} chunks x {micros} micro-batches are more than the {MAX_TASKS} tasks that a \
                 step may have; lower train.accumulate (--micro-batches)"
            )));
        }
        let tasks = (0..stages)
            .map(|stage| match kind {
                ScheduleKind::GPipe => gpipe::tasks(micros),
                ScheduleKind::OneFOneB => one_f_one_b::tasks(stage, stages, micros),
                ScheduleKind::Interleaved => interleaved::tasks(stage, stages, chunks, micros),
                ScheduleKind::ZeroBubble => zero_bubble::tasks(stage, stages, micros),
            })
            .collect();
        Ok(Self { kind, stages, chunks, micros, training: true, tasks })
    }

    /// The schedule of evaluation: forwards alone, in the order of the interleaved schedule where there are
    /// chunks. No stages and no chunks are taken as one; no micro-batches is nothing to do.
    pub fn forward_only(stages: usize, chunks: usize, micros: usize) -> Self {
        let (stages, chunks) = (stages.max(1), chunks.max(1));
        let kind = if chunks > 1 { ScheduleKind::Interleaved } else { ScheduleKind::GPipe };
        let tasks = vec![interleaved::forwards(stages, chunks, micros); stages];
        Self { kind, stages, chunks, micros, training: false, tasks }
    }

    /// The place in the model of a stage's chunk.
    pub fn virtual_stage(&self, stage: usize, chunk: usize) -> usize {
        chunk * self.stages + stage
    }

    /// The stage and the chunk that a virtual stage is.
    pub fn place(&self, virtual_stage: usize) -> (usize, usize) {
        (virtual_stage % self.stages, virtual_stage / self.stages)
    }

    /// Parts that the model is cut into.
    pub fn virtual_stages(&self) -> usize {
        self.stages * self.chunks
    }

    /// Whom `stage` sends what it has when `task` is done: direction, stage and chunk. None at the ends of the
    /// model and for weight parts. With one stage the receiver is the sender, and nothing need travel.
    pub fn receiver(&self, stage: usize, task: Task) -> Option<(Direction, usize, usize)> {
        let here = self.virtual_stage(stage, task.chunk());
        let direction = task.sends()?;
        let there = match direction {
            Direction::Activation => Some(here + 1).filter(|there| *there < self.virtual_stages()),
            Direction::Gradient => here.checked_sub(1),
        }?;
        let (stage, chunk) = self.place(there);
        Some((direction, stage, chunk))
    }

    /// All that stage `from` sends to stage `to`, in the order of its tasks: direction, the receiver's chunk,
    /// and the micro-batch. Empty from a stage to itself.
    ///
    /// With two stages and several chunks the neighbours on both sides are one, so activations and gradients mix
    /// here, and the receiver may want them in another order than they come: where both share one channel it has
    /// to keep what it does not want yet.
    pub fn traffic(&self, from: usize, to: usize) -> Vec<(Direction, usize, usize)> {
        if from == to {
            return Vec::new();
        }
        let tasks = self.tasks.get(from).into_iter().flatten();
        tasks
            .filter_map(|&task| {
                let (direction, stage, chunk) = self.receiver(from, task)?;
                (stage == to).then_some((direction, chunk, task.micro()))
            })
            .collect()
    }

    /// What stage `from` sends to stage `to` in one direction, in the order of its tasks: the receiver's chunk,
    /// and the micro-batch.
    ///
    /// For every kind this is also the order in which the receiver's tasks want it, so a channel for each
    /// direction needs no reordering.
    pub fn messages(&self, from: usize, to: usize, direction: Direction) -> Vec<(usize, usize)> {
        let traffic = self.traffic(from, to).into_iter();
        traffic.filter(|message| message.0 == direction).map(|(_, chunk, micro)| (chunk, micro)).collect()
    }

    /// Every (from, to, direction) that has messages, in ascending order.
    pub fn links(&self) -> Vec<(usize, usize, Direction)> {
        let mut links: Vec<_> = (0..self.stages)
            .flat_map(|from| self.tasks.get(from).into_iter().flatten().map(move |&task| (from, task)))
            .filter_map(|(from, task)| {
                let (direction, to, _) = self.receiver(from, task)?;
                (from != to).then_some((from, to, direction))
            })
            .collect();
        links.sort_unstable();
        links.dedup();
        links
    }

    /// The most micro-batches that are forward but not backward at once on `stage`, each counted once a chunk.
    /// A backward in two parts ends with the input part here.
    pub fn peak_in_flight(&self, stage: usize) -> usize {
        self.peak(stage, |task| !matches!(task, Task::BackwardWeight { .. }))
    }

    /// Like [`Self::peak_in_flight`], but a backward in two parts ends with the weight part, for which the inputs
    /// of layers and the gradients of their outputs are still needed.
    pub fn peak_held(&self, stage: usize) -> usize {
        self.peak(stage, |task| !matches!(task, Task::BackwardInput { .. }))
    }

    /// The most forwards without their end at once, looking only at tasks that count.
    fn peak(&self, stage: usize, counts: impl Fn(&Task) -> bool) -> usize {
        let (mut held, mut peak) = (0usize, 0);
        for task in self.tasks.get(stage).into_iter().flatten().filter(|task| counts(task)) {
            match task {
                Task::Forward { .. } => held += 1,
                _ => held = held.saturating_sub(1),
            }
            peak = peak.max(held);
        }
        peak
    }

    /// Whether every micro-batch passes every chunk once, in order, and no stage waits forever where tasks run in
    /// order, links deliver in order and sends do not block.
    ///
    /// # Errors
    /// With a sentence on what is wrong.
    pub fn check(&self) -> Result<(), String> {
        complete(self)?;
        simulate(self, &Costs::even(self.virtual_stages(), 1.0, 1.0, 1.0))
            .map(drop)
            .map_err(|e| e.to_string())
    }

    /// The share of time that stages wait, where all are alike, a backward takes two forwards and messages take
    /// no time.
    ///
    /// With `p` stages, `v` chunks and `m` micro-batches: `(p - 1) / (v m + p - 1)` (Narayanan et al. 2021,
    /// sections 2.2.1 and 2.2.2, there as a ratio to the time without waiting). Simulated where there is no such
    /// formula: for the zero-bubble schedule, and for chunks with fewer micro-batches than stages.
    pub fn bubble(&self) -> f64 {
        if self.kind == ScheduleKind::ZeroBubble || (self.chunks > 1 && self.micros < self.stages) {
            let costs = Costs::even(self.virtual_stages(), 1.0, 1.0, 1.0);
            // A schedule that never ends waits all the time.
            return simulate(self, &costs).map_or(1.0, |timeline| timeline.idle_share());
        }
        let fill = self.stages.saturating_sub(1) as f64;
        let work = (self.chunks * self.micros) as f64;
        if fill == 0.0 { 0.0 } else { fill / (work + fill) }
    }

    /// A sentence for the user where there are fewer micro-batches than stages.
    pub fn warning(&self) -> Option<String> {
        (self.micros < self.stages).then(|| {
            let (micros, stages, percent) = (self.micros, self.stages, 100.0 * self.bubble());
            format!(
                "{micros} micro-batches do not fill a pipeline of {stages} stages: it waits {percent:.0}% of the \
                 time; use at least {stages}"
            )
        })
    }
}
