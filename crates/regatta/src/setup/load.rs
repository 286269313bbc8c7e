//! Reads a rank's parameters and optimizer state from a checkpoint of any plan.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::ModelConfig;
use crate::optim::FlatOptimizer;
use crate::parallel::Engine;
use crate::parallel::exchange::Combine;
use crate::params::Placement;
use regatta_plan::Piece;

/// The parts of a unit's parameters that this rank owns: the parameter's index, the piece of the whole tensor, and the
/// elements of the rank's memory for the unit.
pub(crate) fn owned(
    engine: &Engine,
    unit: usize,
) -> impl Iterator<Item = (usize, Piece, std::ops::Range<usize>)> + '_ {
    let units = engine.units();
    let range = units.shard(unit, engine.shard());
    units
        .segments(unit, range)
        .map(|segment| (segment.param, units.piece(segment.param).narrow(segment.of), segment.within))
}

/// Reads the parameters that this rank owns, and the state of its optimizer if one is given, from a checkpoint of any
/// plan.
///
/// # Errors
/// A file or tensor is missing, damaged or of another model. Everything is verified before anything is overwritten.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    engine: &mut Engine,
    mut optimizer: Option<&mut FlatOptimizer>,
) -> Result<()> {
    let wanted = wanted(checkpoint, engine, optimizer.as_deref());
    checkpoint.check(wanted.iter().map(|part| (part.name.as_str(), &part.piece)))?;
    for Wanted { unit, name, kind, piece, within, factor } in wanted {
        let Some(kind) = kind else {
            checkpoint.read(&name, &piece, &mut engine.own_mut(unit)[within])?;
            continue;
        };
        let of_optimizer = optimizer.iter_mut().flat_map(|optimizer| optimizer.state_mut());
        let of_exchange = engine.exchange_state().into_iter().map(|state| (state.name, state.units));
        let mut states = of_optimizer.chain(of_exchange).filter(|(name, _)| *name == kind);
        let Some((_, mut values)) = states.next() else { continue };
        let own = &mut values[unit][within];
        match factor {
            None => checkpoint.read(&name, &piece, own)?,
            Some(factor) => {
                let mut theirs = vec![0.0; own.len()];
                checkpoint.read(&name, &piece, &mut theirs)?;
                own.iter_mut().zip(theirs).for_each(|(own, theirs)| *own += factor * theirs);
            }
        }
    }
    Ok(())
}

/// A part of a tensor that a rank reads.
pub(crate) struct Wanted {
    unit: usize,
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// The kind of state of the optimizer or of the exchange; none for parameters.
    kind: Option<&'static str>,
    /// Which part of the tensor.
    pub piece: Piece,
    within: std::ops::Range<usize>,
    /// What was one worker's of another number of workers is added with this factor.
    factor: Option<f32>,
}

/// The parts that [`load`] reads from a checkpoint.
pub(crate) fn wanted(
    checkpoint: &Checkpoint,
    engine: &mut Engine,
    optimizer: Option<&FlatOptimizer>,
) -> Vec<Wanted> {
    let of_exchange: Vec<(&'static str, Option<Combine>)> = engine
        .exchange_state()
        .into_iter()
        .map(|state| (state.name, state.of_worker))
        .filter(|_| optimizer.is_some())
        .collect();
    let units = engine.units();
    let (worker, workers) = (engine.groups().worker(), engine.groups().mesh().workers());
    let kinds: Vec<&'static str> =
        optimizer.iter().flat_map(|optimizer| optimizer.state().map(|(kind, _)| kind)).collect();
    // An imported checkpoint has no updates and no moments: they begin at zero.
    let fresh = checkpoint.state().updates == 0
        && !checkpoint.tensors().keys().any(|name| name.starts_with("first/"));
    let mut kinds = if fresh { vec![] } else { kinds };
    let stored = |kind: &str| checkpoint.tensors().keys().any(|name| name.starts_with(&format!("{kind}/")));
    let whole = of_exchange.iter().filter(|(kind, of_worker)| of_worker.is_none() && stored(kind));
    kinds.extend(whole.map(|(kind, _)| *kind));
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
                factor: None,
            };
            wanted.push(part(path.clone(), None));
            wanted.extend(kinds.iter().map(|kind| part(format!("{kind}/{path}"), Some(kind))));
            for (kind, combine) in &of_exchange {
                let (name, Some(combine)) = (format!("{kind}/{path}"), combine) else { continue };
                let Some(&[before, ..]) = checkpoint.tensors().get(&name).map(Vec::as_slice) else {
                    continue;
                };
                let of = |worker: usize, factor: Option<f32>| Wanted {
                    piece: piece.stacked(before, worker),
                    factor,
                    ..part(name.clone(), Some(kind))
                };
                if before == workers {
                    wanted.push(of(worker, None));
                } else {
                    let factor = if *combine == Combine::Mean { 1.0 / before as f32 } else { 1.0 };
                    wanted.extend((0..before).map(|worker| of(worker, Some(factor))));
                }
            }
        }
    }
    wanted
}

/// Checks that a checkpoint fits the model.
///
/// # Errors
/// Only one of them has a parameter, or a parameter has another shape.
pub(crate) fn check_model(checkpoint: &Checkpoint, model: &ModelConfig, vocab: usize) -> Result<()> {
    let refuse = |problem: String| {
        let advice = "use the [model] and [optimizer] it was trained with";
        Err(Error::checkpoint(checkpoint.path(), format!("{problem}: {advice}")))
    };
    let params = model.describe(vocab, Placement::whole())?;
    for spec in params.iter().map(|param| &param.spec) {
        match checkpoint.tensors().get(&spec.path) {
            None => return refuse(format!("has no {}, which this configuration has", spec.path)),
            Some(shape) if *shape != spec.shape => {
                let problem = format!(
                    "has {} as {shape:?}, but this configuration requires {:?}",
                    spec.path, spec.shape
                );
                return refuse(problem);
            }
            _ => {}
        }
    }
    // Names with a slash are of their states; paths of parameters have only dots.
    let state = |name: &str| name.contains('/');
    let extra = |name: &&String| !state(name) && !params.iter().any(|param| param.spec.path == **name);
    match checkpoint.tensors().keys().find(extra) {
        Some(name) => refuse(format!("has {name}, which this configuration does not have")),
        None => Ok(()),
    }
}
