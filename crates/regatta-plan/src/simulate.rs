//! The time that a schedule takes, computed without running it.

use crate::{
    PlanError,
    schedule::{Schedule, ScheduleKind, Task, check_complete},
};

/// The duration of tasks, in seconds or any other unit. Each list has one entry per virtual stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Duration of a forward.
    pub forward: Vec<f64>,
    /// Duration of the part of a backward that computes the gradient of the input.
    pub backward_input: Vec<f64>,
    /// Duration of the part of a backward that computes the gradients of the weights. A whole backward takes the sum
    /// of the two.
    pub backward_weight: Vec<f64>,
    /// Time from the end of a task until its result has arrived at the next stage. The sender does not wait for this.
    pub message: f64,
}

impl Costs {
    /// The same costs for all virtual stages, with messages that take no time.
    pub fn even(virtual_stages: usize, forward: f64, backward_input: f64, backward_weight: f64) -> Self {
        Self {
            forward: vec![forward; virtual_stages],
            backward_input: vec![backward_input; virtual_stages],
            backward_weight: vec![backward_weight; virtual_stages],
            message: 0.0,
        }
    }

    /// The duration of `task` on a virtual stage.
    fn duration(&self, task: Task, virtual_stage: usize) -> f64 {
        match task {
            Task::Forward { .. } => self.forward[virtual_stage],
            Task::Backward { .. } => self.backward_input[virtual_stage] + self.backward_weight[virtual_stage],
            Task::BackwardInput { .. } => self.backward_input[virtual_stage],
            Task::BackwardWeight { .. } => self.backward_weight[virtual_stage],
        }
    }
}

/// When every task of a schedule starts and ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// The tasks of each stage in order: the task, its start and its end, in the unit of the costs.
    pub tasks: Vec<Vec<(Task, f64, f64)>>,
    /// Time from the start of the first task to the end of the last.
    pub span: f64,
}

impl Timeline {
    /// Time in which `stage` executes no task.
    pub fn idle(&self, stage: usize) -> f64 {
        let tasks = self.tasks.get(stage).into_iter().flatten();
        self.span - tasks.map(|(_, start, end)| end - start).sum::<f64>()
    }

    /// The share of the stages' time in which they execute no task, 0 to 1: the bubble of the pipeline.
    pub fn idle_share(&self) -> f64 {
        let whole = self.span * self.tasks.len() as f64;
        if whole > 0.0 {
            (0..self.tasks.len()).map(|stage| self.idle(stage)).sum::<f64>() / whole
        } else {
            0.0
        }
    }
}

/// Simulates `schedule`: every stage executes its tasks in order, and each task starts as soon as its inputs are
/// available.
///
/// # Errors
/// [`PlanError::CostCount`] if a virtual stage has no costs, and [`PlanError::Schedule`] if the schedule is
/// incomplete or deadlocks; the error then names the task that each stage cannot start.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Timeline, PlanError> {
    let needed = schedule.virtual_stages();
    let given = costs.forward.len().min(costs.backward_input.len()).min(costs.backward_weight.len());
    if given < needed {
        return Err(PlanError::CostCount { given, needed });
    }
    check_complete(schedule).map_err(PlanError::Schedule)?;

    let mut results = Results::new(schedule);
    let mut tasks: Vec<Vec<(Task, f64, f64)>> = vec![Vec::new(); schedule.stages];
    let mut progressed = true;
    while progressed {
        progressed = false;
        for (stage, (past, all)) in tasks.iter_mut().zip(&schedule.tasks).enumerate() {
            while let Some(&task) = all.get(past.len()) {
                let virtual_stage = schedule.virtual_stage(stage, task.chunk());
                let Some(ready) = results.ready(task, virtual_stage, costs.message) else { break };
                let start = past.last().map_or(0.0, |last| last.2).max(ready);
                let end = start + costs.duration(task, virtual_stage);
                results.record(task, virtual_stage, end);
                past.push((task, start, end));
                progressed = true;
            }
        }
    }

    let waits: Vec<String> = (tasks.iter().zip(&schedule.tasks).enumerate())
        .filter_map(|(stage, (past, all))| {
            Some(format!("stage {stage} waits to start {}", all.get(past.len())?))
        })
        .collect();
    if !waits.is_empty() {
        return Err(PlanError::Schedule(format!("the stages deadlock: {}", waits.join(", "))));
    }
    let span = tasks.iter().flatten().map(|(_, _, end)| *end).fold(0.0, f64::max);
    Ok(Timeline { tasks, span })
}

/// When each activation and gradient was ready on the stage that computed it, by virtual stage and micro-batch.
struct Results {
    micro_batches: usize,
    stages: usize,
    forward: Vec<Option<f64>>,
    gradient: Vec<Option<f64>>,
}

impl Results {
    fn new(schedule: &Schedule) -> Self {
        let unknown = vec![None; schedule.virtual_stages() * schedule.micro_batches];
        Self {
            micro_batches: schedule.micro_batches,
            stages: schedule.stages,
            forward: unknown.clone(),
            gradient: unknown,
        }
    }

