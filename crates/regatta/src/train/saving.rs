//! Writes the checkpoints of a run. Every rank writes its part while training continues; when all have, rank 0
//! completes the checkpoint.

use super::job::Job;
use super::statistics::median;
use crate::checkpoint::{
    Checkpoint, FileEntry, Location, Part, ShardWriter, State, Which, abandon, commit, fresh_folder,
};
use crate::error::{Error, Result};
use crate::optim::FlatOptimizer;
use crate::parallel::Engine;
use crate::parallel::exchange::{StateOf, Whose};
use crate::setup::{ISLAND, agree_on, owned};
use regatta_comm::{Group, ReduceOp};
use regatta_plan::Axis;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// First byte of a message with a file's entry.
const ENTRY: u8 = 1;
/// First byte of a message with the reason of a failure.
const FAILURE: u8 = 0;

/// One rank's part in writing checkpoints.
pub(super) struct Saving {
    location: Location,
    writer: ShardWriter,
    pending: Option<Pending>,
    /// On rank 0, the thread that completes the last checkpoint.
    committing: Option<JoinHandle<Result<()>>>,
    /// How long each save blocked training.
    blocked: Vec<Duration>,
    /// Most bytes that were copied for one checkpoint.
    copied: usize,
}

/// A checkpoint that is being written.
struct Pending {
    folder: String,
    state: State,
    best: bool,
    outcome: Option<Result<FileEntry>>,
}

impl Saving {
    pub(super) fn new(job: &Job) -> Result<Self> {
        let location = location_of(job)?;
        let writer = ShardWriter::new(location.clone(), job.group.rank());
        Ok(Self { location, writer, pending: None, committing: None, blocked: vec![], copied: 0 })
    }

