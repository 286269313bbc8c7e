//! Resumes from a checkpoint: chooses an undamaged one, and reports how this run differs from the one that wrote it.

use super::job::{Job, Resume};
use crate::checkpoint::{Checkpoint, Location, State, Which, candidates, step_of};
use crate::config::{Config, OptimizerConfig};
use crate::error::{Error, Result};
use crate::optim::FlatOptimizer;
use crate::parallel::Engine;
use crate::setup::{check_model, load, open_intact, wanted};
use serde_json::Value;
use std::path::PathBuf;

/// The checkpoint from which a run resumes.
pub(super) struct Resumed {
    pub state: State,
    pub path: PathBuf,
    pub warnings: Vec<String>,
}

/// Reads what this rank owns from a checkpoint of any plan. Returns none if there is no checkpoint and the run may
/// begin. All ranks call it. `vocab` and `data` describe this run's data: the number of tokens or classes, and the
/// digest.
pub(super) fn resume(
    job: &Job,
    resume: Resume,
    location: &Location,
    (vocab, data): (usize, &str),
    engine: &mut Engine,
    optimizer: &mut FlatOptimizer,
) -> Result<Option<Resumed>> {
    let fits = |checkpoint: &Checkpoint| fits(checkpoint, job, resume, vocab, data);
    let intact = |checkpoint: &Checkpoint| {
        let wanted = wanted(checkpoint, engine, Some(optimizer));
        checkpoint.check(wanted.iter().map(|part| (part.name.as_str(), &part.piece)))
    };
    let exact = resume.from != Which::Last;
    let Some((checkpoint, mut warnings)) =
        open_intact(&job.group, location, resume.from, exact, fits, intact)?
    else {
        if resume.or_begin {
            return Ok(None);
        }
        let problem = "there is no checkpoint to resume from: leave out --resume, or use --resume auto, which begins a new \
                       run if there is none";
        return Err(Error::checkpoint(location.show(""), problem));
    };
    load(&checkpoint, engine, Some(optimizer))?;
    let state = checkpoint.state().clone();
    optimizer.set_updates(state.updates);
    let differ = differences(&state, job);
    // An imported checkpoint was not written by a run with which this one could be compared.
    if !differ.is_empty() && state.step > 0 {
        warnings.push(format!(
            "this run differs from the one that wrote the checkpoint: {}; its results will not be the same bit for bit",
            differ.join(", ")
        ));
    }
    if state.data.as_deref().is_some_and(|before| before != data) {
        warnings.push("the data or the tokenizer differ from before, as --other-data allows".into());
    }
    if exact {
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
            "the checkpoint is of step {}, but train.steps is {}: there is nothing to train",
            state.step, job.config.train.steps
        ));
    }
    Ok(Some(Resumed { state, path: checkpoint.path(), warnings }))
}

/// Checks that this run can resume from an undamaged checkpoint.
fn fits(checkpoint: &Checkpoint, job: &Job, resume: Resume, vocab: usize, data: &str) -> Result<()> {
    let state = checkpoint.state();
    let refuse = |problem: String| Err(Error::checkpoint(checkpoint.path(), problem));
    if state.vocab != vocab {
        return refuse(format!(
            "was trained with {} tokens or classes, but the data now has {vocab}: resume on the same data",
            state.vocab
        ));
    }
    // A checkpoint of step 0, as of an imported model, has no position in the data.
    if state.step > 0 && state.plan.global_batch() != job.plan.global_batch() {
        return refuse(format!(
            "was trained with a batch of {} over all workers, but this run has {}: the position in the data would be \
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

/// Keys of `[train]` on which results depend.
const TRAIN: [&str; 6] = ["seed", "accumulate", "last_batch", "device", "precision", "loss_scale"];
/// Keys of `[data]`, besides the content, on which results depend.
const DATA: [&str; 1] = ["shift"];

/// The differences between this run and the one that wrote `state` on which results depend.
fn differences(state: &State, job: &Job) -> Vec<String> {
    let (before, now) = (&state.config, &job.config);
    let section = |config: &Config, name: &str| -> Value {
        serde_json::to_value(config).map(|mut all| all[name].take()).unwrap_or_default()
    };
    let mut found = vec![];
    for (name, keys) in [
        ("model", None),
        ("optimizer", None),
        ("compress", None),
        ("local", None),
        ("sync", None),
        ("train", Some(&TRAIN[..])),
        ("data", Some(&DATA[..])),
    ] {
        let (Value::Object(before), Value::Object(now)) = (section(before, name), section(now, name)) else {
            continue;
        };
        for (key, value) in &now {
            let old = before.get(key).unwrap_or(&Value::Null);
            if keys.is_none_or(|keys| keys.contains(&key.as_str())) && old != value {
                found.push(format!("{name}.{key} {} instead of {}", show(value), show(old)));
            }
        }
    }
    let follows = |optimizer: &OptimizerConfig| !optimizer.constant && optimizer.decay_steps.is_none();
    if follows(&now.optimizer) && before.train.steps != now.train.steps {
        found.push(format!(
            "train.steps {} instead of {}, which the learning rate follows",
            now.train.steps, before.train.steps
        ));
    } else if now.local.every > 0 && before.train.steps != now.train.steps {
        found.push(format!(
            "train.steps {} instead of {}, after which islands came together",
            now.train.steps, before.train.steps
        ));
    }
    let (before, now) = (state.plan.to_string(), job.plan.to_string());
    if before != now {
        found.push(format!("the plan {now} instead of {before}"));
    }
    found
}

/// `value` as text for a message.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
