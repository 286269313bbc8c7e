//! Layouts: which named dimension of a tensor is split over which axis of the mesh (Shazeer et al. 2018,
//! "Mesh-TensorFlow", section 3.2).

use crate::{Mesh, PlanError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// The dimensions that a layout may split, each with why the others may not: a norm needs whole rows of `embed`, and
/// `time` follows from sequence parallelism.
pub const SPLITTABLE: [&str; 4] = ["batch", "heads", "mlp", "vocab"];

/// A named dimension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dim {
    /// Its name, as in `mlp`.
    pub name: String,
    /// Elements along it in the whole tensor.
    pub size: usize,
}

/// A parameter as the whole model has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Where it is in the model, as in `layers.0.up.weight`.
    pub path: String,
    /// Its dimensions. A stored dimension may be several of these, as `[3, heads, head]` of an attention's input.
    pub dims: Vec<Dim>,
    /// Its shape as stored.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// From names of dimensions to names of mesh axes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layout(BTreeMap<String, String>);

impl Default for Layout {
    /// Megatron-LM's (Shoeybi et al. 2019, section 3): heads, hidden units and the vocabulary over `tensor`.
    fn default() -> Self {
        let pairs = [("batch", "data"), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor")];
        Self(pairs.into_iter().map(|(dim, axis)| (dim.into(), axis.into())).collect())
    }
}

impl Layout {
    /// A layout of these rules over the default one; an axis `none` leaves the dimension whole.
    ///
    /// # Errors
    /// A dimension that cannot be split, or over an axis that does not split it.
    pub fn with<'a>(rules: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, PlanError> {
        let mut layout = Self::default();
        for (dim, axis) in rules {
            if axis == "none" && dim != "batch" {
                layout.0.remove(dim);
                continue;
            }
            if !crate::mesh::AXES.contains(&axis) {
                return Err(PlanError::Layout(format!(
                    "`{dim} -> {axis}`: there is no axis `{axis}`; the axes are {}, or none",
                    crate::mesh::AXES.join(", ")
                )));
            }
            let fits = if dim == "batch" { axis == "data" } else { axis == "tensor" };
            if SPLITTABLE.contains(&dim) && !fits {
                return Err(PlanError::Layout(format!(
                    "`{dim} -> {axis}`: {dim} is split over {} only",
                    if dim == "batch" { "data" } else { "tensor" }
                )));
            }
            layout.0.insert(dim.into(), axis.into());
        }
        Ok(layout)
    }

    /// The axis over which the named dimension is split, where that axis has more than one rank.
    pub fn axis<'a>(&'a self, mesh: &Mesh, dim: &str) -> Option<&'a str> {
        self.0.get(dim).map(String::as_str).filter(|axis| mesh.axis(axis) > 1)
    }

    /// Checks that `spec` can be split so.
    ///
    /// # Errors
    /// Two dimensions over one axis, a dimension that cannot be split or does not divide: with the tensor's name.
    pub fn check(&self, mesh: &Mesh, spec: &TensorSpec) -> Result<(), PlanError> {
        let refuse = |problem: String| Err(PlanError::Layout(format!("{}: {problem}", spec.path)));
        let mut used: Vec<(&Dim, &str)> = vec![];
        for dim in &spec.dims {
            let Some(axis) = self.axis(mesh, &dim.name) else { continue };
            if let Some((other, _)) = used.iter().find(|(_, taken)| *taken == axis) {
                return refuse(format!(
                    "its dimensions {} and {} are both laid on the axis {axis}; one of them must stay whole",
                    other.name, dim.name
                ));
            }
            used.push((dim, axis));
        }
        for (dim, axis) in used {
            if !SPLITTABLE.contains(&dim.name.as_str()) {
                return refuse(format!(
                    "its dimension {} cannot be split; those that can are {}",
                    dim.name,
                    SPLITTABLE.join(", ")
                ));
            }
            let parts = mesh.axis(axis);
            // The size of a vocabulary is the data's and not the user's choice: its parts may differ by one.
            let divides =
                if dim.name == "vocab" { dim.size >= parts } else { dim.size.is_multiple_of(parts) };
            if !divides {
                return refuse(format!(
                    "its dimension {} of {} does not divide over the {parts} ranks of the axis {axis}",
                    dim.name, dim.size
                ));
            }
        }
        Ok(())
    }

    /// The part of each of the dimensions of `spec` that `rank` holds.
    pub fn ranges(&self, mesh: &Mesh, spec: &TensorSpec, rank: usize) -> Vec<Range<usize>> {
        let range = |dim: &Dim| match self.axis(mesh, &dim.name) {
            Some(axis) => part(dim.size, mesh.axis(axis), mesh.coordinate(rank, axis)),
            None => 0..dim.size,
        };
        spec.dims.iter().map(range).collect()
    }
}

/// The `index`-th of `parts` parts of `size` things, as equal as can be, the larger ones first.
pub fn part(size: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (size / parts, size % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (dim, axis)) in self.0.iter().enumerate() {
            write!(f, "{}{dim} -> {axis}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dims: &[(&str, usize)]) -> TensorSpec {
        TensorSpec {
            path: "layers.0.up.weight".into(),
            dims: dims.iter().map(|(name, size)| Dim { name: name.to_string(), size: *size }).collect(),
            shape: dims.iter().map(|(_, size)| *size).collect(),
        }
    }

    #[test]
    fn parts_cover_everything_once() {
        for size in 0..20 {
            for parts in 1..6 {
                let all: Vec<usize> = (0..parts).flat_map(|index| part(size, parts, index)).collect();
                assert_eq!(all, (0..size).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn illegal_layouts_name_the_tensor() {
        let mesh: Mesh = "tensor=2".parse().unwrap();
        let layout = Layout::default();
        assert!(layout.check(&mesh, &spec(&[("embed", 6), ("mlp", 24)])).is_ok());
        assert!(layout.check(&mesh, &spec(&[("vocab", 65), ("embed", 7)])).is_ok());
        let problem = |layout: &Layout, dims: &[(&str, usize)]| {
            layout.check(&mesh, &spec(dims)).unwrap_err().to_string()
        };
        let error = problem(&layout, &[("embed", 6), ("mlp", 7)]);
        assert!(
            error.contains("layers.0.up.weight") && error.contains("mlp of 7 does not divide"),
            "{error}"
        );
        let both = Layout::with([("embed", "tensor")]).unwrap();
        assert!(problem(&both, &[("embed", 6), ("mlp", 8)]).contains("embed and mlp are both laid on"));
        assert!(problem(&both, &[("embed", 6)]).contains("cannot be split"));
        assert!(Layout::with([("heads", "pipe")]).is_err());
        assert!(Layout::with([("heads", "tenser")]).is_err());
        let whole = Layout::with([("mlp", "none")]).unwrap();
        assert!(whole.check(&mesh, &spec(&[("embed", 6), ("mlp", 7)])).is_ok());
    }

    #[test]
    fn ranges_follow_the_coordinate() {
        let mesh: Mesh = "data=2,tensor=2".parse().unwrap();
        let ranges = Layout::default().ranges(&mesh, &spec(&[("vocab", 5), ("embed", 4)]), 3);
        assert_eq!(ranges, [3..5, 0..4]);
    }
}
