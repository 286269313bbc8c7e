//! What each rank did when, as a file for trace viewers (the Trace Event Format of Chrome and Perfetto).

use crate::autograd::Measured;
use crate::checkpoint::write_atomically;
use crate::error::{Error, Result};
use crate::parallel::Timeline;
use regatta_comm::Group;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, Instant};

/// The tasks and operations of one rank.
#[derive(Default)]
pub(super) struct Trace {
    events: Vec<Event>,
}

#[derive(Serialize, Deserialize)]
struct Event {
    step: usize,
    task: String,
    /// Of the step, in microseconds since the run's beginning.
    step_begun: f64,
    /// Of the task, in microseconds since the step's.
    begun: f64,
    took: f64,
}

impl Trace {
    /// Adds the tasks of a step that began so long after the run, and the operations inside of them.
    pub(super) fn add(
        &mut self,
        step: usize,
        step_begun: Duration,
        begun: Instant,
        timeline: &Timeline,
        operations: &[Measured],
    ) {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let event = |task, begun, took| Event {
            step,
            task,
            step_begun: us(step_begun),
            begun: us(begun),
            took: us(took),
        };
        // Tasks are timed from where the engine began.
        let late = timeline.begun().map_or(Duration::ZERO, |engine| engine.duration_since(begun));
        let tasks = timeline.tasks.iter();
        self.events
            .extend(tasks.map(|(task, begun, end)| event(task.to_string(), late + *begun, *end - *begun)));
        let operation =
            |one: &Measured| event(one.name.to_string(), one.begun.duration_since(begun), one.took);
        self.events.extend(operations.iter().map(operation));
    }

    /// Writes the tasks of all ranks, from rank 0. All call it. Every step begins for all ranks when it begins for rank
    /// 0: they have waited for each other just before, and their clocks may differ.
    pub(super) fn write(&self, path: &Path, group: &Group) -> Result<()> {
        let mine = serde_json::to_vec(&self.events).map_err(|error| Error::Usage(error.to_string()))?;
        let all = group.all_gather_vec(&mine)?;
        if group.rank() != 0 {
            return Ok(());
        }
        let mut events = vec![];
        for (rank, json) in all.iter().enumerate() {
            let of_rank: Vec<Event> =
                serde_json::from_slice(json).map_err(|error| Error::Usage(error.to_string()))?;
            for event in of_rank {
                let lead = self.events.iter().find(|lead| lead.step == event.step);
                let begun = lead.map_or(event.step_begun, |lead| lead.step_begun) + event.begun;
                events.push(serde_json::json!({
                    "name": event.task, "cat": format!("step {}", event.step), "ph": "X",
                    "ts": begun, "dur": event.took, "pid": 0, "tid": rank,
                }));
            }
        }
        let name = |rank: usize| {
            serde_json::json!({
                "name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": { "name": format!("rank {rank}") },
            })
        };
        events.extend((0..group.size()).map(name));
        let json = serde_json::json!({ "traceEvents": events, "displayTimeUnit": "ms" });
        write_atomically(path, json.to_string().as_bytes())
    }
}