    /// When all inputs of `task` are available; `None` if one of them has not been computed yet.
    fn ready(&self, task: Task, virtual_stage: usize, message: f64) -> Option<f64> {
        // With one stage, neighbouring chunks are on the same rank and nothing is sent.
        let message = if self.stages > 1 { message } else { 0.0 };
        let at = |virtual_stage: usize| virtual_stage * self.micro_batches + task.micro_batch();
        let last = virtual_stage + 1 == self.forward.len() / self.micro_batches;
        match task {
            Task::Forward { .. } if virtual_stage == 0 => Some(0.0),
            Task::Forward { .. } => Some(self.forward[at(virtual_stage - 1)]? + message),
            Task::BackwardWeight { .. } => self.gradient[at(virtual_stage)],
            Task::Backward { .. } | Task::BackwardInput { .. } if last => self.forward[at(virtual_stage)],
            Task::Backward { .. } | Task::BackwardInput { .. } => {
                Some(self.forward[at(virtual_stage)]?.max(self.gradient[at(virtual_stage + 1)]? + message))
            }
        }
    }

    fn record(&mut self, task: Task, virtual_stage: usize, end: f64) {
        let at = virtual_stage * self.micro_batches + task.micro_batch();
        match task {
            Task::Forward { .. } => self.forward[at] = Some(end),
            Task::Backward { .. } | Task::BackwardInput { .. } => self.gradient[at] = Some(end),
            Task::BackwardWeight { .. } => {}
        }
    }
}

impl Schedule {
    /// Checks that every chunk processes every micro-batch once and in order, and that no stage waits forever if
    /// tasks run in order, messages arrive in order and sends do not block.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        check_complete(self)?;
        simulate(self, &Costs::even(self.virtual_stages(), 1.0, 1.0, 1.0))
            .map(drop)
            .map_err(|e| e.to_string())
    }

    /// The share of time in which stages wait, 0 to 1, if all stages take the same time, a backward takes as long as
    /// two forwards and messages take no time.
    ///
    /// With `p` stages, `v` chunks and `m` micro-batches it is `(p - 1) / (v m + p - 1)` (Narayanan et al. 2021,
    /// sections 2.2.1 and 2.2.2, who give the ratio to the time without waiting). Where there is no such formula the
    /// schedule is simulated: for the zero-bubble schedule, and for several chunks with fewer micro-batches than
    /// stages.
    pub fn bubble(&self) -> f64 {
        if self.kind == ScheduleKind::ZeroBubble || (self.chunks > 1 && self.micro_batches < self.stages) {
            let costs = Costs::even(self.virtual_stages(), 1.0, 1.0, 1.0);
            // A schedule that deadlocks waits all the time.
            return simulate(self, &costs).map_or(1.0, |timeline| timeline.idle_share());
        }
        let fill = self.stages.saturating_sub(1) as f64;
        let work = (self.chunks * self.micro_batches) as f64;
        if fill == 0.0 { 0.0 } else { fill / (work + fill) }
    }

    /// A warning for the user if there are fewer micro-batches than stages.
    pub fn warning(&self) -> Option<String> {
        (self.micro_batches < self.stages).then(|| {
            let (micro_batches, stages, percent) = (self.micro_batches, self.stages, 100.0 * self.bubble());
            format!(
                "{micro_batches} micro-batches do not fill a pipeline of {stages} stages: it waits {percent:.0}% of the \
                 time; use at least {stages}"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScheduleKind;

    #[test]
    fn messages_delay_only_the_receiver() {
        let schedule = Schedule::new(ScheduleKind::GPipe, 2, 1, 2).unwrap();
        let costs = Costs { message: 10.0, ..Costs::even(2, 1.0, 1.0, 1.0) };
        let timeline = simulate(&schedule, &costs).unwrap();
        // Stage 0 sends at 1 and 2. Stage 1 executes forwards at 11..13 and backwards at 13..17. Stage 0 executes
        // backwards from 25 and from 27.
        let starts: Vec<Vec<f64>> =
            timeline.tasks.iter().map(|tasks| tasks.iter().map(|task| task.1).collect()).collect();
        assert_eq!(starts, [[0.0, 1.0, 25.0, 27.0], [11.0, 12.0, 13.0, 15.0]]);
        assert_eq!((timeline.span, timeline.idle(0), timeline.idle_share()), (29.0, 23.0, 46.0 / 58.0));
    }

    #[test]
    fn a_deadlock_is_an_error() {
        let mut schedule = Schedule::new(ScheduleKind::OneFOneB, 2, 1, 2).unwrap();
        // Stage 0 now waits for the gradient of micro-batch 0 before it sends micro-batch 1, and stage 1 waits for
        // micro-batch 1 before it sends that gradient.
        schedule.tasks[0].swap(1, 2);
        schedule.tasks[1].swap(1, 2);
        let error = simulate(&schedule, &Costs::even(2, 1.0, 1.0, 1.0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the schedule cannot run: the stages deadlock: stage 0 waits to start B0.0, stage 1 waits to start F0.1"
        );
        assert!(schedule.check().is_err());
        schedule.tasks[1].pop();
        assert_eq!(schedule.check().unwrap_err(), "stage 1 does not finish micro-batch 1 of chunk 0");
    }

    #[test]
    fn costs_must_cover_all_virtual_stages() {
        let schedule = Schedule::new(ScheduleKind::Interleaved, 2, 2, 2).unwrap();
        let error = simulate(&schedule, &Costs::even(2, 1.0, 1.0, 1.0)).unwrap_err();
        assert_eq!(error, PlanError::CostCount { given: 2, needed: 4 });
    }
}
