//! The timeline of a step on one rank: when each task of its schedule ran.

use regatta_plan::Task;
use std::time::{Duration, Instant};

/// The timeline of one rank's last step.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    begun: Option<Instant>,
    /// Each task, with the times since the beginning of the step at which it began and ended.
    pub tasks: Vec<(Task, Duration, Duration)>,
    /// The duration of the step, including the communication of gradients.
    pub span: Duration,
}

impl Timeline {
    /// Marks the beginning of a step.
    pub(crate) fn begin(&mut self) {
        *self = Self { begun: Some(Instant::now()), ..Self::default() };
    }

    /// The time since the beginning of the step.
    pub(crate) fn now(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.elapsed())
    }

    /// Records a task that began at `begun` and ends now.
    pub(crate) fn record(&mut self, task: Task, begun: Duration) {
        let ended = self.now();
        self.tasks.push((task, begun, ended));
    }

    /// Marks the end of the step.
    pub(crate) fn end(&mut self) {
        self.span = self.now();
    }

    /// When the last step began.
    pub fn begun(&self) -> Option<Instant> {
        self.begun
    }

    /// The time that tasks took.
    pub fn busy(&self) -> Duration {
        self.tasks.iter().map(|(_, begun, ended)| *ended - *begun).sum()
    }
}
