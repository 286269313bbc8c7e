//! Reads a rank's parameters and optimizer state from a checkpoint of any plan.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::ModelConfig;
use crate::optim::FlatOptimizer;
use crate::parallel::Engine;
use crate::parallel::exchange::{Combine, Whose};
use crate::params::Placement;
use regatta_plan::{Axis, Piece};

/// The folder of what each island has for itself.
pub(crate) const ISLAND: &str = "island";

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
            read(checkpoint, (&name, &piece), &mut engine.own_mut(unit)[within], factor)?;
            continue;
        };
        let of_optimizer = optimizer.iter_mut().flat_map(|optimizer| optimizer.state_mut());
        let of_exchange = engine.exchange_state().into_iter().map(|state| (state.name, state.units));
        let mut states = of_optimizer.chain(of_exchange).filter(|(name, _)| *name == kind);
        let Some((_, mut values)) = states.next() else { continue };
        read(checkpoint, (&name, &piece), &mut values[unit][within], factor)?;
    }
    Ok(())
}

/// Reads a part of a tensor into `own`, or adds it with a factor.
fn read(
    checkpoint: &Checkpoint,
    (name, piece): (&str, &Piece),
    own: &mut [f32],
    factor: Option<Factor>,
) -> Result<()> {
    let Some(Factor { factor, first }) = factor else { return checkpoint.read(name, piece, own) };
    let mut theirs = vec![0.0; own.len()];
    checkpoint.read(name, piece, &mut theirs)?;
    if first {
        own.fill(0.0);
    }
    own.iter_mut().zip(theirs).for_each(|(own, theirs)| *own += factor * theirs);
    Ok(())
}

/// With which factor a part of a sum is added.
#[derive(Clone, Copy)]
pub(crate) struct Factor {
    factor: f32,
    /// What was there before does not count.
    first: bool,
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
    /// What was one worker's, or one island's, of another number of them is added.
    factor: Option<Factor>,
}

/// The parts that [`load`] reads from a checkpoint.
pub(crate) fn wanted(
    checkpoint: &Checkpoint,
    engine: &mut Engine,
    optimizer: Option<&FlatOptimizer>,
) -> Vec<Wanted> {
    let of_exchange: Vec<(&'static str, Whose)> = engine
        .exchange_state()
        .into_iter()
        .map(|state| (state.name, state.whose))
        .filter(|_| optimizer.is_some())
        .collect();
    let units = engine.units();
    let (worker, workers) = (engine.groups().worker(), engine.groups().mesh().workers());
    // Where islands do not train on their own, there is none to compare with.
    let islands = match engine.has_islands() {
        true => (engine.groups().coordinate(Axis::Replica), engine.groups().mesh().axis(Axis::Replica)),
        false => (0, 0),
    };
    let kinds: Vec<&'static str> =
        optimizer.iter().flat_map(|optimizer| optimizer.state().map(|(kind, _)| kind)).collect();
    // An imported checkpoint has no updates and no moments: they begin at zero.
    let fresh = checkpoint.state().updates == 0
        && !checkpoint.tensors().keys().any(|name| name.starts_with("first/"));
    let mut kinds = if fresh { vec![] } else { kinds };
    let stored = |kind: &str| checkpoint.tensors().keys().any(|name| name.starts_with(&format!("{kind}/")));
    let of_optimizer = kinds.clone();
    let whole = of_exchange.iter().filter(|(kind, whose)| *whose == Whose::All && stored(kind));
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
            // Where each of several has its own: this one's, or, of another number of them, a sum.
            let stacked = |name: &str, kind, (own, count): (usize, usize), combine: Combine| {
                let &[before, ..] = checkpoint.tensors().get(name)?.as_slice() else { return None };
                let of = |index: usize, factor: Option<Factor>| Wanted {
                    piece: piece.stacked(before, index),
                    factor,
                    ..part(name.to_string(), kind)
                };
                if before == count {
                    return Some(vec![of(own, None)]);
                }
                let factor = if combine == Combine::Mean { 1.0 / before as f32 } else { 1.0 };
                Some((0..before).map(|index| of(index, Some(Factor { factor, first: index == 0 }))).collect())
            };
            let of_island = |kind: Option<&'static str>, folder: &str| {
                let name = format!("{ISLAND}/{folder}{path}");
                let stacked = optimizer.and_then(|_| stacked(&name, kind, islands, Combine::Mean));
                stacked.unwrap_or_else(|| vec![part(format!("{folder}{path}"), kind)])
            };
            wanted.extend(of_island(None, ""));
            for kind in &kinds {
                match of_optimizer.contains(kind) {
                    true => wanted.extend(of_island(Some(kind), &format!("{kind}/"))),
                    false => wanted.push(part(format!("{kind}/{path}"), Some(kind))),
                }
            }
            for (kind, whose) in &of_exchange {
                let (of, combine) = match whose {
                    Whose::All => continue,
                    Whose::Worker(combine) => ((worker, workers), *combine),
                    Whose::Island => (islands, Combine::Mean),
                };
                wanted
                    .extend(stacked(&format!("{kind}/{path}"), Some(kind), of, combine).unwrap_or_default());
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
