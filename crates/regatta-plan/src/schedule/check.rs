//! Checks that a schedule is complete.

use super::{Schedule, Task};

/// The progress of a micro-batch on one chunk of one stage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    NotStarted,
    Forward,
    BackwardInput,
    Done,
}

/// Checks that every chunk processes every micro-batch exactly once, forward before backward and the input part
/// before the weight part.
pub(crate) fn check_complete(schedule: &Schedule) -> Result<(), String> {
    let Schedule { stages, chunks, micro_batches, .. } = *schedule;
    if schedule.tasks.len() != stages {
        return Err(format!("there are tasks for {} stages instead of {stages}", schedule.tasks.len()));
    }
    for (stage, tasks) in schedule.tasks.iter().enumerate() {
        let mut progress = vec![Progress::NotStarted; chunks * micro_batches];
        for task in tasks {
            if task.chunk() >= chunks || task.micro_batch() >= micro_batches {
                return Err(format!(
                    "stage {stage} has the task {task}, but there are {chunks} chunks and {micro_batches} micro-batches"
                ));
            }
            let reached = &mut progress[task.chunk() * micro_batches + task.micro_batch()];
            *reached = match (task, *reached) {
                (Task::Forward { .. }, Progress::NotStarted) => Progress::Forward,
                (Task::BackwardInput { .. }, Progress::Forward) => Progress::BackwardInput,
                (Task::Backward { .. }, Progress::Forward) => Progress::Done,
                (Task::BackwardWeight { .. }, Progress::BackwardInput) => Progress::Done,
                _ => {
                    return Err(format!(
                        "stage {stage} has the task {task} twice, or before a task that it needs"
                    ));
                }
            };
        }
        let end = if schedule.training { Progress::Done } else { Progress::Forward };
        if let Some(i) = progress.iter().position(|&reached| reached != end) {
            return Err(format!(
                "stage {stage} does not finish micro-batch {} of chunk {}",
                i % micro_batches,
                i / micro_batches
            ));
        }
    }
    Ok(())
}
