//! Traces of all ranks, as a file for trace viewers (the Trace Event Format of Chrome and Perfetto).
//!
//! A rank keeps a limited number of its last steps. They are gathered once, after the summary was written at the end
//! of the run, so that training does not wait for the file.

use crate::autograd::Measured;
use crate::error::{Error, Result};
use crate::parallel::Timeline;
use regatta_comm::Group;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Most events of all ranks together: a file of about 50 MB, which viewers can open.
const MOST_EVENTS: usize = 500_000;

/// The tasks and operations of one rank.
pub(super) struct Trace {
    steps: VecDeque<Step>,
    /// Number of events of all kept steps.
    events: usize,
    most: usize,
}

/// One step of one rank; times are in microseconds.
#[derive(Serialize, Deserialize)]
struct Step {
    step: usize,
    /// Start of the step since the program was started.
    begun: f64,
    /// Name, start since the step's start, and duration of each task and operation.
    events: Vec<(Cow<'static, str>, f64, f64)>,
}

impl Trace {
    /// An empty trace for a job of `ranks` ranks.
    pub(super) fn new(ranks: usize) -> Self {
        Self { steps: VecDeque::new(), events: 0, most: MOST_EVENTS / ranks }
    }

    /// Adds the tasks of a step that began `step_begun` after the program, and the operations within them.
    pub(super) fn add(
        &mut self,
        step: usize,
        step_begun: Duration,
        begun: Instant,
        timeline: &Timeline,
        operations: &[Measured],
    ) {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        // Times of tasks are relative to the engine's start of the step.
        let offset = timeline.begun().map_or(Duration::ZERO, |engine| engine.duration_since(begun));
        let tasks = timeline.tasks.iter();
        let tasks =
            tasks.map(|(task, begun, end)| (task.to_string().into(), us(offset + *begun), us(*end - *begun)));
        let operations = operations.iter();
        let operations =
            operations.map(|one| (one.name.into(), us(one.begun.duration_since(begun)), us(one.took)));
        self.keep(Step { step, begun: us(step_begun), events: tasks.chain(operations).collect() });
    }

    fn keep(&mut self, step: Step) {
        self.events += step.events.len();
        self.steps.push_back(step);
        while self.events > self.most && self.steps.len() > 1 {
            self.events -= self.steps.pop_front().map_or(0, |first| first.events.len());
        }
    }

    /// Gathers the kept steps of all ranks; rank 0 writes them to `path`. All ranks call it.
    ///
    /// # Errors
    /// The file cannot be written (on rank 0), or communication fails.
    pub(super) fn write(&self, path: &Path, group: &Group) -> Result<()> {
        let unreadable = |error: serde_json::Error| Error::Usage(format!("a rank's trace: {error}"));
        let own = serde_json::to_vec(&self.steps).map_err(unreadable)?;
        let all = group.all_gather_vec(&own)?;
        drop(own);
        if group.rank() != 0 {
            return Ok(());
        }
        let mut ranks: Vec<VecDeque<Step>> = vec![];
        for json in all {
            ranks.push(serde_json::from_slice(&json).map_err(unreadable)?);
        }
        File::create(path)
            .and_then(|file| write_events(file, &ranks))
            .map_err(Error::io("write the trace", path))
    }
}

/// Writes the events of the steps that all ranks have kept. Every step begins on all ranks when it begins on rank 0,
/// because they have waited for each other just before, and their clocks may differ.
fn write_events(file: File, ranks: &[VecDeque<Step>]) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let first = ranks.iter().filter_map(|steps| steps.front()).map(|step| step.step).max().unwrap_or(0);
    let lead: HashMap<usize, f64> =
        ranks.first().into_iter().flatten().map(|one| (one.step, one.begun)).collect();
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    for (rank, steps) in ranks.iter().enumerate() {
        let comma = if rank == 0 { "" } else { ",\n" };
        write!(
            out,
            "{comma}{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":0,\"tid\":{rank},\"args\":{{\"name\":\"rank {rank}\"}}}}"
        )?;
        for step in steps.iter().filter(|step| step.step >= first) {
            let begun = lead.get(&step.step).copied().unwrap_or(step.begun);
            for (name, since, took) in &step.events {
                let name = serde_json::to_string(name)?;
                let (step, at) = (step.step, begun + since);
                write!(
                    out,
                    ",\n{{\"name\":{name},\"cat\":\"step {step}\",\"ph\":\"X\",\"ts\":{at:.3},\"dur\":{took:.3},\"pid\":0,\"tid\":{rank}}}"
                )?;
            }
        }
    }
    out.write_all(b"\n]}\n")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, events: usize) -> Step {
        let events = (0..events).map(|at| (Cow::from("a \"task\""), at as f64, 0.5)).collect();
        Step { step, begun: step as f64 * 100.0, events }
    }

    #[test]
    fn the_last_steps_of_all_ranks_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        std::fs::write(&path, "x".repeat(100_000)).unwrap();
        let ranks = Group::threads(2).into_iter().map(|group| {
            let path = path.clone();
            std::thread::spawn(move || {
                let mut trace = Trace::new(group.size());
                trace.most = 1000;
                // Rank 1 has more events in a step, so it keeps fewer steps.
                (0..5000).for_each(|done| trace.keep(step(done, 10 + 10 * group.rank())));
                assert!(trace.events <= 1000 && trace.steps.len() == 100 / (1 + group.rank()));
                trace.write(&path, &group).unwrap();
            })
        });
        ranks.collect::<Vec<_>>().into_iter().for_each(|rank| rank.join().unwrap());
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let of = |rank: usize| events.iter().filter(move |event| event["tid"] == rank && event["ph"] == "X");
        assert_eq!((of(0).count(), of(1).count()), (50 * 10, 50 * 20));
        let last = of(1).next_back().unwrap();
        assert_eq!((&last["cat"], &last["name"]), (&"step 4999".into(), &"a \"task\"".into()));
        assert_eq!((last["ts"].as_f64(), last["dur"].as_f64()), (Some(499919.0), Some(0.5)));
    }

    #[test]
    fn a_step_with_more_events_than_the_limit_is_kept() {
        let mut trace = Trace::new(1);
        trace.most = 5;
        trace.keep(step(0, 3));
        trace.keep(step(1, 8));
        assert_eq!((trace.steps.len(), trace.events), (1, 8));
    }
}
