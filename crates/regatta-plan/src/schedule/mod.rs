//! Pipeline schedules as data: which tasks every stage executes in which order, and so what it sends to which stage.
//!
//! A stage executes its list of tasks from the first to the last and makes no decisions. So whether a schedule
//! deadlocks, how much memory it needs and how long stages wait are known before anything runs.

mod check;
mod gpipe;
mod interleaved;
mod kind;
mod one_f_one_b;
mod zero_bubble;

pub use kind::ScheduleKind;

pub(crate) use check::check_complete;

use crate::PlanError;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The most forwards in a step over all stages: each is an entry of a list in memory.
const MAX_TASKS: usize = 1 << 20;

/// One task of a stage: a pass of one micro-batch through one of the stage's chunks of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Task {
    /// Computes output activations from input activations.
    Forward {
        /// Index of the chunk among those of the stage.
        chunk: usize,
        /// Index of the micro-batch.
        micro_batch: usize,
    },
    /// Computes the gradients of the weights and of the input from the gradient of the output.
    Backward {
        /// Index of the chunk among those of the stage.
        chunk: usize,
        /// Index of the micro-batch.
        micro_batch: usize,
    },
    /// The first part of a backward: the gradient of the input, which the stage before waits for.
    BackwardInput {
        /// Index of the chunk among those of the stage.
        chunk: usize,
        /// Index of the micro-batch.
        micro_batch: usize,
    },
    /// The second part of a backward: the gradient of the weights.
    BackwardWeight {
        /// Index of the chunk among those of the stage.
        chunk: usize,
        /// Index of the micro-batch.
        micro_batch: usize,
    },
}

impl Task {
    /// Index of the chunk among those of the stage.
    pub fn chunk(self) -> usize {
        self.parts().1
    }

    /// Index of the micro-batch.
    pub fn micro_batch(self) -> usize {
        self.parts().2
    }

    /// What the task's result is sent as; `None` for a weight part, whose result is not sent.
    pub fn sends(self) -> Option<Direction> {
        match self {
            Self::Forward { .. } => Some(Direction::Activation),
            Self::Backward { .. } | Self::BackwardInput { .. } => Some(Direction::Gradient),
            Self::BackwardWeight { .. } => None,
        }
    }

    /// The letter that stands for the task in the papers' figures, the chunk and the micro-batch.
    fn parts(self) -> (char, usize, usize) {
        match self {
            Self::Forward { chunk, micro_batch } => ('F', chunk, micro_batch),
            Self::Backward { chunk, micro_batch } => ('B', chunk, micro_batch),
            Self::BackwardInput { chunk, micro_batch } => ('I', chunk, micro_batch),
            Self::BackwardWeight { chunk, micro_batch } => ('W', chunk, micro_batch),
        }
    }
}

/// `F0.3` is the forward of micro-batch 3 on chunk 0; `B`, `I` and `W` are the backward and its parts.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (letter, chunk, micro_batch) = self.parts();
        write!(f, "{letter}{chunk}.{micro_batch}")
    }
}

/// What is sent between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// An activation, sent to the next virtual stage.
    Activation,
    /// A gradient, sent to the previous virtual stage.
    Gradient,
}

/// The tasks that every stage of a pipeline executes in one step, in order.
///
/// The model is divided into `stages * chunks` virtual stages. Virtual stage `chunk * stages + stage` is chunk `chunk`
/// of `stage`, so activations pass through all stages once for every chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// The kind of schedule.
    pub kind: ScheduleKind,
    /// Stages of the pipeline.
    pub stages: usize,
    /// Chunks of the model that each stage holds: 1 except for the interleaved schedule.
    pub chunks: usize,
    /// Micro-batches per step.
    pub micro_batches: usize,
    /// Whether there are backwards: evaluation has only forwards.
    pub training: bool,
    /// The tasks of each stage, in order.
    pub tasks: Vec<Vec<Task>>,
}