    /// Copies what this rank owns, and begins to write it. All ranks call it. Returns why the checkpoint before
    /// failed, if it did.
    pub(super) fn begin(
        &mut self,
        job: &Job,
        state: State,
        best: bool,
        engine: &mut Engine,
        optimizer: &FlatOptimizer,
    ) -> Result<Option<String>> {
        let begun = Instant::now();
        let failed = self.finish(job, true)?;
        let folder = agree_on(&job.group, || fresh_folder(&self.location, state.step))?;
        let mut parts = vec![];
        // This copies the state of the exchange, which is small or empty.
        let copy = |state: StateOf<'_>| -> (&str, Whose, Vec<Vec<f32>>) {
            let units = state.units.iter().map(|values| values.to_vec()).collect();
            (state.name, state.whose, units)
        };
        engine.before_save()?;
        let of_exchange: Vec<_> = engine.exchange_state().into_iter().map(copy).collect();
        let engine = &*engine;
        let units = engine.units();
        let (worker, workers) = (engine.groups().worker(), engine.groups().mesh().workers());
        let (island, islands) =
            (engine.groups().coordinate(Axis::Replica), engine.groups().mesh().axis(Axis::Replica));
        for unit in 0..units.units.len() {
            let states = optimizer.state().map(|(kind, values)| (format!("{kind}/"), values[unit]));
            let trained: Vec<(String, &[f32])> =
                std::iter::once((String::new(), engine.own(unit))).chain(states).collect();
            let of_exchange = of_exchange
                .iter()
                .map(|(kind, whose, values)| (format!("{kind}/"), *whose, values[unit].as_slice()));
            let mut all: Vec<(String, Whose, &[f32])> = vec![];
            for (kind, values) in &trained {
                all.push((kind.clone(), Whose::All, values));
                if job.plan.local().is_some() {
                    // What the first island has stands for all where nobody asks for islands.
                    all.push((format!("{ISLAND}/{kind}"), Whose::Island, values));
                }
            }
            all.extend(of_exchange);
            for (kind, whose, values) in all {
                for (param, piece, within) in owned(engine, unit) {
                    let spec = &units.params[param].spec;
                    let (name, mut shape) = (format!("{kind}{}", spec.path), spec.shape.clone());
                    let (writes, stack) = match whose {
                        Whose::All => (engine.writes(unit, param), None),
                        Whose::Worker(_) => (engine.writes_of_worker(unit, param), Some((workers, worker))),
                        Whose::Island => (engine.writes_of_island(unit, param), Some((islands, island))),
                    };
                    if !writes {
                        continue;
                    }
                    let piece = stack.map_or(piece.clone(), |(count, own)| piece.stacked(count, own));
                    if let Some((count, _)) = stack {
                        shape.insert(0, count);
                    }
                    parts.push(Part { name, shape, piece, values: &values[within] });
                }
            }
        }
        self.copied = self.copied.max(parts.iter().map(|part: &Part<'_>| size_of_val(part.values)).sum());
        let state = State { updates: engine.updates().unwrap_or(optimizer.updates()), ..state };
        let outcome = self.writer.begin(&folder, parts).err().map(Err);
        self.pending = Some(Pending { folder, state, best, outcome });
        self.blocked.push(begun.elapsed());
        Ok(failed)
    }

    /// Whether this rank's write has ended, with or without an error.
    pub(super) fn written(&mut self) -> bool {
        let Some(pending) = &mut self.pending else { return false };
        if pending.outcome.is_none() {
            pending.outcome = self.writer.poll();
        }
        pending.outcome.is_some()
    }

    /// Waits until all ranks have written, and makes rank 0 complete the checkpoint; waits for that, too, if
    /// `committed` is true. All ranks call it. Returns why a checkpoint failed, if one did; the one before is then
    /// kept.
    pub(super) fn finish(&mut self, job: &Job, committed: bool) -> Result<Option<String>> {
        let mut failed = None;
        if self.pending.is_some() {
            await_all(&job.group, || self.written() && self.is_committed())?;
        }
        if let Some(pending) = self.pending.take() {
            let outcome = pending.outcome.unwrap_or_else(|| self.writer.wait());
            let entry = match outcome {
                Ok(entry) => serde_json::to_vec(&entry).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let own = match entry {
                Ok(json) => [vec![ENTRY], json].concat(),
                Err(reason) => [vec![FAILURE], reason.into_bytes()].concat(),
            };
            let all = job.group.all_gather_vec(&own)?;
            let first_failed = all.iter().position(|message| message.first() != Some(&ENTRY));
            failed =
                first_failed.map(|rank| format!("rank {rank}: {}", String::from_utf8_lossy(&all[rank][1..])));
            if job.group.rank() == 0 {
                let before = self.join();
                let (location, folder) = (self.location.clone(), pending.folder.clone());
                if failed.is_some() {
                    // Files that stay cost only space.
                    let _ = abandon(&location, &folder);
                } else {
                    let read = |message: &Vec<u8>| serde_json::from_slice::<FileEntry>(&message[1..]);
                    let files = all.iter().map(read).collect::<Result<Vec<_>, _>>();
                    let files = files.map_err(|error| Error::checkpoint(&job.out, error.to_string()))?;
                    self.committing = Some(std::thread::spawn(move || {
                        commit(&location, &folder, &pending.state, files, pending.best)
                    }));
                    failed = before;
                }
            }
        }
        if committed {
            await_all(&job.group, || self.is_committed())?;
        }
        Ok(if committed { self.join().or(failed) } else { failed })
    }

    /// Whether this rank is not completing a checkpoint at the moment.
    fn is_committed(&self) -> bool {
        self.committing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// On rank 0, waits until the last checkpoint is complete. Returns why that failed, if it did.
    fn join(&mut self) -> Option<String> {
        match self.committing.take()?.join() {
            Ok(outcome) => outcome.err().map(|error| error.to_string()),
            Err(_) => Some("the thread that completes the checkpoint panicked".into()),
        }
    }

    /// Median time in milliseconds that a save blocked training.
    pub(super) fn blocked_ms(&self) -> f64 {
        let mut times: Vec<f64> = self.blocked.iter().map(|time| time.as_secs_f64() * 1e3).collect();
        median(&mut times)
    }

    /// The location of checkpoints.
    pub(super) fn location(&self) -> &Location {
        &self.location
    }

    /// Bytes of the largest copy of values for a checkpoint.
    pub(super) fn copied(&self) -> usize {
        self.copied
    }
}

fn location_of(job: &Job) -> Result<Location> {
    match &job.config.train.checkpoint_url {
        Some(url) => Location::parse(url),
        None => Ok(Location::of_run(&job.out)),
    }
}

/// The checkpoint from which the run resumes, if it does and there is one.
pub(super) fn checkpoint_before(job: &Job) -> Option<Checkpoint> {
    let location = location_of(job).ok().filter(|_| job.resume.is_some())?;
    Checkpoint::find(&location, Which::Last).ok()
}

/// Waits until `done` is true on all ranks, without a time limit. The ranks exchange their state repeatedly, so that a
/// slow disk does not look like a rank that has stalled: each exchange has the usual deadline.
fn await_all(group: &Group, mut done: impl FnMut() -> bool) -> Result<()> {
    const LONGEST_PAUSE: Duration = Duration::from_millis(100);
    let mut pause = Duration::from_millis(1);
    loop {
        let mut missing = [i64::from(!done())];
        if group.size() > 1 {
            group.all_reduce(&mut missing, ReduceOp::Max)?;
        }
        if missing[0] == 0 {
            return Ok(());
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use regatta_comm::Options;

    #[test]
    fn a_save_may_take_longer_than_the_deadline() {
        let deadline = Duration::from_secs(3);
        let groups = Group::threads_with(2, &Options::default().deadline(deadline)).unwrap();
        std::thread::scope(|scope| {
            let ranks: Vec<_> = groups
                .iter()
                .map(|group| {
                    scope.spawn(move || {
                        let begun = Instant::now();
                        await_all(group, || group.rank() == 0 || begun.elapsed() > 2 * deadline)
                    })
                })
                .collect();
            ranks.into_iter().for_each(|rank| rank.join().unwrap().unwrap());
        });
    }
}
