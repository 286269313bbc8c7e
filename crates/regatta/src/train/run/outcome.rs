//! Results of a step.

/// Times of one step in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(in crate::train) struct StepTimes {
    /// The whole step.
    pub(in crate::train) step: f64,
    /// Communication.
    pub(in crate::train) comm: f64,
    /// Waiting for communication.
    pub(in crate::train) comm_exposed: f64,
    /// All tasks of the schedule.
    pub(in crate::train) tasks: f64,
    /// From the step's beginning to the end of the last task.
    pub(in crate::train) last_task: f64,
}

/// What was requested during a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Requested {
    Nothing,
    /// To save and go on.
    Save,
    /// To save and stop.
    Stop,
}

/// Values that are combined over all ranks at the end of a step.
pub(super) struct Agreed {
    /// The mean loss over the workers.
    pub(super) loss: f64,
    /// Number of targets that count, over all workers.
    pub(super) counted: f64,
    /// What was requested on any rank.
    pub(super) requested: Requested,
}
