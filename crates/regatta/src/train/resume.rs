//! Going on from a checkpoint: which one, whether it is whole, and what this run does otherwise than the one that wrote it.

use super::config::{Config, OptimizerConfig};
use super::folder::agree_on;
use super::optimizer::FlatOptimizer;
use super::run::Job;
use super::saving::{check_model, load, wanted};
use crate::checkpoint::{Candidate, Checkpoint, Location, State, Which, candidates, none_at, step_of};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::parallel::Engine;
use regatta_comm::Group;
use serde_json::Value;
use std::path::PathBuf;

/// How a run goes on from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// From which one. Where the newest is damaged, an older one stands in for it; nothing stands in for the others.
    pub from: Which,
    /// Begin where there is none.
    pub or_begin: bool,
    /// Go on though the data or the tokenizer are not those that the checkpoint was trained on.
    pub other_data: bool,
}

/// What a run goes on from.
pub(super) struct Resumed {
    pub state: State,
    pub path: PathBuf,
    pub warnings: Vec<String>,
}

/// Reads what this rank owns from a checkpoint, of whatever plan; none where there is none and the run may begin. All ranks
/// call it. `vocab` and `data` are of the data of this run: its tokens or classes, and the digest of its content.
pub(super) fn resume<M: Model>(
    job: &Job,
    resume: Resume,
    location: &Location,
    (vocab, data): (usize, &str),
    engine: &mut Engine<M>,
    optimizer: &mut FlatOptimizer,
) -> Result<Option<Resumed>> {
    let fits = |checkpoint: &Checkpoint| fits(checkpoint, job, resume, vocab, data);
    let whole = |checkpoint: &Checkpoint| {
        let wanted = wanted(checkpoint, engine, Some(optimizer));
        checkpoint.check(wanted.iter().map(|part| (part.name.as_str(), &part.piece)))
    };
    let alone = resume.from != Which::Last;
    let Some((checkpoint, mut warnings)) = open_whole(&job.group, location, resume.from, alone, fits, whole)?
    else {
        if resume.or_begin {
            return Ok(None);
        }
        let problem = "there is none to go on from: leave out --resume, or use --resume auto, which begins where there is \
                       none";
        return Err(Error::checkpoint(location.show(""), problem));
    };
    load(&checkpoint, engine, Some(optimizer))?;
    let state = checkpoint.state().clone();
    optimizer.set_updates(state.updates);
    let differ = differences(&state, job);
    // What came from elsewhere and was not trained here yet is as nothing that this run could differ from.
    if !differ.is_empty() && state.step > 0 {
        warnings.push(format!(
            "this run is not as the one that wrote the checkpoint: {}; it goes on, but not bit for bit as that one would have",
            differ.join(", ")
        ));
    }
    if state.data.as_deref().is_some_and(|before| before != data) {
        warnings.push("the data or the tokenizer are others than before, as --other-data allows".into());
    }
    if alone {
        let later = candidates(location, Which::Last)?.folders.into_iter();
        let later =
            later.filter_map(|candidate| step_of(&candidate.folder)).filter(|step| *step > state.step);
        if let Some(last) = later.max() {
            warnings.push(format!(
                "going back to step {}: the next checkpoint replaces those of later steps, up to {last}; copy the folder to \
                 keep them",
                state.step
            ));
        }
    }
    if state.step > job.config.train.steps {
        warnings.push(format!(
            "the checkpoint is of step {}, and train.steps is {}: there is nothing to train",
            state.step, job.config.train.steps
        ));
    }
    Ok(Some(Resumed { state, path: checkpoint.path(), warnings }))
}

/// Checks that this run can go on from a checkpoint that is whole.
fn fits(checkpoint: &Checkpoint, job: &Job, resume: Resume, vocab: usize, data: &str) -> Result<()> {
    let state = checkpoint.state();
    let refuse = |problem: String| Err(Error::checkpoint(checkpoint.path(), problem));
    if state.vocab != vocab {
        return refuse(format!(
            "was trained on {} tokens or classes, the data now has {vocab}: resume on the same data",
            state.vocab
        ));
    }
    // One that has not begun has no place in the data, as an imported model.
    if state.step > 0 && state.plan.global_batch() != job.plan.global_batch() {
        return refuse(format!(
            "was trained with a batch of {} over all workers, this run has {}: its place in the data would be \
             lost; use the same train.batch",
            state.plan.global_batch(),
            job.plan.global_batch()
        ));
    }
    if state.data.as_deref().is_some_and(|before| before != data) && !resume.other_data {
        return refuse(
            "was trained on other data or with another tokenizer: resume on the same data, or allow this with \
             --other-data"
                .into(),
        );
    }
    check_model(checkpoint, &job.config.model, vocab)
}

