//! Chooses the checkpoint that all ranks of a job read: the newest undamaged one.

use super::agree::agree_on;
use crate::checkpoint::{Candidate, Checkpoint, Location, Which, candidates, none_at, step_of};
use crate::error::{Error, Result};
use regatta_comm::Group;

/// A rank's finding about a checkpoint: undamaged, and it fits.
const INTACT: u8 = 0;
/// A rank's finding about a checkpoint: damaged.
const DAMAGED: u8 = 1;
/// A rank's finding about a checkpoint: it does not fit.
const REFUSED: u8 = 2;

/// Opens the first checkpoint for `which` that every rank finds undamaged, and returns it with warnings about those
/// before it. None if there is no checkpoint at all. With `exact`, no other checkpoint replaces the wanted one. `fits`
/// refuses an undamaged checkpoint; `intact` looks for damage in the parts that this rank needs. All ranks call it.
///
/// # Errors
/// All checkpoints are damaged, the first undamaged one does not fit, or communication fails.
pub(crate) fn open_intact(
    group: &Group,
    location: &Location,
    which: Which,
    exact: bool,
    fits: impl Fn(&Checkpoint) -> Result<()>,
    mut intact: impl FnMut(&Checkpoint) -> Result<()>,
) -> Result<Option<(Checkpoint, Vec<String>)>> {
    let mut warnings = vec![];
    let listed = agree_on(group, || {
        let mut found = candidates(location, which)?;
        warnings = found.warnings;
        let named = |candidate: &Candidate| candidate.named == Some("best");
        if exact && which == Which::Best && !found.folders.first().is_some_and(named) {
            let problem = "there is no best checkpoint yet: use --from last or --from step-N";
            return Err(Error::checkpoint(location.show(""), problem));
        }
        found.folders.truncate(if exact { 1 } else { usize::MAX });
        let names: Vec<String> = found.folders.into_iter().map(|candidate| candidate.folder).collect();
        Ok(names.join("\n"))
    })?;
    let mut damaged: Option<Error> = None;
    let wanted = listed.lines().next().and_then(step_of);
    for folder in listed.lines() {
        let opened = Checkpoint::open(location, folder).map_err(|error| (DAMAGED, error));
        let opened = opened.and_then(|checkpoint| {
            // First, because a missing or truncated file is damage and must not refuse the run.
            checkpoint.present().map_err(|error| (DAMAGED, error))?;
            fits(&checkpoint).map_err(|error| (REFUSED, error))?;
            intact(&checkpoint).map_err(|error| (DAMAGED, error))?;
            Ok(checkpoint)
        });
        let finding = match &opened {
            Ok(_) => vec![INTACT],
            Err((kind, error)) => [&[*kind], error.to_string().as_bytes()].concat(),
        };
        let all = group.all_gather_vec(&finding)?;
        let first = |kind: u8| all.iter().position(|finding| finding.first() == Some(&kind));
        let reason = |rank: usize| String::from_utf8_lossy(&all[rank][1..]).into_owned();
        match (first(REFUSED), first(DAMAGED), opened) {
            (Some(_), _, Err((REFUSED, error))) => return Err(error),
            (Some(rank), ..) => return Err(Error::Usage(format!("rank {rank}: {}", reason(rank)))),
            (None, Some(_), Err((_, error))) => {
                warnings.push(error.to_string());
                damaged.get_or_insert(error);
            }
            (None, Some(rank), Ok(_)) => {
                warnings.push(format!("rank {rank}: {}", reason(rank)));
                damaged.get_or_insert(Error::Usage(format!("rank {rank}: {}", reason(rank))));
            }
            (None, None, Err((_, error))) => return Err(error),
            (None, None, Ok(checkpoint)) => {
                if !warnings.is_empty() {
                    let step = checkpoint.state().step;
                    let lost = match wanted {
                        Some(wanted) if wanted > step => {
                            format!("; the training of steps {} to {wanted} is lost", step + 1)
                        }
                        _ => String::new(),
                    };
                    warnings.push(format!("using {folder} instead{lost}"));
                }
                return Ok(Some((checkpoint, warnings)));
            }
        }
    }
    match damaged {
        None => Ok(None),
        Some(error) if exact => Err(match error {
            Error::Checkpoint { path, problem } => {
                Error::Checkpoint { path, problem: format!("{problem}, as with --from last") }
            }
            other => other,
        }),
        Some(error) => Err(error),
    }
}

/// As [`open_intact`], but to read and not to resume: it is an error if there is no checkpoint.
///
/// # Errors
/// As [`open_intact`].
pub(crate) fn open_to_read(
    group: &Group,
    location: &Location,
    which: Which,
    fits: impl Fn(&Checkpoint) -> Result<()>,
    intact: impl FnMut(&Checkpoint) -> Result<()>,
) -> Result<(Checkpoint, Vec<String>)> {
    let exact = matches!(which, Which::Step(_));
    open_intact(group, location, which, exact, fits, intact)?.ok_or_else(|| none_at(location))
}
