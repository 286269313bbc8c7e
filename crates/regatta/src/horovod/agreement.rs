//! Checks what must be the same on all ranks: the parameters' names and shapes, and their values before the first
//! step.

use super::buckets::{Buckets, ParamSpec};
use crate::autograd::{Fetchable, fetch};
use crate::error::{Error, Result};
use crate::params::{ParamVisitor, visit_params};
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use regatta_comm::Group;
use std::fmt;

/// Shape and type as text, as in `[8, 4] of F32`.
pub(super) fn shape_of(dims: &[usize], dtype: DType) -> String {
    format!("{dims:?} of {dtype:?}")
}

/// The first line in which a rank differs from rank 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    rank: usize,
    first: Option<String>,
    other: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |line: &Option<String>| line.clone().unwrap_or_else(|| "nothing more".into());
        write!(f, "rank 0 has {}, rank {} has {}", line(&self.first), self.rank, line(&self.other))
    }
}

/// The first rank whose `lines` differ from those of rank 0, with the first such line. All ranks call it and get the
/// same result. If there is no difference, it costs one small all-gather.
pub(super) fn first_difference(group: &Group, lines: &[String]) -> Result<Option<Difference>> {
    if group.size() == 1 {
        return Ok(None);
    }
    let text = lines.join("\n");
    let digest = [text.len() as i64, i64::from(crc32fast::hash(text.as_bytes()))];
    let mut digests = vec![0; 2 * group.size()];
    group.all_gather(&digest, &mut digests)?;
    if digests.chunks(2).all(|one| one == &digests[..2]) {
        return Ok(None);
    }
    let texts = group.all_gather_vec(text.as_bytes())?;
    let texts: Vec<Vec<String>> =
        texts.iter().map(|text| String::from_utf8_lossy(text).lines().map(String::from).collect()).collect();
    let of_rank = |rank: usize| {
        let (first, other) = (&texts[0], &texts[rank]);
        let place = (0..first.len().max(other.len())).find(|&place| first.get(place) != other.get(place))?;
        Some(Difference { rank, first: first.get(place).cloned(), other: other.get(place).cloned() })
    };
    Ok((1..texts.len()).find_map(of_rank))
}

/// Checks that all ranks train parameters of the same names and shapes.
pub(super) fn same_shapes(group: &Group, specs: &[ParamSpec]) -> Result<()> {
    let lines: Vec<String> = specs.iter().map(|spec| format!("{} {:?}", spec.path, spec.shape)).collect();
    match first_difference(group, &lines)? {
        None => Ok(()),
        Some(difference) => Err(Error::Usage(format!(
            "the trainable parameters differ: {difference}; every rank must create the same model and freeze the same \
             parameters"
        ))),
    }
}

/// Checks that all ranks begin with the same values of trainable parameters; otherwise they would never become equal.
pub(super) fn same_start<M: Module>(group: &Group, layout: &Buckets, model: &M) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let values = visit_params(model, Values { layout, found: vec![] });
    let mut lines = vec![];
    fetch(values.found, |path, numbers| {
        let crc = crc32fast::hash(bytemuck::cast_slice(numbers));
        lines.push(format!("{path} with checksum {crc:08x}"));
        Ok(())
    })?;
    lines.sort();
    match first_difference(group, &lines)? {
        None => Ok(()),
        Some(difference) => Err(Error::Numeric(format!(
            "the ranks do not begin with the same parameters: {difference}; call regatta::broadcast_parameters before the \
             first step"
        ))),
    }
}

struct Values<'a> {
    layout: &'a Buckets,
    found: Vec<(String, Fetchable)>,
}

impl ParamVisitor for Values<'_> {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        if self.layout.find(&path).is_some() {
            self.found.push((path, Fetchable::of(param.base())));
        }
    }
}

/// Checks that all ranks have the same number of backward passes per step.
pub(super) fn same_passes(group: &Group, passes: usize) -> Result<()> {
    let mut all = vec![0i64; group.size()];
    group.all_gather(&[passes as i64], &mut all)?;
    match all.iter().position(|&other| other != all[0]) {
        None => Ok(()),
        Some(rank) => Err(Error::Usage(format!(
            "with_backward_passes_per_step is {} on rank 0 and {} on rank {rank}; it must be the same on all",
            all[0], all[rank]
        ))),
    }
}
