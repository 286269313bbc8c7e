//! Reads a rank's parameters and optimizer state from a checkpoint of any plan.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::ModelConfig;
use crate::optim::FlatOptimizer;
use crate::parallel::Engine;
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
    for Wanted { unit, name, kind, piece, within } in wanted {
        let Some(kind) = kind else {
            checkpoint.read(&name, &piece, &mut engine.own_mut(unit)[within])?;
            continue;
        };
        let of_optimizer = optimizer.iter_mut().flat_map(|optimizer| optimizer.state_mut());
        let mut states = of_optimizer.chain(engine.exchange_state()).filter(|(name, _)| *name == kind);
        if let Some((_, mut values)) = states.next() {
            checkpoint.read(&name, &piece, &mut values[unit][within])?;
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
}

/// The parts that [`load`] reads from a checkpoint.
pub(crate) fn wanted(
    checkpoint: &Checkpoint,
    engine: &mut Engine,
    optimizer: Option<&FlatOptimizer>,
) -> Vec<Wanted> {
    let of_exchange: Vec<&'static str> =
        engine.exchange_state().into_iter().map(|(kind, _)| kind).filter(|_| optimizer.is_some()).collect();
    let units = engine.units();
    let kinds: Vec<&'static str> =
        optimizer.iter().flat_map(|optimizer| optimizer.state().map(|(kind, _)| kind)).collect();
    // An imported checkpoint has no updates and no moments: they begin at zero.
    let fresh = checkpoint.state().updates == 0
        && !checkpoint.tensors().keys().any(|name| name.starts_with("first/"));
    let mut kinds = if fresh { vec![] } else { kinds };
    let stored = |kind: &&str| checkpoint.tensors().keys().any(|name| name.starts_with(&format!("{kind}/")));
    kinds.extend(of_exchange.into_iter().filter(stored));
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
            wanted.extend(kinds.iter().map(|kind| part(format!("{kind}/{path}"), Some(kind))));
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
