//! What a schedule costs in time, without running it.

use crate::{
    PlanError,
    schedule::{Schedule, Task, complete},
};

/// Seconds (or any unit) that tasks take, by virtual stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// A forward.
    pub forward: Vec<f64>,
    /// The part of a backward that gives the gradient of the input.
    pub backward_input: Vec<f64>,
    /// The part of a backward that gives the gradients of weights. A whole backward takes the sum of the two.
    pub backward_weight: Vec<f64>,
    /// From the end of a task until the next stage has what it sent. The sender does not wait.
    pub message: f64,
}

impl Costs {
    /// The same for all virtual stages, and messages that take no time.
    pub fn even(virtual_stages: usize, forward: f64, backward_input: f64, backward_weight: f64) -> Self {
        Self {
            forward: vec![forward; virtual_stages],
            backward_input: vec![backward_input; virtual_stages],
            backward_weight: vec![backward_weight; virtual_stages],
            message: 0.0,
        }
    }

    /// What `task` takes on a virtual stage.
    fn of(&self, task: Task, part: usize) -> f64 {
        match task {
            Task::Forward { .. } => self.forward[part],
            Task::Backward { .. } => self.backward_input[part] + self.backward_weight[part],
            Task::BackwardInput { .. } => self.backward_input[part],
            Task::BackwardWeight { .. } => self.backward_weight[part],
        }
    }
}

/// When every task of a schedule begins and ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// By stage, in order: the task, its begin and its end.
    pub tasks: Vec<Vec<(Task, f64, f64)>>,
    /// From the begin of the first task to the end of the last.
    pub span: f64,
}

impl Timeline {
    /// Time that `stage` has no task.
    pub fn idle(&self, stage: usize) -> f64 {
        let tasks = self.tasks.get(stage).into_iter().flatten();
        self.span - tasks.map(|(_, start, end)| end - start).sum::<f64>()
    }

    /// The share of all stages' time that they have no task: the pipeline's bubble.
    pub fn idle_share(&self) -> f64 {
        let whole = self.span * self.tasks.len() as f64;
        if whole > 0.0 {
            (0..self.tasks.len()).map(|stage| self.idle(stage)).sum::<f64>() / whole
        } else {
            0.0
        }
    }
}

/// Executes `schedule` on paper: every stage takes its tasks in order, each as soon as what it needs is there.
///
/// # Errors
/// When there are not costs for all virtual stages, or the schedule is incomplete or blocks; the error then names
/// the task that each stage waits with.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Timeline, PlanError> {
    let needed = schedule.virtual_stages();
    let given = costs.forward.len().min(costs.backward_input.len()).min(costs.backward_weight.len());
    if given < needed {
        return Err(PlanError::CostCount { given, needed });
    }
    complete(schedule).map_err(PlanError::Schedule)?;

    let mut done = Done::new(schedule);
    let mut tasks: Vec<Vec<(Task, f64, f64)>> = vec![Vec::new(); schedule.stages];
    let mut moved = true;
    while moved {
        moved = false;
        for (stage, (past, all)) in tasks.iter_mut().zip(&schedule.tasks).enumerate() {
            while let Some(&task) = all.get(past.len()) {
                let part = schedule.virtual_stage(stage, task.chunk());
                let Some(ready) = done.ready(task, part, costs.message) else { break };
                let start = past.last().map_or(0.0, |last| last.2).max(ready);
                let end = start + costs.of(task, part);
                done.record(task, part, end);
                past.push((task, start, end));
                moved = true;
            }
        }
    }

    let waits: Vec<String> = (tasks.iter().zip(&schedule.tasks).enumerate())
        .filter_map(|(stage, (past, all))| Some(format!("stage {stage} with {}", all.get(past.len())?)))
        .collect();
    if !waits.is_empty() {
        return Err(PlanError::Schedule(format!("stages wait for each other forever: {}", waits.join(", "))));
    }
    let span = tasks.iter().flatten().map(|(_, _, end)| *end).fold(0.0, f64::max);
    Ok(Timeline { tasks, span })
}