impl Schedule {
    /// The schedule of a training step.
    ///
    /// Any number of micro-batches is valid; see [`Self::warning`] for too few.
    ///
    /// # Errors
    /// [`PlanError::Zero`] if a count is zero, [`PlanError::TooLarge`] if there are too many tasks in a step, and
    /// [`PlanError::TooFewChunks`] or [`PlanError::TooManyChunks`] if the kind does not support `chunks`: the
    /// interleaved schedule needs at least 2, the others take 1.
    pub fn new(
        kind: ScheduleKind,
        stages: usize,
        chunks: usize,
        micro_batches: usize,
    ) -> Result<Self, PlanError> {
        for (count, name) in [
            (stages, "the number of pipeline stages"),
            (chunks, "the number of model chunks per stage"),
            (micro_batches, "the number of micro-batches"),
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
        let forwards = stages.checked_mul(chunks).and_then(|parts| parts.checked_mul(micro_batches));
        if forwards.is_none_or(|forwards| forwards > MAX_TASKS) {
            return Err(PlanError::TooLarge(format!(
                "{stages} stages x {chunks} chunks x {micro_batches} micro-batches are more than the {MAX_TASKS} \
                 forwards that a step may have; lower train.accumulate (--micro-batches)"
            )));
        }
        let tasks = (0..stages)
            .map(|stage| match kind {
                ScheduleKind::GPipe => gpipe::tasks(micro_batches),
                ScheduleKind::OneFOneB => one_f_one_b::tasks(stage, stages, micro_batches),
                ScheduleKind::Interleaved => interleaved::tasks(stage, stages, chunks, micro_batches),
                ScheduleKind::ZeroBubble => zero_bubble::tasks(stage, stages, micro_batches),
            })
            .collect();
        Ok(Self { kind, stages, chunks, micro_batches, training: true, tasks })
    }

    /// The schedule of evaluation: only forwards, in the order of the interleaved schedule if there are several
    /// chunks. 0 stages or chunks count as 1; with 0 micro-batches there are no tasks.
    pub fn forward_only(stages: usize, chunks: usize, micro_batches: usize) -> Self {
        let (stages, chunks) = (stages.max(1), chunks.max(1));
        let kind = if chunks > 1 { ScheduleKind::Interleaved } else { ScheduleKind::GPipe };
        let tasks = vec![interleaved::forwards(stages, chunks, micro_batches); stages];
        Self { kind, stages, chunks, micro_batches, training: false, tasks }
    }

    /// The virtual stage that is chunk `chunk` of `stage`.
    pub fn virtual_stage(&self, stage: usize, chunk: usize) -> usize {
        chunk * self.stages + stage
    }

    /// The stage and the chunk of a virtual stage.
    pub fn place(&self, virtual_stage: usize) -> (usize, usize) {
        (virtual_stage % self.stages, virtual_stage / self.stages)
    }

    /// The number of virtual stages, which are the parts of the model.
    pub fn virtual_stages(&self) -> usize {
        self.stages * self.chunks
    }

    /// Where `stage` sends the result of `task`: the direction, and the receiver's stage and chunk. `None` at the
    /// ends of the model and for weight parts. With one stage the receiver is the sender, and nothing has to be sent.
    pub fn receiver(&self, stage: usize, task: Task) -> Option<(Direction, usize, usize)> {
        let own = self.virtual_stage(stage, task.chunk());
        let direction = task.sends()?;
        let target = match direction {
            Direction::Activation => Some(own + 1).filter(|target| *target < self.virtual_stages()),
            Direction::Gradient => own.checked_sub(1),
        }?;
        let (stage, chunk) = self.place(target);
        Some((direction, stage, chunk))
    }

    /// All messages from stage `from` to stage `to`, in the order in which they are sent: direction, the receiver's
    /// chunk, and the micro-batch. Empty from a stage to itself.
    ///
    /// With two stages and several chunks, a stage sends both activations and gradients to the other one. The
    /// receiver may need them in another order than they arrive, so with one channel for both it has to store
    /// messages until then.
    pub fn traffic(&self, from: usize, to: usize) -> Vec<(Direction, usize, usize)> {
        if from == to {
            return Vec::new();
        }
        let tasks = self.tasks.get(from).into_iter().flatten();
        tasks
            .filter_map(|&task| {
                let (direction, stage, chunk) = self.receiver(from, task)?;
                (stage == to).then_some((direction, chunk, task.micro_batch()))
            })
            .collect()
    }

    /// The messages from stage `from` to stage `to` in one direction, in the order in which they are sent: the
    /// receiver's chunk, and the micro-batch.
    ///
    /// With every kind of schedule the receiver needs them in this order, so one channel per direction needs no
    /// reordering.
    pub fn messages(&self, from: usize, to: usize, direction: Direction) -> Vec<(usize, usize)> {
        let traffic = self.traffic(from, to).into_iter();
        traffic
            .filter(|message| message.0 == direction)
            .map(|(_, chunk, micro_batch)| (chunk, micro_batch))
            .collect()
    }

    /// Every (from, to, direction) with at least one message, in ascending order.
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

    /// The most micro-batches that are between their forward and the end of their backward on `stage` at the same
    /// time, each counted once per chunk. A backward in two parts counts as ended after its input part.
    pub fn peak_in_flight(&self, stage: usize) -> usize {
        self.peak(stage, |task| !matches!(task, Task::BackwardWeight { .. }))
    }

    /// Like [`Self::peak_in_flight`], but a backward in two parts counts as ended after its weight part, which still
    /// needs the inputs of layers and the gradients of their outputs. This is what determines the memory for
    /// activations.
    pub fn peak_held(&self, stage: usize) -> usize {
        self.peak(stage, |task| !matches!(task, Task::BackwardInput { .. }))
    }

    /// The most forwards without a matching backward at the same time, over the tasks for which `counts` is true.
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
}
