//! Checkpoints of a run: every rank writes its part while training goes on, and what all have written becomes complete.

use super::config::ModelConfig;
use super::folder::agree_on;
use super::optimizer::FlatOptimizer;
use super::run::Job;
use crate::checkpoint::{
    Checkpoint, FileEntry, Location, Part, ShardWriter, State, Which, abandon, commit, fresh_folder,
};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::parallel::Engine;
use regatta_comm::{Group, ReduceOp};
use regatta_plan::Piece;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The checkpoints of one rank.
pub(super) struct Saving {
    location: Location,
    writer: ShardWriter,
    going: Option<Going>,
    /// Rank 0 makes the last one complete.
    committing: Option<JoinHandle<Result<()>>>,
    blocked: Vec<Duration>,
    /// Most bytes that were copied for one checkpoint.
    copied: usize,
}

struct Going {
    folder: String,
    state: State,
    best: bool,
    outcome: Option<Result<FileEntry>>,
}

impl Saving {
    fn location_of(job: &Job) -> Result<Location> {
        match &job.config.train.checkpoint_url {
            Some(url) => Location::parse(url),
            None => Ok(Location::of_run(&job.out)),
        }
    }

    /// The checkpoint that the run goes on from, where it does and there is one.
    pub(super) fn checkpoint_before(job: &Job) -> Option<Checkpoint> {
        let location = Self::location_of(job).ok().filter(|_| job.resume.is_some())?;
        Checkpoint::find(&location, Which::Last).ok()
    }

    pub(super) fn new(job: &Job) -> Result<Self> {
        let location = Self::location_of(job)?;
        let writer = ShardWriter::new(location.clone(), job.group.rank());
        Ok(Self { location, writer, going: None, committing: None, blocked: vec![], copied: 0 })
    }