/// When activations and gradients were ready where they were made, by virtual stage and micro-batch.
struct Done {
    micros: usize,
    stages: usize,
    forward: Vec<Option<f64>>,
    gradient: Vec<Option<f64>>,
}

impl Done {
    fn new(schedule: &Schedule) -> Self {
        let nothing = vec![None; schedule.virtual_stages() * schedule.micros];
        Self { micros: schedule.micros, stages: schedule.stages, forward: nothing.clone(), gradient: nothing }
    }

    /// When all is there that `task` needs; none while something is not.
    fn ready(&self, task: Task, part: usize, message: f64) -> Option<f64> {
        // With one stage the neighbouring chunks are on the same rank.
        let message = if self.stages > 1 { message } else { 0.0 };
        let at = |part: usize| part * self.micros + task.micro();
        let last = part + 1 == self.forward.len() / self.micros;
        match task {
            Task::Forward { .. } if part == 0 => Some(0.0),
            Task::Forward { .. } => Some(self.forward[at(part - 1)]? + message),
            Task::BackwardWeight { .. } => self.gradient[at(part)],
            Task::Backward { .. } | Task::BackwardInput { .. } if last => self.forward[at(part)],
            Task::Backward { .. } | Task::BackwardInput { .. } => {
                Some(self.forward[at(part)]?.max(self.gradient[at(part + 1)]? + message))
            }
        }
    }

    fn record(&mut self, task: Task, part: usize, end: f64) {
        let at = part * self.micros + task.micro();
        match task {
            Task::Forward { .. } => self.forward[at] = Some(end),
            Task::Backward { .. } | Task::BackwardInput { .. } => self.gradient[at] = Some(end),
            Task::BackwardWeight { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScheduleKind;

    #[test]
    fn messages_delay_the_receiver_alone() {
        let schedule = Schedule::new(ScheduleKind::GPipe, 2, 1, 2).unwrap();
        let costs = Costs { message: 10.0, ..Costs::even(2, 1.0, 1.0, 1.0) };
        let timeline = simulate(&schedule, &costs).unwrap();
        // Stage 0 sends at 1 and 2; stage 1 has F at 11..13 and B at 13..17; stage 0 has B from 25 and 27.
        let starts: Vec<Vec<f64>> =
            timeline.tasks.iter().map(|tasks| tasks.iter().map(|task| task.1).collect()).collect();
        assert_eq!(starts, [[0.0, 1.0, 25.0, 27.0], [11.0, 12.0, 13.0, 15.0]]);
        assert_eq!((timeline.span, timeline.idle(0), timeline.idle_share()), (29.0, 23.0, 46.0 / 58.0));
    }

    #[test]
    fn stages_that_wait_for_each_other_are_an_error() {
        let mut schedule = Schedule::new(ScheduleKind::OneFOneB, 2, 1, 2).unwrap();
        // Stage 0 now wants the gradient of 0 before it sends 1, and stage 1 wants 1 before it sends that gradient.
        schedule.tasks[0].swap(1, 2);
        schedule.tasks[1].swap(1, 2);
        let error = simulate(&schedule, &Costs::even(2, 1.0, 1.0, 1.0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the schedule cannot run: stages wait for each other forever: stage 0 with B0.0, stage 1 with F0.1"
        );
        assert!(schedule.check().is_err());
        schedule.tasks[1].pop();
        assert_eq!(schedule.check().unwrap_err(), "stage 1 does not end micro-batch 1 of chunk 0");
    }

    #[test]
    fn costs_must_be_of_all_parts() {
        let schedule = Schedule::new(ScheduleKind::Interleaved, 2, 2, 2).unwrap();
        let error = simulate(&schedule, &Costs::even(2, 1.0, 1.0, 1.0)).unwrap_err();
        assert_eq!(error, PlanError::CostCount { given: 2, needed: 4 });
    }
}
