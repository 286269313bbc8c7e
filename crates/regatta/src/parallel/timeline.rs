//! When a rank did what in a step: the tasks of its schedule, and the time it waited between them.

use regatta_plan::Task;
use std::time::{Duration, Instant};

/// The last step of one rank.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    begun: Option<Instant>,
    /// The tasks with the times from the step's beginning at which they began and ended.
    pub tasks: Vec<(Task, Duration, Duration)>,
    /// From the step's beginning to its end, communication of gradients included.
    pub span: Duration,
}

impl Timeline {
    pub(crate) fn begin(&mut self) {
        *self = Self { begun: Some(Instant::now()), ..Self::default() };
    }

    pub(crate) fn now(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.elapsed())
    }

    pub(crate) fn did(&mut self, task: Task, begun: Duration) {
        let ended = self.now();
        self.tasks.push((task, begun, ended));
    }

    pub(crate) fn end(&mut self) {
        self.span = self.now();
    }

    /// When the last step began.
    pub fn begun(&self) -> Option<Instant> {
        self.begun
    }

    /// Time in tasks.
    pub fn busy(&self) -> Duration {
        self.tasks.iter().map(|(_, begun, ended)| *ended - *begun).sum()
    }
}