    /// Copies what this rank owns, and begins to write it. All ranks call it. Returns why the one before failed, if so.
    pub(super) fn begin<M: Model>(
        &mut self,
        job: &Job,
        state: State,
        best: bool,
        engine: &Engine<M>,
        optimizer: &FlatOptimizer,
    ) -> Result<Option<String>> {
        let begun = Instant::now();
        let failed = self.finish(job, true)?;
        let folder = agree_on(&job.group, || fresh_folder(&self.location, state.step))?;
        let mut parts = vec![];
        let units = engine.units();
        for unit in 0..units.units.len() {
            let states = optimizer.state().map(|(kind, values)| (format!("{kind}/"), values[unit]));
            let all = std::iter::once((String::new(), engine.parameters.own(unit))).chain(states);
            for (kind, values) in all {
                for (param, piece, within) in owned(engine, unit) {
                    if engine.writes(unit, param) {
                        let spec = &units.params[param].spec;
                        let name = format!("{kind}{}", spec.path);
                        parts.push(Part { name, shape: spec.shape.clone(), piece, values: &values[within] });
                    }
                }
            }
        }
        self.copied = self.copied.max(parts.iter().map(|part: &Part<'_>| size_of_val(part.values)).sum());
        let state = State { updates: optimizer.updates(), ..state };
        let outcome = self.writer.begin(&folder, parts).err().map(Err);
        self.going = Some(Going { folder, state, best, outcome });
        self.blocked.push(begun.elapsed());
        Ok(failed)
    }

    /// Whether this rank has written its part, or has failed to.
    pub(super) fn written(&mut self) -> bool {
        let Some(going) = &mut self.going else { return false };
        if going.outcome.is_none() {
            going.outcome = self.writer.poll();
        }
        going.outcome.is_some()
    }

    /// Waits until all ranks have written, and has rank 0 make the checkpoint complete. All ranks call it. With `wholly`,
    /// it waits for that too. Returns why there is none, if so; the one before then stays.
    pub(super) fn finish(&mut self, job: &Job, wholly: bool) -> Result<Option<String>> {
        let mut failed = None;
        if self.going.is_some() {
            await_all(&job.group, || self.written() && self.is_committed())?;
        }
        if let Some(going) = self.going.take() {
            let outcome = going.outcome.unwrap_or_else(|| self.writer.wait());
            let said = match outcome {
                Ok(entry) => serde_json::to_vec(&entry).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            // A first byte says whether the rest is an entry or a reason.
            let mine = match said {
                Ok(json) => [vec![1], json].concat(),
                Err(reason) => [vec![0], reason.into_bytes()].concat(),
            };
            let all = job.group.all_gather_vec(&mine)?;
            let bad = all.iter().position(|said| said.first() != Some(&1));
            failed = bad.map(|rank| format!("rank {rank}: {}", String::from_utf8_lossy(&all[rank][1..])));
            if job.group.rank() == 0 {
                let before = self.join();
                let (location, folder) = (self.location.clone(), going.folder.clone());
                if failed.is_some() {
                    // What it leaves behind is only wasted space.
                    let _ = abandon(&location, &folder);
                } else {
                    let read = |said: &Vec<u8>| serde_json::from_slice::<FileEntry>(&said[1..]);
                    let files = all.iter().map(read).collect::<Result<Vec<_>, _>>();
                    let files = files.map_err(|error| Error::checkpoint(&job.out, error.to_string()))?;
                    self.committing = Some(std::thread::spawn(move || {
                        commit(&location, &folder, &going.state, files, going.best)
                    }));
                    failed = before;
                }
            }
        }
        if wholly {
            await_all(&job.group, || self.is_committed())?;
        }
        Ok(if wholly { self.join().or(failed) } else { failed })
    }

    /// Whether no checkpoint is being made complete by this rank.
    fn is_committed(&self) -> bool {
        self.committing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until rank 0 has made the last checkpoint complete; returns why it could not.
    fn join(&mut self) -> Option<String> {
        match self.committing.take()?.join() {
            Ok(outcome) => outcome.err().map(|error| error.to_string()),
            Err(_) => Some("the thread that completes it panicked".into()),
        }
    }

    /// Time that each save kept training waiting, in milliseconds: the median.
    pub(super) fn blocked_ms(&self) -> f64 {
        let mut times: Vec<f64> = self.blocked.iter().map(|time| time.as_secs_f64() * 1e3).collect();
        super::summary::median(&mut times)
    }

    /// Where checkpoints go.
    pub(super) fn location(&self) -> &Location {
        &self.location
    }

    /// Bytes of the copy that checkpoints are written from.
    pub(super) fn copied(&self) -> usize {
        self.copied
    }
}

/// Waits until `done` on all ranks, as long as it takes. They meet again and again, so that a disk that is slow does not look
/// like a rank that has stopped: only a rank that does not come to a meeting within the deadline has.
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

/// The parameters of a unit as far as this rank owns them: index, what of the whole tensor, elements of its part.
fn owned<M: Model>(
    engine: &Engine<M>,
    unit: usize,
) -> impl Iterator<Item = (usize, Piece, std::ops::Range<usize>)> + '_ {
    let units = engine.units();
    let range = units.shard(unit, engine.shard());
    units
        .segments(unit, range)
        .map(|segment| (segment.param, units.piece(segment.param).narrow(segment.of), segment.within))
}

/// Reads the parameters that this rank owns, and the state of its optimizer, from a checkpoint of whatever plan; then
/// ranks that shard parameters have them whole again.
///
/// # Errors
/// A file or tensor that is missing, damaged or of another model. What was read is then worthless.
pub(crate) fn load<M: Model>(
    checkpoint: &Checkpoint,
    engine: &mut Engine<M>,
    mut optimizer: Option<&mut FlatOptimizer>,
) -> Result<()> {
    let wanted = wanted(checkpoint, engine, optimizer.as_deref());
    // All of it is checked before any of it is taken.
    checkpoint.check(wanted.iter().map(|part| (part.name.as_str(), &part.piece)))?;
    for Wanted { unit, name, kind, piece, within } in wanted {
        match (kind, &mut optimizer) {
            (Some(kind), Some(optimizer)) => {
                if let Some((_, mut values)) = optimizer.state_mut().nth(kind) {
                    checkpoint.read(&name, &piece, &mut values[unit][within])?;
                }
            }
            _ => checkpoint.read(&name, &piece, &mut engine.parameters.own_mut(unit)[within])?,
        }
    }
    for unit in 0..engine.units().units.len() {
        engine.parameters.updated(unit);
    }
    Ok(())
}

/// A part of a tensor that a rank reads.
pub(crate) struct Wanted {
    unit: usize,
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// Which state of the optimizer it is; none for parameters.
    kind: Option<usize>,
    /// Which part of the tensor.
    pub piece: Piece,
    within: std::ops::Range<usize>,
}

/// What [`load`] reads of a checkpoint.
pub(crate) fn wanted<M: Model>(
    checkpoint: &Checkpoint,
    engine: &Engine<M>,
    optimizer: Option<&FlatOptimizer>,
) -> Vec<Wanted> {
    let units = engine.units();
    let kinds: Vec<&str> =
        optimizer.iter().flat_map(|optimizer| optimizer.state().map(|(kind, _)| kind)).collect();
    // A checkpoint that came from elsewhere has seen no update: moments begin at zero.
    let fresh = checkpoint.state().updates == 0
        && !checkpoint.tensors().keys().any(|name| name.starts_with("first/"));
    let kinds = if fresh { vec![] } else { kinds };
    let mut wanted = vec![];
    for unit in 0..units.units.len() {
        for (param, piece, within) in owned(engine, unit) {
            let path = &units.params[param].spec.path;
            let part = |name: String, kind| Wanted {
                unit,
                name,
                kind,
                piece: piece.clone(),
                within: within.clone(),
            };
            wanted.push(part(path.clone(), None));
            wanted.extend(kinds.iter().enumerate().map(|(i, kind)| part(format!("{kind}/{path}"), Some(i))));
        }
    }
    wanted
}

/// Checks that a checkpoint is of this model.
///
/// # Errors
/// A parameter that only one of them has, or that has another shape.
pub(crate) fn check_model(checkpoint: &Checkpoint, model: &ModelConfig, vocab: usize) -> Result<()> {
    let refuse = |problem: String| {
        let what = "use the [model] and [optimizer] it was trained with";
        Err(Error::checkpoint(checkpoint.path(), format!("{problem}: {what}")))
    };
    let made = model.describe(vocab, crate::layers::Placement::whole());
    for spec in made.iter().map(|made| &made.spec) {
        match checkpoint.tensors().get(&spec.path) {
            None => return refuse(format!("has no {}, which this configuration has", spec.path)),
            Some(shape) if *shape != spec.shape => {
                let problem = format!(
                    "has {} as {shape:?}, but this configuration makes it {:?}",
                    spec.path, spec.shape
                );
                return refuse(problem);
            }
            _ => {}
        }
    }
    let state = |name: &str| name.starts_with("first/") || name.starts_with("second/");
    let extra = |name: &&String| !state(name) && !made.iter().any(|made| made.spec.path == **name);
    match checkpoint.tensors().keys().find(extra) {
        Some(name) => refuse(format!("has {name}, which this configuration does not")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use regatta_comm::Options;

    #[test]
    fn a_save_may_take_longer_than_the_deadline() {
        let deadline = Duration::from_secs(3);
        let groups = Group::threads_with(2, &Options { deadline, ..Options::default() }).unwrap();
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