/// Opens the first of the checkpoints for `which` that every rank finds whole, and says in warnings what is wrong with those
/// before it. With `alone`, no other stands in for the one that is wanted. `fits` refuses a checkpoint that is whole;
/// `whole` finds damage in what this rank needs. None where there is no checkpoint at all. All ranks call it.
///
/// # Errors
/// None that is whole, or one that does not fit; a failure of communication.
pub(crate) fn open_whole(
    group: &Group,
    location: &Location,
    which: Which,
    alone: bool,
    fits: impl Fn(&Checkpoint) -> Result<()>,
    whole: impl Fn(&Checkpoint) -> Result<()>,
) -> Result<Option<(Checkpoint, Vec<String>)>> {
    let mut warnings = vec![];
    let listed = agree_on(group, || {
        let mut found = candidates(location, which)?;
        warnings = found.warnings;
        let named = |candidate: &Candidate| candidate.named == Some("best");
        if alone && which == Which::Best && !found.folders.first().is_some_and(named) {
            let problem = "there is no best one yet: use --from last or --from step-N";
            return Err(Error::checkpoint(location.show(""), problem));
        }
        found.folders.truncate(if alone { 1 } else { usize::MAX });
        let names: Vec<String> = found.folders.into_iter().map(|candidate| candidate.folder).collect();
        Ok(names.join("\n"))
    })?;
    let mut damaged: Option<Error> = None;
    let wanted = listed.lines().next().and_then(step_of);
    for folder in listed.lines() {
        const WHOLE: u8 = 0;
        const DAMAGED: u8 = 1;
        const REFUSED: u8 = 2;
        let opened = Checkpoint::open(location, folder).map_err(|error| (DAMAGED, error));
        let opened = opened.and_then(|checkpoint| {
            // Before anything else: a file that is missing or cut off is damage, and no reason to refuse the run.
            checkpoint.present().map_err(|error| (DAMAGED, error))?;
            fits(&checkpoint).map_err(|error| (REFUSED, error))?;
            whole(&checkpoint).map_err(|error| (DAMAGED, error))?;
            Ok(checkpoint)
        });
        let said = match &opened {
            Ok(_) => vec![WHOLE],
            Err((kind, error)) => [&[*kind], error.to_string().as_bytes()].concat(),
        };
        let all = group.all_gather_vec(&said)?;
        let first = |kind: u8| all.iter().position(|said| said.first() == Some(&kind));
        let words = |rank: usize| String::from_utf8_lossy(&all[rank][1..]).into_owned();
        match (first(REFUSED), first(DAMAGED), opened) {
            (Some(_), _, Err((REFUSED, error))) => return Err(error),
            (Some(rank), ..) => return Err(Error::Usage(format!("rank {rank}: {}", words(rank)))),
            (None, Some(_), Err((_, error))) => {
                warnings.push(error.to_string());
                damaged.get_or_insert(error);
            }
            (None, Some(rank), Ok(_)) => {
                warnings.push(format!("rank {rank}: {}", words(rank)));
                damaged.get_or_insert(Error::Usage(format!("rank {rank}: {}", words(rank))));
            }
            (None, None, Err((_, error))) => return Err(error),
            (None, None, Ok(checkpoint)) => {
                if !warnings.is_empty() {
                    let step = checkpoint.state().step;
                    let lost = match wanted {
                        Some(wanted) if wanted > step => {
                            format!("; what was learnt in steps {} to {wanted} is lost", step + 1)
                        }
                        _ => String::new(),
                    };
                    warnings.push(format!("going on from {folder} instead{lost}"));
                }
                return Ok(Some((checkpoint, warnings)));
            }
        }
    }
    match damaged {
        None => Ok(None),
        Some(error) if alone => Err(match error {
            Error::Checkpoint { path, problem } => {
                Error::Checkpoint { path, problem: format!("{problem}, as with --from last") }
            }
            other => other,
        }),
        Some(error) => Err(error),
    }
}

/// As [`open_whole`], for one who wants to read and not to go on: an error where there is none.
///
/// # Errors
/// As [`open_whole`].
pub(crate) fn open_to_read(
    group: &Group,
    location: &Location,
    which: Which,
    fits: impl Fn(&Checkpoint) -> Result<()>,
    whole: impl Fn(&Checkpoint) -> Result<()>,
) -> Result<(Checkpoint, Vec<String>)> {
    let alone = matches!(which, Which::Step(_));
    open_whole(group, location, which, alone, fits, whole)?.ok_or_else(|| none_at(location))
}

/// Keys of `[train]` that numbers depend on. Others say how long, how often and where to.
const TRAIN: [&str; 6] = ["seed", "accumulate", "last_batch", "device", "precision", "loss_scale"];
/// Keys of `[data]` that numbers depend on beside the content.
const DATA: [&str; 1] = ["shift"];

/// What this run does otherwise than the one that wrote `state`, as far as its numbers depend on it.
fn differences(state: &State, job: &Job) -> Vec<String> {
    let (before, now) = (&state.config, &job.config);
    let section = |config: &Config, name: &str| -> Value {
        serde_json::to_value(config).map(|mut all| all[name].take()).unwrap_or_default()
    };
    let mut found = vec![];
    for (name, keys) in
        [("model", None), ("optimizer", None), ("train", Some(&TRAIN[..])), ("data", Some(&DATA[..]))]
    {
        let (Value::Object(before), Value::Object(now)) = (section(before, name), section(now, name)) else {
            continue;
        };
        for (key, value) in &now {
            let old = before.get(key).unwrap_or(&Value::Null);
            if keys.is_none_or(|keys| keys.contains(&key.as_str())) && old != value {
                found.push(format!("{name}.{key} {} instead of {}", words(value), words(old)));
            }
        }
    }
    let follows = |optimizer: &OptimizerConfig| !optimizer.constant && optimizer.decay_steps.is_none();
    if follows(&now.optimizer) && before.train.steps != now.train.steps {
        found.push(format!(
            "train.steps {} instead of {}, which the learning rate follows",
            now.train.steps, before.train.steps
        ));
    }
    let (before, now) = (state.plan.to_string(), job.plan.to_string());
    if before != now {
        found.push(format!("the plan {now} instead of {before}"));
    }
    found
}

fn words(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
