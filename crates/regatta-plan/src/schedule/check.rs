//! Whether a schedule is one.

use super::{Schedule, Task};

/// How far a micro-batch has come on one chunk of one stage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Nothing,
    Forward,
    Input,
    Done,
}

/// Every micro-batch passes every chunk exactly once, forward before backward and input before weight.
pub(crate) fn complete(schedule: &Schedule) -> Result<(), String> {
    let Schedule { stages, chunks, micros, .. } = *schedule;
    if schedule.tasks.len() != stages {
        return Err(format!("there are tasks for {} stages of {stages}", schedule.tasks.len()));
    }
    for (stage, tasks) in schedule.tasks.iter().enumerate() {
        let mut progress = vec![Progress::Nothing; chunks * micros];
        for task in tasks {
            if task.chunk() >= chunks || task.micro() >= micros {
                return Err(format!(
                    "stage {stage} has {task}, of {chunks} chunks and {micros} micro-batches"
                ));
            }
            let reached = &mut progress[task.chunk() * micros + task.micro()];
            *reached = match (task, *reached) {
                (Task::Forward { .. }, Progress::Nothing) => Progress::Forward,
                (Task::BackwardInput { .. }, Progress::Forward) => Progress::Input,
                (Task::Backward { .. }, Progress::Forward) => Progress::Done,
                (Task::BackwardWeight { .. }, Progress::Input) => Progress::Done,
                _ => return Err(format!("stage {stage} has {task} twice or before what it needs")),
            };
        }
        let end = if schedule.training { Progress::Done } else { Progress::Forward };
        if let Some(i) = progress.iter().position(|&reached| reached != end) {
            return Err(format!(
                "stage {stage} does not end micro-batch {} of chunk {}",
                i % micros,
                i / micros
            ));
        }
    }
    Ok(())
}
